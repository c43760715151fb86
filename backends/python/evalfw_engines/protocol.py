"""The worker's loop: any engine becomes a process that speaks the protocol, one JSON object a line, a request and its
reply in turn.

What must be alike for all engines is done here, once: the order of calls, the batches from their file, the adapter's
files, and the clock, which stops only after the device has been synchronised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

from . import about, lora, tensor_file
from .batches import Batch, read_batches, trained_tokens
from .checkpoint import Checkpoint
from .engine import NATIVE, NF4, NONE, Engine, LoadTimes, Model
from .errors import Framework, Input, NotFinite, Protocol, Unsupported, typed
from .training import TrainingConfig

# Raised by the harness when a message changes its meaning.
VERSION = 1

U32 = 2**32 - 1
U64 = 2**64 - 1

Reply = dict[str, object]


def serve(open_engine: Callable[[], Engine], requests: BinaryIO, replies: BinaryIO) -> None:
    """Serves one connection until `bye` or end of input. `open_engine` is called by `hello`, so that a failure travels
    as a reply."""
    worker = Worker(open_engine)
    for line in requests:
        if not line.strip():
            continue
        number, last = 0, False
        try:
            number, method, params = parse(line)
            last = method == "bye"
            response = {"id": number, "result": worker.answer(method, params)}
            text = json.dumps(response, allow_nan=False)
        # A library that gives up by `sys.exit` must not take the conversation with it.
        except (Exception, SystemExit) as error:
            if isinstance(error, Unreadable):
                number = error.number
            text = json.dumps({"id": number, "error": typed(error).as_json()})
        replies.write(text.encode() + b"\n")
        replies.flush()
        if last:
            break


class Unreadable(Protocol):
    """A line that is no request, with its id as far as that can be read, so that its sender can tell what failed."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


def parse(line: bytes) -> tuple[int, str, dict[str, object]]:
    """Id, method and parameters of a request."""
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"unreadable request: {error or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise Unreadable("a request is an object")
    number = value.get("id")
    if type(number) is not int or not 0 <= number <= U64:
        raise Unreadable("missing field `id`" if number is None else "id is not a whole number")
    method = value.get("method")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(f"`{name}`" for name in METHODS)
        raise Unreadable(f"unknown method {json.dumps(method)[:80]}, expected one of {known}", number)
    params = value.get("params")
    if not isinstance(params, dict):
        raise Unreadable("missing field `params`" if params is None else "params is not an object", number)
    return number, method, params


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Params:
    """The parameters of a call, by type; an error names the field."""

    def __init__(self, values: dict[str, object]) -> None:
        self.values = values

    def get(self, name: str) -> object:
        if name not in self.values:
            raise Protocol(f"missing field `{name}`")
        return self.values[name]

    def whole(self, name: str, largest: int = U64) -> int:
        value = self.get(name)
        if type(value) is not int or not 0 <= value <= largest:
            raise Protocol(f"{name} is not a whole number from 0 to {largest}")
        return value

    def wholes(self, name: str, largest: int = U64) -> list[int]:
        values = self.get(name)
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v <= largest for v in values):
            raise Protocol(f"{name} is not a list of whole numbers from 0 to {largest}")
        return values

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise Protocol(f"{name} is not a text")
        return value

    def path(self, name: str) -> Path:
        text = self.text(name)
        if "\0" in text:
            raise Protocol(f"{name} is not a path")
        return Path(text)

    def nested(self, name: str) -> Params:
        value = self.get(name)
        if not isinstance(value, dict):
            raise Protocol(f"{name} is not an object")
        return Params(value)

    def optional(self, name: str) -> Params | None:
        return None if self.values.get(name) is None else self.nested(name)


class Worker:
    """The state of the conversation: before `hello`, with an engine, with a model."""

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self.open_engine: Callable[[], Engine] | None = open_engine
        self.engine: Engine | None = None
        self.session: Session | None = None
        # Files of batches already read and checked.
        self.files: dict[Path, list[Batch]] = {}

    def answer(self, method: str, params: dict[str, object]) -> Reply:
        try:
            return METHODS[method](self, Params(params))
        finally:
            if self.session is not None:
                # An engine whose allocator knows no peak can look now, off every clock.
                self.session.look_at_memory()

    def hello(self, call: Params) -> Reply:
        version = call.whole("protocol", U32)
        if version != VERSION:
            raise Protocol(f"the harness speaks version {version}, this worker version {VERSION}")
        opened, self.open_engine = self.open_engine, None
        if opened is None:
            self.engine = self.session = None
            raise Protocol("hello comes once, first")
        engine = opened()
        info = {"protocol": VERSION, "engine_version": about.VERSION, **engine.info()}
        self.engine = engine
        return info

    def limits(self, _call: Params) -> Reply:
        if self.engine is None or self.session is not None:
            raise Protocol("limits come after hello and before load")
        return self.engine.limits()

    def load(self, call: Params) -> Reply:
        folder, quantization = call.path("model"), call.text("quantization")
        if quantization not in (NONE, NF4, NATIVE):
            raise Protocol(f"quantization is {quantization}, expected {NONE}, {NF4} or {NATIVE}")
        if self.engine is None or self.session is not None:
            raise Protocol("load comes once, after hello")
        if quantization not in self.engine.info().get("quantizations", (NONE, NF4)):
            raise Unsupported(f"a base quantized as {quantization}")
        start = perf_counter()
        checkpoint = Checkpoint.open(folder)
        times = LoadTimes(read_seconds=perf_counter() - start)
        model = self.engine.load(checkpoint, quantization, times)
        model.synchronize()
        total = perf_counter() - start
        self.session = Session(model, checkpoint)
        return {
            "times": {
                "read_seconds": times.read_seconds,
                "quantize_seconds": times.quantize_seconds,
                "upload_seconds": max(0.0, total - times.read_seconds - times.quantize_seconds),
                "total_seconds": total,
            },
            "parameters": checkpoint.config.parameters(),
            "checkpoint_bytes": checkpoint.bytes(),
        }

    def attach_adapter(self, call: Params) -> Reply:
        return self.loaded().attach_adapter(call)

    def tune(self, call: Params) -> Reply:
        # No engine here measures kernels, so there is nothing to run and nothing to tell.
        for name in ("train", "evaluate"):
            batches = call.optional(name)
            if batches is not None:
                self.batches(batches)
        self.loaded()
        return {"measured": 0, "cached": 0, "late": 0, "seconds": 0.0}

    def train_step(self, call: Params) -> Reply:
        batches = self.batches(call.nested("batches"))
        return self.loaded().train_step(call, batches)

    def gradients(self, call: Params) -> Reply:
        batches = self.batches(call.nested("batches"))
        return self.loaded().gradients(call, batches)

    def evaluate(self, call: Params) -> Reply:
        batches = self.batches(call.nested("batches"))
        return self.loaded().evaluate(batches)

    def prefill(self, call: Params) -> Reply:
        return self.loaded().prefill(call)

    def decode(self, call: Params) -> Reply:
        return self.loaded().decode(call)

    def logits(self, call: Params) -> Reply:
        return self.loaded().logits(call)

    def decoded_weights(self, call: Params) -> Reply:
        return self.loaded().decoded_weights(call)

    def save_adapter(self, call: Params) -> Reply:
        return self.loaded().save_adapter(call)

    def memory(self, _call: Params) -> Reply:
        return dict(self.loaded().model.memory())

    def tokenize(self, call: Params) -> Reply:
        folder, text = call.path("folder"), call.text("text")
        if self.engine is None:
            raise Protocol("tokenize comes after hello")
        return {"tokens": self.engine.tokenize(folder, text)}

    def bye(self, _call: Params) -> Reply:
        return {}

    def loaded(self) -> Session:
        if self.session is None:
            raise Protocol("no model is loaded")
        return self.session

    def batches(self, call: Params) -> list[Batch]:
        """The batches a call refers to. They are read and checked outside every clock."""
        vocab_size = self.loaded().config.vocab_size
        path, lines = call.path("file"), call.wholes("lines")
        if path not in self.files:
            self.files[path] = read_batches(path, vocab_size)
        batches = self.files[path]
        for line in lines:
            if line >= len(batches):
                raise Input.file(path, f"has {len(batches)} lines, line {line} asked for")
        picked = [batches[line] for line in lines]
        # A row without an answer, or a micro-batch, adds nothing to the sum; of nothing there is no mean.
        if trained_tokens(picked) == 0:
            raise Input.file(path, f"no position of the lines {lines} has a loss")
        return picked


class Session:
    """A loaded model, and the calls on it."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.adapter: lora.LoraConfig | None = None
        # Tokens in the KV cache, and so the position of the next one.
        self.position = 0

    def look_at_memory(self) -> None:
        try:
            self.model.memory()
        except Exception:
            # Whoever asks for the figures gets the error; here it would hide an answer.
            pass

    def attach_adapter(self, call: Params) -> Reply:
        training = TrainingConfig.from_json(call.get("training"))
        adapter = lora.Adapter.read(call.path("adapter"), self.config)
        self.model.attach_adapter(adapter, training)
        self.model.synchronize()
        self.adapter = adapter.config
        return {"trainable_parameters": adapter.parameters()}

    def train_step(self, call: Params, batches: list[Batch]) -> Reply:
        self.lora()
        step, seed = call.whole("step"), call.whole("dropout_seed")
        start = perf_counter()
        loss, norm = self.model.train_step(step, seed, batches)
        self.model.synchronize()
        return step_report(loss, norm, perf_counter() - start)

    def gradients(self, call: Params, batches: list[Batch]) -> Reply:
        config = self.lora()
        step, seed, output = call.whole("step"), call.whole("dropout_seed"), call.path("output")
        start = perf_counter()
        loss, norm, gradients = self.model.gradients(step, seed, batches)
        report = step_report(loss, norm, perf_counter() - start)
        lora.write_tensors(output, gradients, self.config, config.r)
        return report

    def evaluate(self, batches: list[Batch]) -> Reply:
        start = perf_counter()
        loss_sum, tokens = self.model.evaluate(batches)
        self.model.synchronize()
        seconds = perf_counter() - start
        loss = finite("evaluation loss", float(loss_sum) / tokens)
        return {"loss": loss, "tokens": int(tokens), "seconds": seconds}

    def prefill(self, call: Params) -> Reply:
        tokens = self.tokens(call.wholes("tokens", U32))
        start = perf_counter()
        following = self.model.prefill(tokens)
        self.model.synchronize()
        seconds = perf_counter() - start
        self.position = len(tokens)
        return {"next": int(following), "seconds": seconds}

    def decode(self, call: Params) -> Reply:
        first, steps = call.whole("first", U32), call.whole("steps")
        if self.position == 0:
            raise Protocol("decode continues a prefill, and there was none")
        (token,) = self.tokens([first])
        tokens: list[int] = []
        seconds: list[float] = []
        for _ in range(steps):
            start = perf_counter()
            token = self.model.decode(token)
            self.model.synchronize()
            seconds.append(perf_counter() - start)
            tokens.append(int(token))
            self.position += 1
        return {"tokens": tokens, "seconds": seconds}

    def logits(self, call: Params) -> Reply:
        tokens, output = self.tokens(call.wholes("tokens", U32)), call.path("output")
        logits = self.model.logits(tokens)
        expected = (len(tokens), self.config.vocab_size)
        if tuple(logits.shape) != expected:
            raise Framework(f"the engine gave logits of shape {tuple(logits.shape)}, expected {expected}")
        tensor_file.write(output, {"logits": logits})
        return {}

    def decoded_weights(self, call: Params) -> Reply:
        tensor_file.write(call.path("output"), self.model.decoded_weights())
        return {}

    def save_adapter(self, call: Params) -> Reply:
        config = self.lora()
        tensors = self.model.adapter()
        lora.write(call.path("output"), config, tensors, self.config, self.checkpoint.folder)
        return {}

    def lora(self) -> lora.LoraConfig:
        if self.adapter is None:
            raise Protocol("no adapter is attached")
        return self.adapter

    def tokens(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise Protocol("no tokens")
        for token in tokens:
            if token >= self.config.vocab_size:
                raise Input(f"token id {token} is not below the vocabulary of {self.config.vocab_size}")
        return tokens


METHODS: dict[str, Callable[[Worker, Params], Reply]] = {
    "hello": Worker.hello,
    "limits": Worker.limits,
    "load": Worker.load,
    "attach_adapter": Worker.attach_adapter,
    "tune": Worker.tune,
    "train_step": Worker.train_step,
    "gradients": Worker.gradients,
    "evaluate": Worker.evaluate,
    "prefill": Worker.prefill,
    "decode": Worker.decode,
    "logits": Worker.logits,
    "decoded_weights": Worker.decoded_weights,
    "save_adapter": Worker.save_adapter,
    "memory": Worker.memory,
    "tokenize": Worker.tokenize,
    "bye": Worker.bye,
}


def step_report(loss: float, norm: float, seconds: float) -> Reply:
    return {"loss": finite("loss", loss), "grad_norm": finite("gradient norm", norm), "seconds": seconds}


def finite(what: str, value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise NotFinite(f"{what} is {value}")
    return value
