"""Digests of the golden files and of what made them. Needs nothing but Python's standard library.

    manifest.py verify            the golden files are those that were recorded
    manifest.py installed         the packages of this Python are those of requirements.txt
    manifest.py record FOLDER     write FOLDER/manifest.json for FOLDER/golden
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
Digests = dict[str, str]


def digests(folder: Path, paths: list[Path]) -> Digests:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


def golden_digests(folder: Path) -> Digests:
    return digests(folder, [path for path in folder.rglob("*") if path.is_file()])


def source_digests() -> Digests:
    return digests(HERE, [*HERE.glob("*.py"), HERE / "requirements.txt"])


def pinned_versions() -> dict[str, str]:
    lines = (HERE / "requirements.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def check_installed() -> None:
    for name, pin in pinned_versions().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed, but requirements.txt asks for {pin}")
        if found != pin:
            sys.exit(f"{name} {found} is installed, but requirements.txt asks for {pin}")


def record(folder: Path) -> None:
    check_installed()
    manifest = {
        "python": platform.python_version(),
        "packages": pinned_versions(),
        "sources": source_digests(),
        "golden": golden_digests(folder / "golden"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def verify() -> None:
    manifest = json.loads((HERE / "manifest.json").read_text())
    problems = differences("golden", manifest["golden"], golden_digests(HERE / "golden"))
    problems += differences("source", manifest["sources"], source_digests())
    if manifest["packages"] != pinned_versions():
        problems.append("requirements.txt asks for other versions than made the golden files")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit("The golden files are not as recorded. `tests/reference/make` makes them anew.")
    print(f"{len(manifest['golden'])} golden files are as recorded")


def differences(kind: str, recorded: Digests, found: Digests) -> list[str]:
    problems = []
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            problems.append(f"{kind} file {name} is missing")
        elif name not in recorded:
            problems.append(f"{kind} file {name} is not recorded")
        elif found[name] != recorded[name]:
            problems.append(f"{kind} file {name} has been altered")
    return problems


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["verify"]:
            verify()
        case ["installed"]:
            check_installed()
        case ["record", folder]:
            record(Path(folder))
        case _:
            sys.exit(__doc__)
