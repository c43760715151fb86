"""The scenario files for `evalfw run`: a suite with one cell for each job."""

from __future__ import annotations

from pathlib import Path

from settings import JOBS, Settings


def write(folder: Path, settings: Settings) -> None:
    common = {"quantization": "nf4", "timeout_seconds": settings.timeout_seconds}
    parameters: dict[str, dict[str, object]] = {
        "load": {},
        "train": {
            "sequence_length": settings.sequence,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "packing": True,
            "warmup_steps": settings.warmup,
            "steps": settings.steps,
            "evaluation_batches": 0,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": 0.0,
            "gradient_checkpointing": True,
            "kept_activations_gb": settings.kept_activations_gb,
            "lora_r": settings.lora_r,
            "lora_alpha": float(settings.lora_alpha),
            "lora_dropout": 0.0,
        },
        "infer": {
            "prompt_tokens": settings.prompt_tokens,
            "generate_tokens": settings.generate_tokens,
            "warmup": settings.warmup,
            "repeats": settings.repeats,
        },
    }
    (folder / "suites").mkdir(parents=True)
    for job in JOBS:
        (folder / f"{job}.toml").write_text(toml({"kind": job, **common, **parameters[job]}))
        suite = {"description": job, "model": "tiny", "software_adapter_model": "tiny", "seed": settings.seed}
        cell = {"scenario": job, "repetitions": 1}
        (folder / "suites" / f"{job}.toml").write_text(f"{toml(suite)}\n[[cells]]\n{toml(cell)}")


def toml(table: dict[str, object]) -> str:
    return "".join(f"{key} = {value(entry)}\n" for key, entry in table.items())


def value(entry: object) -> str:
    if isinstance(entry, bool):
        return str(entry).lower()
    return f'"{entry}"' if isinstance(entry, str) else str(entry)
