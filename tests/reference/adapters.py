"""LoRA adapters, made and written by PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

from models import ModelSpec

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def create(model: Qwen2ForCausalLM, seed: int, r: int, alpha: int) -> PeftModel:
    """An adapter as PEFT initialises it: B is zero."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def randomize(adapted: PeftModel, spec: ModelSpec) -> None:
    """Makes A and B random: with B zero the gradient of A would be zero as well."""
    rng = spec.rng("adapter")
    with torch.no_grad():
        for name, parameter in trainable(adapted).items():
            deviation = 0.05 if "lora_B" in name else parameter.shape[1] ** -0.5
            values = deviation * rng.standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))


def nudge(adapted: PeftModel, spec: ModelSpec) -> None:
    """Moves every value by about one part in a million, as rounding does."""
    rng = spec.rng("nudge")
    with torch.no_grad():
        for parameter in trainable(adapted).values():
            parameter.mul_(torch.from_numpy(1 + 1e-6 * rng.standard_normal(tuple(parameter.shape))))


def trainable(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under their names in adapter_model.safetensors."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def save(adapted: PeftModel, folder: Path) -> None:
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def attach(model: Qwen2ForCausalLM, folder: Path, *, training: bool = False) -> PeftModel:
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=training)
    return adapted.train(training)
