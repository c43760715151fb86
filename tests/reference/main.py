"""Makes every golden file: `main.py FOLDER`."""

from __future__ import annotations

import json
import os
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
import models
import nf4
import nf4_cases
import training


def main(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    # One order of summation; the rest of the arithmetic is f32 as torch does it on this CPU.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    make_nf4(folder / "nf4")
    for spec in models.SPECS:
        print(spec.name, flush=True)
        make_model(spec, folder / spec.name)


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
        curves[name] = training.as_json(settings, training.train(adapted, batches, settings))
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
        save_file(training.gradients(adapted, batches[0]), folder / f"{name}.safetensors")


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
    adapted = adapters.create(models.load(folder / "model"), spec)
    if spec is models.SPECS[0]:
        adapters.save(adapted, folder / "adapter_zero_b")
    adapters.randomize(adapted, spec)
    adapters.save(adapted, folder / "adapter")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
