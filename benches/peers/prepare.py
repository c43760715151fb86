"""Everything that has to be there before the first measurement: programs, environments, models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


class Unprepared(Exception):
    """Something could not be made; what needs it cannot be measured."""


@dataclass(frozen=True)
class Places:
    cache: Path
    scratch: Path
    # What the caller named, and what it is called in what is published.
    given: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def find(cls, scratch: Path) -> Places:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(os.environ.get("EVALFW_CACHE") or Path(base) / "evalfw")
        return cls(cache.absolute() / "peers", scratch)

    def display(self, text: str) -> str:
        """Without the folders of this machine, for what is published."""
        known = {
            **self.given,
            self.scratch: "$SCRATCH",
            self.cache.parent: "~/.cache/evalfw",
            REPOSITORY: ".",
            Path.home(): "~",
        }
        # A folder's name is also the beginning of what is in it.
        for path in sorted(known, key=lambda path: len(str(path)), reverse=True):
            if path != Path("/"):
                text = text.replace(str(path), known[path])
        return text


def call(command: list[str], where: Path = REPOSITORY) -> str:
    """What a command prints; it may speak to people on standard error."""
    print("==", *command, file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unprepared(f"{Path(command[0]).name}: {error}") from error
    return done.stdout.strip()


def evalfw(device: str) -> str:
    """Built from what is in the working tree, so that nothing older is measured."""
    call(["cargo", "build", "--release", *(["--features", "cuda"] if device == "cuda" else [])])
    target = Path(os.environ.get("CARGO_TARGET_DIR") or "target")
    return str(REPOSITORY / target / "release" / "evalfw")


def interpreter(named: str) -> Path:
    """As it is: resolving a link would lead out of a virtual environment."""
    found = shutil.which(named)
    if found is None:
        raise Unprepared(f"{named}: no program; --python and EVALFW_PEERS_PYTHON name a Python interpreter")
    return Path(found).absolute()


def reference_python() -> str:
    return call([str(REPOSITORY / "tests" / "reference" / "make"), "--python"])


def llama_python() -> str:
    return call([str(HERE / "llama-environment")])


def checkpoint(binary: str, model: str, cache: Path) -> Path:
    """A checkpoint by `evalfw synth`, without its tokenizer: evalfw then trains on full rows of random ids
    instead of text, which the peers can do just alike."""
    folder = cache / model
    if not folder.exists():
        partial = cache / f"{model}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        call([binary, "synth", model, str(partial)])
        for file in partial.glob("tokenizer*"):
            file.unlink()
        partial.rename(folder)
    return folder


def own_checkpoint(folder: Path, scratch: Path) -> Path:
    """A folder of the caller's, seen without its tokenizer where it has one, as above."""
    if not (folder / "config.json").is_file():
        raise Unprepared(f"{folder}: no checkpoint there (config.json is missing); `evalfw synth` makes one")
    if not any(folder.glob("*.safetensors")):
        raise Unprepared(f"{folder}: no weights there (*.safetensors)")
    if not any(folder.glob("tokenizer*")):
        return folder
    view = scratch / "checkpoint"
    view.mkdir()
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith("tokenizer"):
            (view / file.name).symlink_to(file)
    return view


def gguf(python: str, checkpoint: Path) -> Path:
    """The same checkpoint for llama.cpp."""
    file = checkpoint.with_name(f"{checkpoint.name}-q4_0.gguf")
    if not file.exists():
        call([python, str(HERE / "workers" / "make_gguf.py"), str(checkpoint), str(file)])
    return file


def warm_page_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
