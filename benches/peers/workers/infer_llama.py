"""Measures llama.cpp as llama-bench does, and prints one JSON line.

Random tokens, no sampling. Generation goes on from the prompt, which llama-bench calls depth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from importlib import metadata

import llama_cpp


class Session:
    """A context, and decoding in it with the clock running."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        begin = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(
            os.fsencode(file), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit("llama.cpp could not load the model")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.load_seconds = time.perf_counter() - begin

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int]) -> float:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        begin = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - begin
        if status != 0:
            raise SystemExit(f"llama_decode said {status}")
        return seconds


def measure(args: argparse.Namespace) -> dict[str, object]:
    session = Session(args.model, args.threads, args.prompt_tokens + args.generate_tokens)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(session.model))
    draw = random.Random(args.seed)
    prompt_seconds, generate_seconds = [], []
    for turn in range(args.warmup + args.repeats):
        session.clear()
        prompt = session.decode([draw.randrange(vocab) for _ in range(args.prompt_tokens)])
        generated = sum(session.decode([draw.randrange(vocab)]) for _ in range(args.generate_tokens))
        if turn >= args.warmup:
            prompt_seconds.append(prompt)
            generate_seconds.append(generated)
    return {
        "load_seconds": session.load_seconds,
        "prompt_seconds": prompt_seconds,
        "generate_seconds": generate_seconds,
        "weight_bytes": llama_cpp.llama_model_size(session.model),
        "versions": {
            "llama_cpp_python": metadata.version("llama_cpp_python"),
            "llama.cpp": llama_cpp.llama_print_system_info().decode().strip(),
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a GGUF file")
    for name in ("threads", "prompt-tokens", "generate-tokens", "warmup", "repeats", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(measure(parser.parse_args())))
