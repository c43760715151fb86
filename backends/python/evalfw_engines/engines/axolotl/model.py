"""Adapters and training steps, by axolotl's trainer; all else is the `peft` engine's.

A step is what transformers' trainer, which axolotl's is one of, does with one: it counts the supervised positions of
the micro-batches, calls `training_step` for each, clips, and steps. The batches come from the harness and not from a
data set, which is why it is driven from here. Nothing is logged and saved in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from axolotl.loaders import load_adapter
from axolotl.loaders.patch_manager import PatchManager
from axolotl.utils.trainer import setup_trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ...batches import Batch
from ...engine import Tensors
from ...lora import Adapter
from ...training import TrainingConfig
from ..peft.device import Device
from ..peft.model import SPREAD, Mode, PeftModelOnDevice, as_array
from .config import STEPS, Configuration

if TYPE_CHECKING:
    from axolotl.core.trainers import AxolotlTrainer
    from axolotl.utils.dict import DictDefault


class AxolotlModel(PeftModelOnDevice):
    def __init__(
        self,
        base: PreTrainedModel,
        device: Device,
        configuration: Configuration,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        super().__init__(base, device)
        self.configuration = configuration
        self.tokenizer = tokenizer
        self.trainer: AxolotlTrainer | None = None

    def attach_adapter(self, adapter: Adapter, training: TrainingConfig) -> None:
        self.detach()
        cfg = self.configuration.adapted(adapter, training)
        self.base.gradient_checkpointing_disable()
        if training.gradient_checkpointing:
            self.base.gradient_checkpointing_enable(cfg.gradient_checkpointing_kwargs)
        self.model, _ = load_adapter(self.base, cfg, cfg.adapter)
        PatchManager(cfg, self.base.config).apply_post_model_load_patches(self.model)
        self.parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.trainer = self.prepared(cfg)

    def prepared(self, cfg: DictDefault) -> AxolotlTrainer:
        """A trainer as it is when its loop begins."""
        trainer = setup_trainer(cfg, None, None, self.model, self.tokenizer, None, STEPS)
        # axolotl 0.19 averages the means of the micro-batches, as it takes Qwen2 for a model that cannot divide by
        # the positions of all of them. It can, and that is what is asked for; with one micro-batch it is the same.
        trainer.model_accepts_loss_kwargs = True
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.create_scheduler(STEPS)
        return trainer

    def detach(self) -> None:
        if self.trainer is not None:
            self.trainer.accelerator.free_memory()
            self.trainer = None
        super().detach()

    def train_step(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        trainer = self.trainer
        loss = self.backward(step, dropout_seed, micro_batches)
        norm = self.clip(trainer.args.max_grad_norm or float("inf"))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model_wrapped.zero_grad()
        return float(loss), float(norm)

    def gradients(
        self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]
    ) -> tuple[float, float, Tensors]:
        loss = self.backward(step, dropout_seed, micro_batches)
        norm = self.clip(float("inf"))
        # A factor that nothing reached has no gradient at all.
        gradients = {
            name: as_array(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in self.parameters.items()
        }
        self.trainer.model_wrapped.zero_grad()
        return float(loss), float(norm), gradients

    def clip(self, limit: float) -> torch.Tensor:
        """The norm before clipping, as the trainer asks for it."""
        trainer = self.trainer
        return trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), limit)

    def backward(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> torch.Tensor:
        trainer = self.trainer
        self.enter(Mode.TRAINING)
        # What a step that failed may have left.
        trainer.model_wrapped.zero_grad()
        torch.manual_seed((dropout_seed ^ step * SPREAD) % 2**63)
        batches = (collated(batch) for batch in micro_batches)
        inputs, items = trainer.get_batch_samples(batches, len(micro_batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(inputs)
        total = torch.zeros((), device=self.device.torch)
        for one in inputs:
            total += trainer.training_step(trainer.model_wrapped, one, items)
        return total


def collated(batch: Batch) -> dict[str, torch.Tensor]:
    """What axolotl's collator makes of a batch."""
    return {
        "input_ids": torch.tensor(batch.input_ids),
        "labels": torch.tensor(batch.labels),
        "attention_mask": torch.tensor(batch.attention_mask()),
    }
