#!/usr/bin/env python3
"""A whole evalfw engine in one file of plain Python, with nothing but the standard library.

It is an example to read beside backends/PROTOCOL.md: everything that the protocol asks of an engine is here, with no
framework in the way. evalfw's own tests run it, too, on models of a few thousand parameters. It is far too slow for any
other use: it computes with lists of Python floats (f64, which is at least as exact as the f32 that it claims).

From the top: matrices as lists of rows; safetensors; the files of the protocol (batches, adapters); the Qwen2 model,
where each piece gives its output together with a function that takes a gradient back through it; training; and the
engine, with one method for each request.

    python3 plain.py              reads requests on standard input, writes replies on standard output
    python3 plain.py --version    prints versions on one line
"""

import contextlib
import inspect
import itertools
import json
import math
import os
import platform
import struct
import sys
import time
import traceback
from operator import add, mul

PROTOCOL = 1
ENGINE_VERSION = "1.0.0"
IGNORED = -100  # the label of a position without a loss


class Refusal(Exception):
    """A request that is answered with an error of one of the protocol's kinds."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


@contextlib.contextmanager
def blaming(where, *errors):
    """What goes wrong in here is an `input` error that names the file."""
    try:
        yield
    except errors as error:
        raise Refusal("input", f"{where}: {error!r}") from error


# Matrices are lists of rows, and rows are lists of floats.

try:
    from math import sumprod as dot  # Python 3.12
except ImportError:

    def dot(a, b):
        return sum(map(mul, a, b))


def times_transposed(rows, weight):
    """rows · weightᵀ. Weights are stored [out, in], so that both factors of each product are rows."""
    return [[dot(row, w) for w in weight] for row in rows]


def transpose(rows):
    return [list(column) for column in zip(*rows)]


def plus(a, b):
    return [list(map(add, x, y)) for x, y in zip(a, b)]


def scaled(rows, factor):
    return [[x * factor for x in row] for row in rows]


def zeros(height, width):
    return [[0.0] * width for _ in range(height)]


def softmax(row):
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    total = sum(powers)
    return [x / total for x in powers]


def most_likely(logits):
    if not all(map(math.isfinite, logits)):
        raise Refusal("not_finite", "a logit is not finite")
    return logits.index(max(logits))


# Safetensors: eight bytes with the length of a JSON header, the header, and the tensors one after another.


def widen_bf16(data):
    """bf16 is the upper half of f32."""
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return struct.unpack(f"<{len(wide) // 4}f", wide)


DECODE = {
    "BF16": (2, widen_bf16),
    "F16": (2, lambda data: struct.unpack(f"<{len(data) // 2}e", data)),
    "F32": (4, lambda data: struct.unpack(f"<{len(data) // 4}f", data)),
}


class Tensors:
    """The tensors of one safetensors file. Only the header is read at once; values are decoded when asked for."""

    def __init__(self, path):
        self.path = path
        file = read_bytes(path)
        with blaming(path, struct.error, ValueError, AttributeError, RecursionError):
            (length,) = struct.unpack_from("<Q", file)
            self.header = json.loads(file[8 : 8 + length])
            self.header.pop("__metadata__", None)
        self.data = file[8 + length :]

    def read(self, name, shape):
        """The values in one list, and how many bytes they take in the file."""
        with blaming(f"{self.path}: {name}", KeyError, TypeError, ValueError, struct.error):
            entry = self.header[name]
            size, decode = DECODE[entry["dtype"]]
            begin, end = entry["data_offsets"]
            if entry["shape"] != shape:
                raise ValueError(f"the shape is {entry['shape']}, not {shape}")
            if not 0 <= begin <= end <= len(self.data) or end - begin != size * math.prod(shape):
                raise ValueError(f"the offsets {begin} to {end} fit neither its shape nor the file")
            return decode(self.data[begin:end]), end - begin


def as_rows(values, width):
    return [list(values[i : i + width]) for i in range(0, len(values), width)]


def write_tensors(path, matrices):
    """Writes named matrices in f32."""
    header, parts, offset = {"__metadata__": {"format": "pt"}}, [], 0  # as PEFT has it
    for name, rows in matrices.items():
        values = list(itertools.chain.from_iterable(rows))
        try:
            parts.append(struct.pack(f"<{len(values)}f", *values))
        except OverflowError:
            raise Refusal("not_finite", f"{name} has a value beyond f32") from None
        end = offset + 4 * len(values)
        header[name] = {"dtype": "F32", "shape": [len(rows), len(rows[0])], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    write_bytes(path, struct.pack("<Q", len(text)) + text + b"".join(parts))


def read_bytes(path):
    with blaming(path, OSError, ValueError), open(path, "rb") as file:
        return file.read()


def write_bytes(path, data):
    with blaming(path, OSError, ValueError), open(path, "wb") as file:
        file.write(data)


def read_object(path):
    data = read_bytes(path)
    with blaming(path, ValueError, RecursionError):
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value


# Batches.


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)  # true is an int in Python, but not in JSON


def is_number(value):
    return is_int(value) or isinstance(value, float)


def read_batches(reference, vocabulary):
    """The rows of all lines that are asked for, one after another, each as (ids, labels) without its padding.

    Rows and lines can be taken together because the loss is a sum over supervised positions, wherever they stand.
    """
    path, wanted = reference.get("file"), reference.get("lines")
    if not isinstance(path, str) or not isinstance(wanted, list) or not all(map(is_int, wanted)):
        raise Refusal("protocol", "batches need a `file` and a list `lines`")
    lines = read_bytes(path).split(b"\n")
    rows = []
    for number in wanted:
        if not 0 <= number < len(lines) or not lines[number].strip():
            raise Refusal("input", f"{path}: there is no line {number}, counted from 0")
        with blaming(f"{path}: line {number}", ValueError, KeyError, TypeError, RecursionError):
            batch = json.loads(lines[number])
            rows += check_batch(batch["input_ids"], batch["labels"], batch["lengths"], vocabulary)
    return rows


def check_batch(ids, labels, lengths, vocabulary):
    if not len(ids) == len(labels) == len(lengths) > 0:
        raise ValueError("input_ids, labels and lengths are not of one number of rows")
    width = len(ids[0])
    rows = []
    for row, targets, length in zip(ids, labels, lengths):
        if not len(row) == len(targets) == width or not is_int(length) or not 0 < length <= width:
            raise ValueError("the rows are not of one length, or `lengths` does not fit them")
        if not all(is_int(token) and 0 <= token < vocabulary for token in row):
            raise ValueError(f"an id is not below the vocabulary of {vocabulary}")
        if not all(is_int(label) and (label == IGNORED or 0 <= label < vocabulary) for label in targets):
            raise ValueError(f"a label is neither {IGNORED} nor below the vocabulary of {vocabulary}")
        if any(label != IGNORED for label in targets[length:]):
            raise ValueError("padding has labels")
        rows.append((row[:length], targets[:length]))
    return rows


def supervised(labels):
    """The positions that predict a label: position t is for labels[t + 1]."""
    return [t for t, label in enumerate(labels[1:]) if label != IGNORED]


# The model. Each piece is a function of rows (one row for each position of a text) that gives its output and a function
# `back`, which takes the gradient of the output to that of the input, and adds to the gradients of adapters on its way.
# Who only wants the output drops `back`.


class Parameter:
    """A matrix that is trained."""

    def __init__(self, name, value):
        self.name, self.value = name, value
        self.shape = len(value), len(value[0])
        self.gradient = zeros(*self.shape)
        self.first, self.second = zeros(*self.shape), zeros(*self.shape)  # AdamW's moments


class Projection:
    """x·Wᵀ + b, and with an adapter (A, B, scale) also scale·x·Aᵀ·Bᵀ."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias
        self.columns = transpose(weight)  # for the way back
        self.adapter = None

    def __call__(self, rows):
        out = times_transposed(rows, self.weight)
        if self.bias:
            out = [list(map(add, row, self.bias)) for row in out]
        if self.adapter is None:
            return out, lambda gradient: times_transposed(gradient, self.columns)
        down, up, scale = self.adapter
        low = scaled(times_transposed(rows, down.value), scale)

        def back(gradient):
            low_gradient = scaled(times_transposed(gradient, transpose(up.value)), scale)
            up.gradient = plus(up.gradient, times_transposed(transpose(gradient), transpose(low)))
            down.gradient = plus(down.gradient, times_transposed(transpose(low_gradient), transpose(rows)))
            through_adapter = times_transposed(low_gradient, transpose(down.value))
            return plus(times_transposed(gradient, self.columns), through_adapter)

        return plus(out, times_transposed(low, up.value)), back


def rms_norm(rows, weight, epsilon):
    inverse = [1 / math.sqrt(dot(row, row) / len(row) + epsilon) for row in rows]
    out = [[x * r * w for x, w in zip(row, weight)] for row, r in zip(rows, inverse)]

    def back(gradient):
        result = []
        for row, r, g in zip(rows, inverse, gradient):
            g = list(map(mul, g, weight))
            pull = dot(g, row) * r * r / len(row)  # by way of the mean of squares
            result.append([(a - x * pull) * r for a, x in zip(g, row)])
        return result

    return out, back


def gated(gate, up):
    """silu(gate) · up, value by value."""
    sigmoid = [[0.5 + 0.5 * math.tanh(0.5 * x) for x in row] for row in gate]  # exp would overflow
    silu = [list(map(mul, g, s)) for g, s in zip(gate, sigmoid)]
    out = [list(map(mul, a, b)) for a, b in zip(silu, up)]

    def back(gradient):
        gate_gradient = [
            [d * u * s * (1 + x * (1 - s)) for d, u, s, x in zip(*four)] for four in zip(gradient, up, sigmoid, gate)
        ]
        return gate_gradient, [list(map(mul, d, a)) for d, a in zip(gradient, silu)]

    return out, back


class Config:
    """What the engine needs of config.json."""

    def __init__(self, path):
        values = read_object(path)
        rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta")}
        with blaming(path, ValueError, AttributeError):
            self.hidden = size(values, "hidden_size")
            self.intermediate = size(values, "intermediate_size")
            self.layers = size(values, "num_hidden_layers")
            self.heads = size(values, "num_attention_heads")
            self.kv_heads = size(values, "num_key_value_heads")
            self.vocabulary = size(values, "vocab_size")
            own_head_dim = values.get("head_dim") is not None
            self.head_dim = size(values, "head_dim") if own_head_dim else self.hidden // self.heads
            if self.heads % self.kv_heads or self.head_dim % 2 or not (own_head_dim or self.hidden % self.heads == 0):
                raise ValueError("heads that cannot be shared evenly, or an odd head_dim")
            self.epsilon, self.theta = values.get("rms_norm_eps"), rope.get("rope_theta")
            if not (is_number(self.epsilon) and is_number(self.theta) and self.epsilon > 0 and self.theta > 0):
                raise ValueError("rms_norm_eps or rope_theta is missing or no positive number")
        self.tied = values.get("tie_word_embeddings") is True
        # Models that look like Qwen2 but compute something else must not get an answer.
        found = {"rope_type": rope.get("rope_type", "default"), **values}
        expected = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}
        for name, value in {"rope_type": "default", **expected}.items():
            if found.get(name, value) != value:
                raise Refusal("unsupported", f"{path}: {name} is {found[name]}")


def size(values, name):
    if not is_int(values.get(name)) or values[name] < 1:
        raise ValueError(f"{name} is missing or no positive integer")
    return values[name]


class Cache:
    """The keys and values of one block, for each of its kv heads a row for each position seen so far."""

    def __init__(self, config):
        self.head_dim = config.head_dim
        self.keys = [[] for _ in range(config.kv_heads)]
        self.values = [[] for _ in range(config.kv_heads)]

    def __len__(self):
        return len(self.keys[0])

    def append(self, keys, values):
        d = self.head_dim
        for cached, rows in (self.keys, keys), (self.values, values):
            for head, kept in enumerate(cached):
                kept += [row[head * d : (head + 1) * d] for row in rows]


def attend(config, queries, cache, start):
    """Causal attention of the queries at positions start, start + 1, … to the keys and values in the cache."""
    d, group, scale = config.head_dim, config.heads // config.kv_heads, 1 / math.sqrt(config.head_dim)
    value_columns = [transpose(values) for values in cache.values]
    out, kept = [], []
    for position, row in enumerate(queries, start):
        seen, mixed = position + 1, []
        for head in range(config.heads):
            query, kv = row[head * d : (head + 1) * d], head // group
            weights = softmax([dot(query, key) * scale for key in cache.keys[kv][:seen]])
            mixed += [dot(weights, column[:seen]) for column in value_columns[kv]]
            kept.append((query, weights))
        out.append(mixed)

    def back(gradient):
        """Only for a text from its start: who trains has no cache from before."""
        key_columns = [transpose(keys) for keys in cache.keys]
        key_gradients = [zeros(len(cache), d) for _ in cache.keys]
        value_gradients = [zeros(len(cache), d) for _ in cache.values]
        query_gradients, saved = [], iter(kept)
        for seen, row in enumerate(gradient, 1):
            for_queries = []
            for head in range(config.heads):
                g, kv, (query, weights) = row[head * d : (head + 1) * d], head // group, next(saved)
                by_weight = [dot(g, value) for value in cache.values[kv][:seen]]
                mean = dot(weights, by_weight)
                scores = [w * (x - mean) * scale for w, x in zip(weights, by_weight)]
                for_queries += [dot(scores, column[:seen]) for column in key_columns[kv]]
                add_outer(key_gradients[kv], scores, query)
                add_outer(value_gradients[kv], weights, g)
            query_gradients.append(for_queries)
        return query_gradients, beside(key_gradients), beside(value_gradients)

    return out, back


def add_outer(rows, column, row):
    for i, factor in enumerate(column):
        rows[i] = [x + factor * y for x, y in zip(rows[i], row)]


def beside(matrices):
    return [list(itertools.chain.from_iterable(rows)) for rows in zip(*matrices)]


PROJECTIONS = {
    "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


class Block:
    def __init__(self, config, turned, prefix, read):
        hidden, inner = config.hidden, config.intermediate
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        shapes = {
            "self_attn": [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)],
            "mlp": [(inner, hidden), (inner, hidden), (hidden, inner)],
        }
        self.config, self.turned, self.projections = config, turned, {}
        for part, names in PROJECTIONS.items():
            for name, (height, width) in zip(names, shapes[part]):
                full = f"{prefix}.{part}.{name}"
                bias = read(full + ".bias", [height]) if name in ("q_proj", "k_proj", "v_proj") else None
                weight = as_rows(read(full + ".weight", [height, width]), width)
                self.projections[name] = Projection(weight, bias)
        self.input_norm = read(prefix + ".input_layernorm.weight", [hidden])
        self.middle_norm = read(prefix + ".post_attention_layernorm.weight", [hidden])

    def __call__(self, rows, cache):
        normed, norm_back = rms_norm(rows, self.input_norm, self.config.epsilon)
        mixed, attention_back = self.attention(normed, cache)
        rows = plus(rows, mixed)
        normed, middle_back = rms_norm(rows, self.middle_norm, self.config.epsilon)
        change, mlp_back = self.mlp(normed)

        def back(gradient):
            gradient = plus(gradient, middle_back(mlp_back(gradient)))
            return plus(gradient, norm_back(attention_back(gradient)))

        return plus(rows, change), back

    def checkpointed(self, rows, cache):
        """Keeps its input only, and computes again on the way back."""
        out, _ = self(rows, cache)
        return out, lambda gradient: self(rows, Cache(self.config))[1](gradient)

    def attention(self, rows, cache):
        start = len(cache)
        queries, q_back = self.projections["q_proj"](rows)
        keys, k_back = self.projections["k_proj"](rows)
        values, v_back = self.projections["v_proj"](rows)
        cache.append(self.turned(keys, start), values)
        mixed, attend_back = attend(self.config, self.turned(queries, start), cache, start)
        out, o_back = self.projections["o_proj"](mixed)

        def back(gradient):
            for_queries, for_keys, for_values = attend_back(o_back(gradient))
            by_queries = q_back(self.turned(for_queries, start, -1))
            by_keys = k_back(self.turned(for_keys, start, -1))
            return plus(plus(by_queries, by_keys), v_back(for_values))

        return out, back

    def mlp(self, rows):
        gate, gate_back = self.projections["gate_proj"](rows)
        up, up_back = self.projections["up_proj"](rows)
        product, product_back = gated(gate, up)
        out, down_back = self.projections["down_proj"](product)

        def back(gradient):
            for_gate, for_up = product_back(down_back(gradient))
            return plus(gate_back(for_gate), up_back(for_up))

        return out, back


class Model:
    def __init__(self, folder):
        begin = time.perf_counter()
        self.config = config = Config(os.path.join(folder, "config.json"))
        files = open_checkpoint(folder)
        self.read_seconds = time.perf_counter() - begin
        self.parameters = self.checkpoint_bytes = 0

        def read(name, shape):
            """Decodes one tensor and counts it. What is not read here is no part of the model."""
            if name not in files:
                raise Refusal("input", f"{folder}: there is no tensor {name}")
            values, size = files[name].read(name, shape)
            self.parameters += len(values)
            self.checkpoint_bytes += size
            return values

        table = [config.vocabulary, config.hidden]
        self.embedding = as_rows(read("model.embed_tokens.weight", table), config.hidden)
        self.blocks = [Block(config, self.turned, f"model.layers.{i}", read) for i in range(config.layers)]
        self.norm = read("model.norm.weight", [config.hidden])
        self.head = self.embedding if config.tied else as_rows(read("lm_head.weight", table), config.hidden)
        self.head_columns = transpose(self.head)
        self.turns = []  # cosines and sines of each position
        self.upload_seconds = time.perf_counter() - begin - self.read_seconds

    def turned(self, rows, start, sign=1):
        """Rotary embedding of each head in rows of positions from start on, or its inverse with sign −1."""
        d, half = self.config.head_dim, self.config.head_dim // 2
        for position in range(len(self.turns), start + len(rows)):
            angles = [position * self.config.theta ** (-2 * i / d) for i in range(half)]
            self.turns.append(([math.cos(a) for a in angles], [math.sin(a) for a in angles]))
        result = []
        for row, (cosines, sines) in zip(rows, self.turns[start:]):
            out = []
            for at in range(0, len(row), d):
                low, high = row[at : at + half], row[at + half : at + d]
                out += [x * c - sign * y * s for x, y, c, s in zip(low, high, cosines, sines)]
                out += [y * c + sign * x * s for x, y, c, s in zip(low, high, cosines, sines)]
            result.append(out)
        return result

    def new_caches(self):
        return [Cache(self.config) for _ in self.blocks]

    def hidden(self, tokens, caches, checkpointing=False):
        """The rows after the last block, for tokens that follow what is in the caches."""
        rows, backs = [self.embedding[token] for token in tokens], []
        for block, cache in zip(self.blocks, caches):
            rows, back = (block.checkpointed if checkpointing else block)(rows, cache)
            backs.append(back)

        def back_to_adapters(gradient):
            for back in reversed(backs):
                gradient = back(gradient)

        return rows, back_to_adapters

    def logits(self, rows):
        normed, norm_back = rms_norm(rows, self.norm, self.config.epsilon)
        return times_transposed(normed, self.head), lambda g: norm_back(times_transposed(g, self.head_columns))

    def projections(self):
        """All seven of every block, with their names in the checkpoint."""
        for i, block in enumerate(self.blocks):
            for part, names in PROJECTIONS.items():
                for name in names:
                    yield f"model.layers.{i}.{part}.{name}", block.projections[name]


def open_checkpoint(folder):
    """For each tensor the file that has it."""
    single = os.path.join(folder, "model.safetensors")
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(single) or not os.path.exists(index):
        file = Tensors(single)
        return dict.fromkeys(file.header, file)
    with blaming(index, KeyError, AttributeError, TypeError):
        names = read_object(index)["weight_map"]
        files = {name: Tensors(os.path.join(folder, name)) for name in set(names.values())}
        return {tensor: files[name] for tensor, name in names.items()}


# Adapters and training.


class Adapter:
    """A LoRA adapter as PEFT writes it, with AdamW's state."""

    def __init__(self, folder, model):
        path = os.path.join(folder, "adapter_config.json")
        self.config = read_object(path)
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        self.dropout = self.config.get("lora_dropout", 0.0)
        if not is_int(rank) or rank < 1 or not is_number(alpha) or not is_number(self.dropout):
            raise Refusal("input", f"{path}: r, lora_alpha or lora_dropout is missing or wrong")
        for name in "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern":
            if self.config.get(name):
                raise Refusal("unsupported", f"{path}: {name} changes what an adapter computes")
        tensors = Tensors(os.path.join(folder, "adapter_model.safetensors"))
        self.parts, self.steps = [], 0
        for name, projection in model.projections():
            height, width = len(projection.weight), len(projection.columns)
            down = self.parameter(tensors, f"base_model.model.{name}.lora_A.weight", rank, width)
            up = self.parameter(tensors, f"base_model.model.{name}.lora_B.weight", height, rank)
            self.parts.append((projection, (down, up, alpha / rank)))
        self.parameters = [parameter for _, (*pair, _) in self.parts for parameter in pair]
        if extra := set(tensors.header) - {parameter.name for parameter in self.parameters}:
            raise Refusal("input", f"{tensors.path}: {min(extra)} is for nothing in the model")

    @staticmethod
    def parameter(tensors, name, height, width):
        values, _ = tensors.read(name, [height, width])
        return Parameter(name, as_rows(values, width))

    def attach(self):
        for projection, adapter in self.parts:
            projection.adapter = adapter

    def clear(self):
        for parameter in self.parameters:
            parameter.gradient = zeros(*parameter.shape)

    def norm(self):
        return math.sqrt(sum(dot(row, row) for parameter in self.parameters for row in parameter.gradient))

    def save(self, folder):
        with blaming(folder, OSError, ValueError):
            os.makedirs(folder, exist_ok=True)
        write_bytes(os.path.join(folder, "adapter_config.json"), json.dumps(self.config, indent=2).encode())
        weights = {parameter.name: parameter.value for parameter in self.parameters}
        write_tensors(os.path.join(folder, "adapter_model.safetensors"), weights)

    def update(self, training, norm):
        """Clips as torch's clip_grad_norm_ does, and takes one step of AdamW."""
        limit = training.get("max_grad_norm")
        clip = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        self.steps += 1
        beta1, beta2, epsilon = training["beta1"], training["beta2"], training["epsilon"]
        keep = 1 - training["learning_rate"] * training["weight_decay"]
        rate = training["learning_rate"] / (1 - beta1**self.steps)
        correction = 1 / math.sqrt(1 - beta2**self.steps)
        for p in self.parameters:
            gradient = scaled(p.gradient, clip)
            p.first = [[m * beta1 + (1 - beta1) * g for m, g in zip(*two)] for two in zip(p.first, gradient)]
            p.second = [[v * beta2 + (1 - beta2) * g * g for v, g in zip(*two)] for two in zip(p.second, gradient)]
            p.value = [
                [w * keep - rate * m / (math.sqrt(v) * correction + epsilon) for w, m, v in zip(*three)]
                for three in zip(p.value, p.first, p.second)
            ]


def cross_entropy(logits, label):
    top = max(logits)
    return math.log(sum(math.exp(x - top) for x in logits)) + top - logits[label]


def total_loss(model, rows, count, train=False, checkpointing=False):
    """The loss summed over all rows, divided by count; when training, its gradients are added to the adapters'."""
    total = 0.0
    for ids, labels in rows:
        positions = supervised(labels)
        if not positions:
            continue
        ids = ids[: positions[-1] + 1]  # nothing after the last prediction matters to it
        hidden, hidden_back = model.hidden(ids, model.new_caches(), checkpointing)
        logits, logits_back = model.logits([hidden[t] for t in positions])
        targets = [labels[t + 1] for t in positions]
        total += sum(map(cross_entropy, logits, targets))
        if train:
            gradient = zeros(len(hidden), len(hidden[0]))
            for t, row in zip(positions, logits_back(loss_gradient(logits, targets, count))):
                gradient[t] = row
            hidden_back(gradient)
    return total / count


def loss_gradient(logits, targets, count):
    """Of the mean cross entropy by logits: (softmax − 1 at the label) / count."""
    rows = [[x / count for x in softmax(row)] for row in logits]
    for row, target in zip(rows, targets):
        row[target] -= 1 / count
    return rows


# The engine. Its public methods are the requests, and their parameters and types are those of the requests.


def check(name, value, kind):
    right = is_int(value) if kind is int else is_number(value) if kind is float else isinstance(value, kind)
    if not right:
        raise Refusal("protocol", f"the parameter `{name}` is missing or of the wrong type")


def check_training(training):
    """What is not looked at here (kept_activation_bytes) is ignored."""
    for name in "learning_rate", "beta1", "beta2", "epsilon", "weight_decay":
        check(name, training.get(name), float)
    check("gradient_checkpointing", training.get("gradient_checkpointing"), bool)
    if training.get("max_grad_norm") is not None:
        check("max_grad_norm", training["max_grad_norm"], float)


class Engine:
    def __init__(self):
        self.greeted = False
        self.model = self.adapter = self.training = self.caches = None

    def _answer(self, method, params):
        if method not in METHODS:
            raise Refusal("protocol", f"there is no method {method}")
        call = getattr(self, method)
        needed = inspect.get_annotations(call)
        for name, kind in needed.items():
            check(name, params.get(name), kind)
        if not self.greeted and method not in ("hello", "bye"):
            raise Refusal("protocol", f"{method} before hello")
        if self.model is None and method not in ("hello", "limits", "tokenize", "load", "bye"):
            raise Refusal("protocol", f"{method} before load")
        return call(**{name: params[name] for name in needed})

    def hello(self, protocol: int):
        if self.greeted:
            raise Refusal("protocol", "hello comes once")
        if protocol != PROTOCOL:
            raise Refusal("protocol", f"this engine speaks version {PROTOCOL}, not {protocol}")
        self.greeted = True
        device = {"kind": "cpu", "name": cpu_name(), "driver": None, "software": False, "memory_bytes": None}
        return {
            "protocol": PROTOCOL,
            "engine": "plain",
            "engine_version": ENGINE_VERSION,
            "framework": "python",
            "framework_version": platform.python_version(),
            "device": device,
            "compute_dtype": "f32",  # f64 in truth, which has no name of its own and keeps the tolerances of f32
            "features": ["f64 in lists", "math.sumprod" if hasattr(math, "sumprod") else "sum of products"],
            "quantizations": ["none"],
            "threads": 1,
            "tunes": False,
        }

    def limits(self):
        if self.model is not None:
            raise Refusal("protocol", "limits after load")
        return {"memory_bytes_per_second": None, "f32_flops": None, "bf16_flops": None}  # evalfw measures a CPU itself

    def load(self, model: str, quantization: str):
        if self.model is not None:
            raise Refusal("protocol", "load comes once")
        if quantization != "none":
            raise Refusal("unsupported", f"the quantization {quantization}")
        self.model = model = Model(model)
        times = {"read_seconds": model.read_seconds, "quantize_seconds": 0.0, "upload_seconds": model.upload_seconds}
        times["total_seconds"] = sum(times.values())
        return {"times": times, "parameters": model.parameters, "checkpoint_bytes": model.checkpoint_bytes}

    def attach_adapter(self, adapter: str, training: dict):
        check_training(training)
        fresh = Adapter(adapter, self.model)
        fresh.attach()
        self.adapter, self.training = fresh, training
        return {"trainable_parameters": sum(math.prod(p.shape) for p in fresh.parameters)}

    def train_step(self, step: int, dropout_seed: int, batches: dict):
        return self._train(batches, update=True)

    def gradients(self, step: int, dropout_seed: int, batches: dict, output: str):
        result = self._train(batches, update=False)
        write_tensors(output, {p.name: p.gradient for p in self.adapter.parameters})
        return result

    def _train(self, batches, update):
        """The step's number and seed are for dropout masks alone: AdamW counts its own steps."""
        adapter = self._attached()
        if adapter.dropout > 0:
            raise Refusal("unsupported", "this engine has no dropout")
        rows, count = self._read(batches)
        begin = time.perf_counter()
        adapter.clear()
        loss = total_loss(self.model, rows, count, True, self.training["gradient_checkpointing"])
        norm = adapter.norm()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Refusal("not_finite", f"the loss is {loss}, the norm of the gradients {norm}")
        if update:
            adapter.update(self.training, norm)
        return {"loss": loss, "grad_norm": norm, "seconds": time.perf_counter() - begin}

    def evaluate(self, batches: dict):
        rows, count = self._read(batches)
        begin = time.perf_counter()
        loss = total_loss(self.model, rows, count)
        if not math.isfinite(loss):
            raise Refusal("not_finite", f"the loss is {loss}")
        return {"loss": loss, "tokens": count, "seconds": time.perf_counter() - begin}

    def _read(self, batches):
        rows = read_batches(batches, self.model.config.vocabulary)
        count = sum(len(supervised(labels)) for _, labels in rows)
        if count == 0:
            raise Refusal("input", f"{batches['file']}: no position of lines {batches['lines']} has a label")
        return rows, count

    def _attached(self):
        if self.adapter is None:
            raise Refusal("protocol", "there is no adapter yet")
        return self.adapter

    def save_adapter(self, output: str):
        self._attached().save(output)
        return {}

    def prefill(self, tokens: list):
        self._check_tokens(tokens)
        begin = time.perf_counter()
        self.caches = self.model.new_caches()
        token = self._next_token(tokens)
        return {"next": token, "seconds": time.perf_counter() - begin}

    def decode(self, first: int, steps: int):
        if self.caches is None or steps < 0:
            raise Refusal("protocol", "decode before prefill, or a negative number of steps")
        self._check_tokens([first])
        tokens, seconds = [], []
        for _ in range(steps):
            begin = time.perf_counter()
            first = self._next_token([first])
            tokens.append(first)
            seconds.append(time.perf_counter() - begin)
        return {"tokens": tokens, "seconds": seconds}

    def _next_token(self, tokens):
        """Takes tokens through the cache; only the last one's logits are needed."""
        rows, _ = self.model.hidden(tokens, self.caches)
        return most_likely(self.model.logits(rows[-1:])[0][0])

    def logits(self, tokens: list, output: str):
        self._check_tokens(tokens)
        rows, _ = self.model.hidden(tokens, self.model.new_caches())
        write_tensors(output, {"logits": self.model.logits(rows)[0]})
        return {}

    def _check_tokens(self, tokens):
        if not tokens or not all(map(is_int, tokens)):
            raise Refusal("protocol", "no tokens, or one that is no integer")
        vocabulary = self.model.config.vocabulary
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise Refusal("input", f"the token {token} is not below the vocabulary of {vocabulary}")

    def memory(self):
        return {"in_use_bytes": None, "reserved_bytes": None, "peak_bytes": None}  # Python does not tell

    def tune(self):
        return {"measured": 0, "cached": 0, "late": 0, "seconds": 0.0}  # there is nothing to choose

    def decoded_weights(self, output: str):
        raise Refusal("unsupported", "nothing is quantized here")

    def tokenize(self, folder: str, text: str):
        raise Refusal("unsupported", "this engine has no tokenizer")

    def bye(self):
        return {}


METHODS = [name for name, value in vars(Engine).items() if inspect.isfunction(value) and not name.startswith("_")]


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "CPU"


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")  # though Python would read it


def parse(line):
    """The id of a line, if it can be read and else 0, and its method and parameters, or None and what is wrong."""
    try:
        request = json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
        number, method, params = request.get("id"), request.get("method"), request.get("params", {})
    except (ValueError, AttributeError, RecursionError) as error:
        return 0, None, f"no JSON object: {error}"
    if not is_int(number) or number < 0:
        return 0, None, "there is no `id`"
    if not isinstance(method, str) or not isinstance(params, dict):
        return number, None, "a request has a `method` and an object `params`"
    return number, method, params


def reply_to(engine, line):
    """The line to write, and whether it was the last."""
    number, method, params = parse(line)
    try:
        if method is None:
            raise Refusal("protocol", params)
        return json.dumps({"id": number, "result": engine._answer(method, params)}, allow_nan=False), method == "bye"
    except Refusal as refusal:
        kind, message = refusal.kind, str(refusal)
    except MemoryError:
        kind, message = "out_of_memory", "Python has no memory left"
    except OverflowError as overflow:  # what is infinity elsewhere is an exception in Python
        kind, message = "not_finite", str(overflow)
    except Exception as failure:
        traceback.print_exc()
        kind, message = "framework", repr(failure)
    return json.dumps({"id": number, "error": {"kind": kind, "message": message}}), False


def main():
    if sys.argv[1:] == ["--version"]:
        print(f"plain {ENGINE_VERSION}, Python {platform.python_version()}")
        return
    # Replies go to a copy of standard output, so that nothing else that prints can come between them.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin.buffer:
        reply, last = reply_to(engine, line)
        replies.write(reply + "\n")
        replies.flush()
        if last:
            break


if __name__ == "__main__":
    main()
