"""Makes every golden file.

    main.py FOLDER         of the models in models.py, of NF4 and of a tokenizer
    main.py FOLDER SEED    of random other models
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

# No look-ups on a hub, and no compiler: bitsandbytes would have torch compile its decoding of odd shapes.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TORCHDYNAMO_DISABLE="1")

import torch
import transformers
from safetensors.torch import save_file

import adapters
import data
import forward
import masks
import models
import nf4
import nf4_cases
import tokenizer
import training


OTHER_MODELS = 3


def main(folder: Path) -> None:
    settle_torch()
    make_nf4(folder / "nf4")
    tokenizer.make(folder / "tokenizer")
    for spec in models.SPECS:
        print(spec.name, flush=True)
        make_model(spec, folder / spec.name)


def settle_torch() -> None:
    transformers.utils.logging.disable_progress_bar()
    # One order of summation; the rest of the arithmetic is f32 as torch does it on this CPU.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def make_others(folder: Path, seed: int) -> None:
    settle_torch()
    for number in range(OTHER_MODELS):
        for attempt in itertools.count():
            spec = models.random_spec(seed, number, attempt)
            try:
                make_model(spec, folder / spec.name)
            except models.Unsuitable as reason:
                print(f"{spec.name}: {reason}; another one", file=sys.stderr)
                shutil.rmtree(folder / spec.name)
            else:
                print(spec, flush=True)
                break


def make_nf4(folder: Path) -> None:
    folder.mkdir(parents=True)
    index = []
    for name, values in nf4_cases.cases(nf4.levels().numpy()).items():
        save_file(nf4.golden(values), folder / f"{name}.safetensors")
        dtype = str(values.dtype).removeprefix("torch.")
        index.append({"name": name, "shape": list(values.shape), "dtype": dtype})
    save_file({"levels": nf4.levels(), "dynamic_map": nf4.dynamic_map()}, folder / "maps.safetensors")
    write_json(folder / "cases.json", index)


def make_model(spec: models.ModelSpec, folder: Path) -> None:
    source = folder / "model"
    models.save(models.build(spec), spec, source)
    batches = data.batches(spec)
    data.write_batches(folder / "batches.jsonl", batches)
    make_forward(spec, folder)
    make_adapters(spec, folder)

    losses = {}
    for quantization in ("none", "nf4"):
        losses[quantization] = {"base": forward.evaluation_losses(load(source, quantization), batches)}
    curves = {}
    for name, settings in training.CURVES.items():
        adapted = adapters.attach(load(source, settings.quantization), folder / "adapter", training=True)
        steps = training.train(adapted, batches, settings)
        training.check_curve(settings, steps)
        nudged = adapters.attach(load(source, settings.quantization), folder / "adapter", training=True)
        adapters.nudge(nudged, spec)
        training.check_stable(steps, training.train(nudged, batches, settings))
        curves[name] = training.as_json(settings, steps)
        if name == "adamw":
            adapters.save(adapted, folder / "trained_adapter")
    for quantization, found in losses.items():
        for adapter in sorted(folder.glob("*adapter*")):
            adapted = adapters.attach(load(source, quantization), adapter)
            found[adapter.name] = forward.evaluation_losses(adapted, batches)
    write_json(folder / "losses.json", losses)
    write_json(folder / "curves.json", curves)
    for quantization, name in (("none", "gradients"), ("nf4", "gradients_nf4")):
        adapted = adapters.attach(load(source, quantization), folder / "adapter", training=True)
        save_file(training.gradients(adapted, batches[:1]), folder / f"{name}.safetensors")
    make_dropout(folder, batches)


def make_dropout(folder: Path, batches: list[data.Batch]) -> None:
    """Training with dropout in the adapters: the gradients of step 0, and some steps."""
    settings = training.DROPOUT
    adapted = adapters.attach(load(folder / "model", "none"), folder / "adapter", training=True)
    masks.install(adapted, settings.lora_dropout, settings.dropout_seed)
    first = [batches[line] for line in settings.lines(0)]
    save_file(training.gradients(adapted, first), folder / "gradients_dropout.safetensors")
    steps = training.train(adapted, batches, settings)
    write_json(folder / "dropout.json", training.as_json(settings, steps))


def load(source: Path, quantization: str) -> models.Qwen2ForCausalLM:
    model = models.load(source)
    return nf4.round_trip(model) if quantization == "nf4" else model


def make_forward(spec: models.ModelSpec, folder: Path) -> None:
    model = models.load(folder / "model")
    prompts = data.prompts(spec)
    logits = {f"prompt_{i}": forward.logits(model, prompt) for i, prompt in enumerate(prompts)}
    write_json(folder / "prompts.json", prompts)
    save_file(logits, folder / "logits.safetensors")
    write_json(folder / "greedy.json", [asdict(forward.greedy(model, prompt)) for prompt in prompts])


def make_adapters(spec: models.ModelSpec, folder: Path) -> None:
    adapted = adapters.create(models.load(folder / "model"), spec.seed, spec.lora_r, spec.lora_alpha)
    if spec is models.SPECS[0]:
        adapters.save(adapted, folder / "adapter_zero_b")
    adapters.randomize(adapted, spec)
    adapters.save(adapted, folder / "adapter")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder]:
            main(Path(folder))
        case [folder, seed]:
            make_others(Path(folder), int(seed))
        case _:
            sys.exit(__doc__)
