"""Gradients of the first step, and training curves by torch's own AdamW."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from peft import PeftModel

import adapters
import masks
from data import Batch
from models import Unsuitable

STEPS = 20
# What a change of the adapter by the size of f32 noise may do to a loss or a gradient norm.
LARGEST_DRIFT = 4e-4


@dataclass(frozen=True)
class Settings:
    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    quantization: str = "none"
    batches_in_turn: int = 4  # steps go round the first so many batches
    lora_dropout: float = 0.0
    dropout_seed: int = 0
    steps: int = STEPS

    def lines(self, step: int) -> list[int]:
        """The lines of batches.jsonl that are the micro-batches of a step."""
        first = step * self.gradient_accumulation_steps
        return [(first + i) % self.batches_in_turn for i in range(self.gradient_accumulation_steps)]


CURVES = {
    "adamw": Settings(weight_decay=0.1),
    "accumulation": Settings(
        betas=(0.9, 0.95),
        eps=1e-6,
        weight_decay=0.0,
        gradient_accumulation_steps=2,
        batches_in_turn=8,
    ),
    "clipping": Settings(max_grad_norm=0.5),
    "nf4": Settings(quantization="nf4"),
}
# Each step has two micro-batches, each with masks of its own.
DROPOUT = Settings(
    gradient_accumulation_steps=2,
    batches_in_turn=8,
    lora_dropout=0.25,
    dropout_seed=0x5EED_0000_0007,
    steps=3,
)


@dataclass(frozen=True)
class Step:
    lines: list[int]
    loss: float
    grad_norm: float


def backward(adapted: PeftModel, micro_batches: list[Batch], step: int) -> float:
    """Adds up the gradients of one step and returns its loss: the mean over the supervised positions
    of all micro-batches together, by transformers' `num_items_in_batch`."""
    items = torch.tensor(sum(batch.trained_tokens() for batch in micro_batches))
    total = 0.0
    for number, batch in enumerate(micro_batches):
        masks.turn_to(adapted, step, number)
        loss = adapted(**batch.inputs(), num_items_in_batch=items).loss
        loss.backward()
        total += float(loss.detach())
    return total


def gradients(adapted: PeftModel, micro_batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Gradients of step 0 under the names of the adapter's tensors."""
    adapted.zero_grad()
    backward(adapted, micro_batches, step=0)
    result = {name: p.grad.clone() for name, p in adapters.trainable(adapted).items()}
    assert all(bool((g != 0).any()) for g in result.values()), "a tensor without a gradient"
    adapted.zero_grad()
    return result


def train(adapted: PeftModel, batches: list[Batch], settings: Settings) -> list[Step]:
    parameters = list(adapters.trainable(adapted).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )
    limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
    steps = []
    for step in range(settings.steps):
        lines = settings.lines(step)
        loss = backward(adapted, [batches[line] for line in lines], step)
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        steps.append(Step(lines, loss, float(norm)))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def check_curve(settings: Settings, steps: list[Step]) -> None:
    """A curve that does not fall, or a limit that limits nothing, would test nothing."""
    turn = settings.batches_in_turn // settings.gradient_accumulation_steps
    first = sum(s.loss for s in steps[:turn]) / turn
    last = sum(s.loss for s in steps[-turn:]) / turn
    if not last < 0.9 * first:
        raise Unsuitable(f"the loss only falls from {first} to {last}")
    if settings.max_grad_norm is not None and any(s.grad_norm <= settings.max_grad_norm for s in steps[:turn]):
        raise Unsuitable("there is nothing to clip")


def check_stable(steps: list[Step], nudged: list[Step]) -> None:
    """Rounding in another order must not become another path: no engine could follow it."""
    for number, (step, other) in enumerate(zip(steps, nudged, strict=True)):
        for value, moved in ((step.loss, other.loss), (step.grad_norm, other.grad_norm)):
            if not abs(moved - value) < LARGEST_DRIFT * abs(value):
                raise Unsuitable(f"rounding turns {value} into {moved} in step {number}")


def as_json(settings: Settings, steps: list[Step]) -> dict[str, object]:
    described = asdict(settings)
    del described["batches_in_turn"], described["steps"]
    return {"settings": described, "steps": [asdict(step) for step in steps]}
