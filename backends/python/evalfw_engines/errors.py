"""What can go wrong in an engine, by the kinds that the harness tells apart."""

from __future__ import annotations

EXHAUSTED = ("out of memory", "out_of_memory", "can't allocate", "cannot allocate", "failed to allocate")


class EngineError(Exception):
    """The base of all errors that travel as replies. A subclass is one kind."""

    kind: str

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def as_json(self) -> dict[str, str]:
        return {"kind": self.kind, "message": self.message}


class Input(EngineError):
    """A file or value that the user gave is wrong. The message names the file and the field."""

    kind = "input"

    @classmethod
    def file(cls, path: object, problem: object) -> Input:
        """An input error in the file at `path`."""
        return cls(f"{path}: {problem}")


class Unavailable(EngineError):
    """A library, a device or a driver is not there; `advice` says what to install."""

    kind = "unavailable"

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason
        self.advice = advice

    def as_json(self) -> dict[str, str]:
        return {"kind": self.kind, "reason": self.reason, "advice": self.advice}


class Unsupported(EngineError):
    """The engine does not do this."""

    kind = "unsupported"


class OutOfMemory(EngineError):
    """The device or the host ran out of memory, and the framework said so."""

    kind = "out_of_memory"


class NotFinite(EngineError):
    """A loss or gradient is not a finite number."""

    kind = "not_finite"


class Wrong(EngineError):
    """What the device computes is wrong, by a check of the engine's own."""

    kind = "wrong"


class Framework(EngineError):
    """The framework failed."""

    kind = "framework"


class Protocol(EngineError):
    """A call that does not fit the protocol or comes out of order."""

    kind = "protocol"


def typed(error: Exception) -> EngineError:
    """Any exception as one of the kinds. Frameworks often report exhausted memory only in words, so the words
    decide."""
    if isinstance(error, EngineError):
        return error
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    lower = message.lower()
    if isinstance(error, MemoryError) or any(words in lower for words in EXHAUSTED):
        return OutOfMemory(message)
    return Framework(message)
