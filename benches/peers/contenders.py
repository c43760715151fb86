"""Who is compared: how each is started for a job, and how its answer reads."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from process import Finished
from samples import Samples, Wrong
from settings import Settings
from work import Shapes

WORKERS = Path(__file__).parent / "workers"


class Contender(ABC):
    name: str
    jobs: tuple[str, ...]
    is_evalfw = False

    @abstractmethod
    def command(self, job: str) -> list[str]: ...

    @abstractmethod
    def read(self, job: str, finished: Finished) -> Samples:
        """Raises `Wrong`, or what parsing raises, where the answer is not as expected."""


@dataclass
class Evalfw(Contender):
    """One engine of evalfw, through `evalfw run`."""

    name: str
    settings: Settings
    shapes: Shapes
    binary: str
    checkpoint: Path
    scenarios: Path
    scratch: Path
    is_evalfw = True
    jobs = ("load", "train", "infer")

    def command(self, job: str) -> list[str]:
        # Said in the command, so that it stands in the record.
        limit = os.environ.get("EVALFW_SIMD")
        return [
            *(("env", f"EVALFW_SIMD={limit}") if limit else ()),
            *(self.binary, "run", "--engine", self.name, "--scenarios", str(self.scenarios)),
            *("--suite", job, "--model", str(self.checkpoint), "--threads", str(self.settings.threads)),
            *("--out", str(self.scratch / "runs"), "--json"),
        ]

    def read(self, job: str, finished: Finished) -> Samples:
        # It ends with 1 where the cell failed, and the record then says why.
        [record] = json.loads(finished.stdout)
        if record["outcome"] != "ok":
            raise Wrong(f"{record['outcome']}: {(record['error'] or {}).get('message')}")
        taken = record["samples"]
        steps = [step for step in taken["train"] if not step["warmup"]]
        for step in steps:
            work = (step["slot_tokens"], step["real_tokens"], step["trained_tokens"])
            expected = (self.settings.sequence, self.settings.sequence, self.settings.trained_tokens)
            if work != expected:
                raise Wrong(f"slots, real and trained tokens of a step are {work}, expected {expected}")
        load = taken.get("load")
        if job == "load" and not load:
            raise Wrong("no load in the record")
        phases = {phase["name"]: phase["peak_bytes"] for phase in taken["phases"]}
        taken = {key: value for key, value in taken.items() if key not in ("memory", "probes")}
        return Samples(
            detail={**record, "samples": taken},
            versions={
                "evalfw": f"{record['environment']['evalfw_version']} {record['environment']['commit'] or ''}",
                record["framework"]: record["framework_version"],
            },
            peak_bytes=record["peak_memory_bytes"],
            train_peak_bytes=phases.get("train"),
            load_seconds=[load["total_seconds"]] if load else [],
            step_seconds=[step["seconds"] for step in steps],
            losses=[step["loss"] for step in taken["train"]],
            prompt_seconds=[p["seconds"] for p in taken["prefill"] if not p["warmup"]],
            generate_seconds=[sum(d["seconds"]) for d in taken["decode"] if not d["warmup"]],
            weight_bytes=self.shapes.nf4_weight_bytes() if job == "infer" else None,
        )


@dataclass
class Peft(Contender):
    """transformers, peft and bitsandbytes: NF4 with double quantization, gradient checkpointing."""

    name: str
    dtype: str
    # By peft's prepare_model_for_kbit_training, as its guide to QLoRA says. It turns everything that is not
    # 4-bit into f32, the embedding too.
    prepare: bool
    settings: Settings
    python: str
    checkpoint: Path
    jobs = ("load", "train")

    def command(self, job: str) -> list[str]:
        s = self.settings
        return [
            *(self.python, str(WORKERS / "qlora_peft.py"), job),
            *("--model", str(self.checkpoint), "--dtype", self.dtype, "--device", s.device),
            *(["--prepare"] if self.prepare else []),
            *("--threads", str(s.threads), "--seed", str(s.seed)),
            *("--sequence", str(s.sequence), "--trained-tokens", str(s.trained_tokens)),
            *("--warmup", str(s.warmup), "--steps", str(s.steps)),
            *("--lora-r", str(s.lora_r), "--lora-alpha", str(s.lora_alpha)),
            *("--learning-rate", str(s.learning_rate), "--weight-decay", str(s.weight_decay)),
        ]

    def read(self, job: str, finished: Finished) -> Samples:
        answer = last_line(finished)
        steps = answer.get("steps", [])
        peaks = answer["peak_bytes"]
        return Samples(
            detail=answer,
            versions=answer["versions"],
            # The phases are exact; from outside children count, too.
            peak_bytes=max(*peaks.values(), finished.tree_peak_bytes),
            # Where the kernel cannot begin a mark anew, it is not of the steps alone.
            train_peak_bytes=peaks.get("train") if answer["peaks_are_of_phases"] else None,
            load_seconds=[answer["load_seconds"]],
            step_seconds=[step["seconds"] for step in steps if not step["warmup"]],
            losses=[step["loss"] for step in steps],
        )


# Name: compute type, and whether prepare_model_for_kbit_training is used.
PEFT_VARIANTS = {
    "peft-bf16": ("bfloat16", False),
    "peft-bf16-kbit": ("bfloat16", True),
    "peft-f32": ("float32", False),
}


@dataclass
class LlamaCpp(Contender):
    """llama.cpp with Q4_0, through its C interface."""

    settings: Settings
    python: str
    gguf: Path
    name = "llama.cpp"
    jobs = ("infer",)

    def command(self, job: str) -> list[str]:
        s = self.settings
        return [
            *(self.python, str(WORKERS / "infer_llama.py"), "--model", str(self.gguf)),
            *("--threads", str(s.threads), "--seed", str(s.seed)),
            *("--prompt-tokens", str(s.prompt_tokens), "--generate-tokens", str(s.generate_tokens)),
            *("--warmup", str(s.warmup), "--repeats", str(s.repeats)),
        ]

    def read(self, job: str, finished: Finished) -> Samples:
        answer = last_line(finished)
        return Samples(
            detail=answer,
            versions=answer["versions"],
            peak_bytes=finished.tree_peak_bytes,
            prompt_seconds=answer["prompt_seconds"],
            generate_seconds=answer["generate_seconds"],
            weight_bytes=answer["weight_bytes"],
        )


def last_line(finished: Finished) -> dict:
    """Libraries may write to standard output, too; the answer is the last line."""
    if finished.error:
        raise Wrong(finished.error)
    lines = finished.stdout.splitlines()
    if not lines:
        raise Wrong("no answer")
    return json.loads(lines[-1])
