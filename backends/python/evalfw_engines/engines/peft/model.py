"""A loaded model: training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...batches import Batch, trained_tokens
from ...engine import Model, Tensors
from ...errors import Protocol
from ...lora import Adapter
from ...training import TrainingConfig
from .device import Device
from .packing import Packing

# Spreads steps over the seeds of torch's generator: the golden ratio of 64 bits.
SPREAD = 0x9E3779B97F4A7C15


class Mode(Enum):
    TRAINING = "dropout, and checkpointing where it is asked for"
    EVALUATION = "neither, with the weights that are trained on"
    GENERATION = "neither, with the weights in the order that suits it"


class PeftModelOnDevice(Model):
    def __init__(self, base: PreTrainedModel, device: Device) -> None:
        self.base = base
        # The base, or the base with an adapter.
        self.model: PreTrainedModel | PeftModel = base
        self.device = device
        self.packing = Packing(base, device.dtype, device.kind)
        # `None`: not known, as modules came or went.
        self.mode: Mode | None = None
        # The adapter's, by their names in its file.
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.checkpointing = False
        self.optimizer: torch.optim.AdamW | None = None
        self.max_grad_norm: float | None = None
        self.cache: Cache | None = None

    def attach_adapter(self, adapter: Adapter, training: TrainingConfig) -> None:
        self.detach()
        self.checkpointing = training.gradient_checkpointing
        if self.checkpointing:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.base.enable_input_require_grads()
        self.model = PeftModel.from_pretrained(
            self.base, str(adapter.folder), is_trainable=True, torch_device=str(self.device.torch)
        )
        self.parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            weight_decay=training.weight_decay,
        )
        self.max_grad_norm = training.max_grad_norm

    def detach(self) -> None:
        # PEFT reads the weights in passing, which brings them back with other scales.
        self.packing.keep()
        self.optimizer = self.cache = self.mode = None
        self.parameters = {}
        if isinstance(self.model, PeftModel):
            self.base = self.model.unload()
            self.model = self.base
        if self.checkpointing:
            self.base.gradient_checkpointing_disable()
            self.base.disable_input_require_grads()
            self.checkpointing = False

    def train_step(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        loss = self.backward(step, dropout_seed, micro_batches)
        if self.max_grad_norm is None:
            norm = torch.nn.utils.get_total_norm(self.found_gradients())
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)

    def gradients(
        self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]
    ) -> tuple[float, float, Tensors]:
        loss = self.backward(step, dropout_seed, micro_batches)
        norm = torch.nn.utils.get_total_norm(self.found_gradients())
        # A factor that nothing reached has no gradient at all.
        gradients = {
            name: as_array(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in self.parameters.items()
        }
        self.optimizer.zero_grad()
        return float(loss), float(norm), gradients

    def found_gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def backward(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Adds up the gradients of a step. Returns its loss: the mean over the supervised positions of all
        micro-batches together, by transformers' `num_items_in_batch`."""
        self.enter(Mode.TRAINING)
        # What a step that failed may have left.
        self.optimizer.zero_grad()
        torch.manual_seed((dropout_seed ^ step * SPREAD) % 2**63)
        items = trained_tokens(micro_batches)
        total = torch.zeros((), device=self.device.torch)
        for batch in micro_batches:
            loss = self.loss(batch, items)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        self.enter(Mode.EVALUATION)
        total = 0.0
        for batch in batches:
            tokens = batch.trained_tokens()
            if tokens:
                total += float(self.loss(batch, tokens)) * tokens
        return total, trained_tokens(batches)

    def loss(self, batch: Batch, items: int) -> torch.Tensor:
        inputs = {"input_ids": batch.input_ids, "labels": batch.labels}
        # As collators do it; a mask of ones changes nothing.
        if any(length < batch.slots for length in batch.lengths):
            inputs["attention_mask"] = batch.attention_mask()
        tensors = {name: torch.tensor(rows, device=self.device.torch) for name, rows in inputs.items()}
        return self.model(**tensors, num_items_in_batch=items, use_cache=False).loss

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> int:
        self.enter(Mode.GENERATION)
        self.cache = None
        return self.next(tokens)

    @torch.no_grad()
    def decode(self, token: int) -> int:
        if self.cache is None:
            raise Protocol("decode continues a prefill, and an adapter was attached since")
        self.enter(Mode.GENERATION)
        return self.next([token])

    def next(self, tokens: Sequence[int]) -> int:
        """The most likely token after these, which are appended to the cache; as `generate` asks for it."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.device.torch),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> numpy.ndarray:
        self.enter(Mode.EVALUATION)
        output = self.model(input_ids=torch.tensor([tokens], device=self.device.torch), use_cache=False)
        return as_array(output.logits[0])

    def adapter(self) -> Tensors:
        return {name: as_array(parameter) for name, parameter in self.parameters.items()}

    def enter(self, mode: Mode) -> None:
        """A walk over all modules, so only where the mode changes."""
        if mode is self.mode:
            return
        self.model.train(mode is Mode.TRAINING)
        if mode is Mode.GENERATION:
            self.packing.for_generation()
        else:
            self.packing.keep()
        self.mode = mode

    def synchronize(self) -> None:
        self.device.synchronize()

    def memory(self) -> dict[str, int | None]:
        return self.device.memory()


def as_array(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.detach().float().cpu().numpy()
