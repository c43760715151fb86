"""What computing in bf16 or f16 costs: `precision.py GOLDEN` runs transformers and PEFT in these types
on the golden models, and prints how far they come from the golden f32 values.

The tolerances of `src/verify/tolerance.rs` for these types rest on it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import adapters
import data
import forward
import main
import masks
import torch
import training
from peft import PeftModel
from safetensors.torch import load_file

DTYPES = (torch.bfloat16, torch.float16)


def measure(golden: Path) -> None:
    main.settle_torch()
    for dtype in DTYPES:
        largest: dict[str, float] = defaultdict(float)
        for folder in sorted(path.parent for path in golden.glob("*/model")):
            for quantity, distance in Distances(folder, dtype).all():
                largest[quantity] = max(largest[quantity], distance)
        print(str(dtype).removeprefix("torch."))
        for quantity, distance in largest.items():
            print(f"  {quantity:<28} {distance:.1e}")


class Distances:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.batches = data.read_batches(folder / "batches.jsonl")

    def all(self):
        yield from self.logits()
        yield from self.losses()
        for quantization, name in (("none", "gradients"), ("nf4", "gradients_nf4")):
            found = training.gradients(self.attached(quantization), self.batches[:1])
            yield "gradients", self.gradients(name, found)
        for name, curve in self.json("curves.json").items():
            settings = training.CURVES[name]
            steps = training.train(self.attached(settings.quantization), self.batches, settings)
            yield from self.steps("curves", steps, curve["steps"])
        yield from self.dropout()

    def logits(self):
        expected = load_file(self.folder / "logits.safetensors")
        model = self.model("none")
        for number, prompt in enumerate(self.json("prompts.json")):
            golden = expected[f"prompt_{number}"]
            found = forward.logits(model, prompt).float()
            yield "logits", float((found - golden).abs().max() / golden.abs().max())

    def losses(self):
        for quantization, by_adapter in self.json("losses.json").items():
            for adapter, expected in by_adapter.items():
                model = self.model(quantization)
                if adapter != "base":
                    model = adapters.attach(model, self.folder / adapter)
                for loss, golden in zip(forward.evaluation_losses(model, self.batches), expected):
                    yield "losses", relative(loss, golden)

    def dropout(self):
        settings = training.DROPOUT
        adapted = self.attached("none")
        masks.install(adapted, settings.lora_dropout, settings.dropout_seed)
        found = training.gradients(adapted, [self.batches[line] for line in settings.lines(0)])
        yield "gradients", self.gradients("gradients_dropout", found)
        steps = training.train(adapted, self.batches, settings)
        yield from self.steps("curves", steps, self.json("dropout.json")["steps"])

    def gradients(self, name: str, found: dict[str, torch.Tensor]) -> float:
        expected = load_file(self.folder / f"{name}.safetensors")
        return max(float((found[key] - golden).norm() / golden.norm()) for key, golden in expected.items())

    def steps(self, quantity: str, steps: list[training.Step], expected: list[dict]):
        for step, golden in zip(steps, expected, strict=True):
            yield f"{quantity}: loss", relative(step.loss, golden["loss"])
            yield f"{quantity}: gradient norm", relative(step.grad_norm, golden["grad_norm"])

    def attached(self, quantization: str) -> PeftModel:
        return adapters.attach(self.model(quantization), self.folder / "adapter", training=True)

    def model(self, quantization: str) -> torch.nn.Module:
        return main.load(self.folder / "model", quantization).to(self.dtype)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


def relative(found: float, golden: float) -> float:
    return abs(found - golden) / abs(golden)


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
