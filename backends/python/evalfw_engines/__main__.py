"""`python -m evalfw_engines ENGINE` serves an engine on standard input and output. With `--version` it prints the
versions of the engine's libraries as a JSON object, or of those of all engines where none is named."""

from __future__ import annotations

import json
import os
import platform
import sys

from . import about, pipes, protocol
from .engines import ENGINES, open_engine

# Nothing is looked up on a network, and nothing is reported to one.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_DISABLED": "true",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
}


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--version"]:
            print(json.dumps(versions(*ENGINES)))
            return 0
        case [name, "--version"] if name in ENGINES:
            print(json.dumps(versions(name)))
            return 0
        case [name] if name in ENGINES:
            os.environ.update(OFFLINE)
            return serve(name)
        case [name] | [name, "--version"]:
            print(f"unknown engine {name}; there are {', '.join(ENGINES)}", file=sys.stderr)
        case _:
            print(f"usage: python -m evalfw_engines [ENGINE] [--version], with {', '.join(ENGINES)}", file=sys.stderr)
    return 2


def serve(name: str) -> int:
    requests, replies = pipes.take()
    try:
        protocol.serve(lambda: open_engine(name), requests, replies)
    except BrokenPipeError:
        # Nobody is left to tell; what is still in the buffer may go, so that closing it does not fail once more.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, replies.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def versions(*names: str) -> dict[str, object]:
    packages = sorted({package for name in names for package in ENGINES[name].packages})
    installed = {name: version for name, version in about.versions(tuple(packages)).items() if version is not None}
    return {"evalfw_engines": about.VERSION, "python": platform.python_version(), **installed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
