"""The configuration, written as a file and read by axolotl as `axolotl train` reads one."""

from __future__ import annotations

from pathlib import Path

import yaml
from axolotl.cli.config import load_cfg
from axolotl.utils.dict import DictDefault

from ...checkpoint import PROJECTIONS
from ...engine import NF4
from ...lora import Adapter
from ...training import TrainingConfig
from ..peft.device import Device

# Steps of a run, which no schedule here depends on: the rate is constant.
STEPS = 1_000_000
# LoRA as it is usual; the adapter that is attached brings its own.
RANK, ALPHA, DROPOUT = 16, 32, 0.1


class Configuration:
    """What stays the same from one adapter to the next. `scratch` takes the file, and axolotl's log."""

    def __init__(self, model: Path, quantization: str, device: Device, scratch: Path) -> None:
        self.device = device
        self.scratch = scratch
        is_nf4 = quantization == NF4
        self.fields = {
            "base_model": str(model),
            "load_in_4bit": is_nf4,
            "adapter": "qlora" if is_nf4 else "lora",
            "lora_target_modules": list(PROJECTIONS),
            "bf16": device.compute == "bf16",
            "fp16": False,
            "tf32": False,
            "attn_implementation": "sdpa",
            # It asks for a data set; batches come from the harness.
            "datasets": [{"path": str(scratch / "none.jsonl"), "type": "completion"}],
            "sequence_len": 512,
            "sample_packing": False,
            "pad_to_sequence_len": False,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "num_epochs": 1,
            "val_set_size": 0.0,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "output_dir": str(scratch / "output"),
        }
        if device.kind == "cpu":
            # They are written in Triton, which has no CPU. On a GPU axolotl turns them on by itself.
            names = ("mlp", "qkv", "o", "embedding")
            self.fields |= {f"lora_{name}_kernel": False for name in names}

    def base(self) -> DictDefault:
        """To load a base that adapters are attached to later."""
        return self._read(gradient_checkpointing=True, learning_rate=2e-4, **lora(RANK, ALPHA, DROPOUT))

    def adapted(self, adapter: Adapter, training: TrainingConfig) -> DictDefault:
        config = adapter.config
        return self._read(
            lora_model_dir=str(adapter.folder),
            **lora(config.r, config.lora_alpha, config.lora_dropout),
            gradient_checkpointing=training.gradient_checkpointing,
            learning_rate=training.learning_rate,
            adam_beta1=training.beta1,
            adam_beta2=training.beta2,
            adam_epsilon=training.epsilon,
            weight_decay=training.weight_decay,
            # 0 is off, as for transformers; left out it would be 1.
            max_grad_norm=training.max_grad_norm or 0.0,
        )

    def _read(self, **fields: object) -> DictDefault:
        path = self.scratch / "config.yaml"
        path.write_text(yaml.safe_dump(self.fields | fields), encoding="utf-8")
        return load_cfg(str(path))


def lora(r: int, alpha: float, dropout: float) -> dict[str, object]:
    # axolotl's alpha is a whole number. PEFT reads the adapter's own configuration, which has the exact one.
    return {"lora_r": r, "lora_alpha": max(1, round(alpha)), "lora_dropout": dropout}
