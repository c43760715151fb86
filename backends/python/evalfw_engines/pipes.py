"""Takes standard input and output away from the libraries.

Whatever they print goes to standard error, never into the protocol: by Python's `print`, by a write to file
descriptor 1, or by a child process. No child reads requests either.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO


def take() -> tuple[BinaryIO, BinaryIO]:
    """The pipes of the protocol, as files that no child process inherits."""
    sys.stdout.flush()
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies
