"""Everything that has to be there before the first measurement: programs, environments, models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


class Unprepared(Exception):
    """Something could not be made; what needs it cannot be measured."""


@dataclass(frozen=True)
class Places:
    cache: Path
    scratch: Path

    @classmethod
    def find(cls, scratch: Path) -> Places:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(os.environ.get("EVALFW_CACHE") or Path(base) / "evalfw")
        return cls(cache.absolute() / "peers", scratch)

    def display(self, text: str) -> str:
        """Without the folders of this machine, for what is published."""
        known = {
            self.scratch: "$SCRATCH",
            self.cache.parent: "~/.cache/evalfw",
            REPOSITORY: ".",
            Path.home(): "~",
        }
        for path, name in known.items():
            text = text.replace(str(path), name)
        return text


def call(command: list[str], where: Path = REPOSITORY) -> str:
    """What a command prints; it may speak to people on standard error."""
    print("==", *command, file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unprepared(f"{Path(command[0]).name}: {error}") from error
    return done.stdout.strip()


def evalfw() -> str:
    """Built from what is in the working tree, so that nothing older is measured."""
    call(["cargo", "build", "--release"])
    target = Path(os.environ.get("CARGO_TARGET_DIR") or "target")
    return str(REPOSITORY / target / "release" / "evalfw")


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
