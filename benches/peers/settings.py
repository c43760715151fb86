"""What is measured, the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass

JOBS = ("load", "train", "infer")

# The jobs that have peers there.
DEVICE_JOBS = {"cpu": JOBS, "cuda": ("load", "train")}


@dataclass(frozen=True)
class Settings:
    model: str
    sequence: int
    rounds: int
    threads: int
    steps: int
    repeats: int
    prompt_tokens: int
    generate_tokens: int
    jobs: tuple[str, ...] = JOBS
    device: str = "cpu"
    warmup: int = 1
    lora_r: int = 16
    lora_alpha: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    # Activations that evalfw's checkpointing keeps instead of computing them again; peft keeps none.
    kept_activations_gb: float = 0.0
    seed: int = 42
    timeout_seconds: int = 3600

    @property
    def trained_tokens(self) -> int:
        """Positions with a loss. Without a tokenizer evalfw trains on full rows of random ids, with
        labels on the second half."""
        return self.sequence // 2
