"""Measures loading and QLoRA training with transformers, peft and bitsandbytes, on the CPU or an NVIDIA GPU,
and prints one JSON line."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from importlib import metadata
from pathlib import Path

# No look-ups on a hub: bitsandbytes would ask one for kernels that this machine may not have.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import bitsandbytes
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORE_INDEX = -100


class Phases:
    """Largest resident size of each phase: the kernel's high-water mark, reset where one begins. On a GPU also
    what torch's allocator had in use, and had taken from the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self.device_peaks: dict[str, dict[str, int]] = {}
        # Whether the kernel does reset its mark; it may be built without.
        self.reset = True

    def end(self, name: str) -> None:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        self.peaks[name] = int(line.split()[1]) * 1024
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.reset = False
        if self.device == "cuda":
            self.device_peaks[name] = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
            torch.cuda.reset_peak_memory_stats()


def now(device: str) -> float:
    """The clock, once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def open_cuda() -> dict[str, object]:
    """Makes CUDA's context, so that no load pays for it, and makes sure that bitsandbytes computes there: without
    a library for this CUDA it falls back without a word."""
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device")
    library = bitsandbytes.cextension.lib
    if not library.compiled_with_cuda:
        reason = vars(library).get("error_msg", "it took its library for the CPU")
        raise SystemExit(f"bitsandbytes has no library for CUDA {torch.version.cuda}: {reason}")
    values = torch.randn(64, 64, device="cuda")
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4")
    error = float((bitsandbytes.functional.dequantize_4bit(packed, state) - values).abs().max())
    # Half of the widest gap between two of NF4's values is 0.152 of a block's largest.
    if not error < 0.16 * float(values.abs().max()):
        raise SystemExit(f"bitsandbytes computes wrong on this GPU: NF4 is off by {error}")
    capability = torch.cuda.get_device_capability(0)
    return {
        "name": torch.cuda.get_device_name(0),
        "capability": ".".join(map(str, capability)),
        "torch_cuda": torch.version.cuda,
    }


def load(folder: str, compute: torch.dtype, device: str) -> tuple[PreTrainedModel, float]:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    place = "cuda:0" if device == "cuda" else device
    begin = now(device)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=compute, device_map={"": place}
    )
    seconds = now(device) - begin
    quantized = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    expected = len(PROJECTIONS) * model.config.num_hidden_layers
    if len(quantized) != expected or any(m.weight.quant_state is None for m in quantized):
        raise SystemExit(f"{len(quantized)} projections are quantized, expected {expected}")
    places = {parameter.device.type for parameter in model.parameters()}
    if places != {device}:
        raise SystemExit(f"the model lies on {', '.join(sorted(places))}, expected {device}")
    return model, seconds


def attach(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    checkpointing = {"use_reentrant": False}
    if args.prepare:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing
        )
    else:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora).train()


def train(model: PeftModel, args: argparse.Namespace) -> list[dict[str, object]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    steps: list[dict[str, object]] = []
    passes = count_passes(model)
    for number in range(args.warmup + args.steps):
        ids = torch.randint(model.config.vocab_size, (1, args.sequence)).to(args.device)
        labels = ids.clone()
        labels[:, : args.sequence - args.trained_tokens] = IGNORE_INDEX
        begin = now(args.device)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = now(args.device) - begin
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SystemExit(f"the loss of step {number} is {value}")
        steps.append({"warmup": number < args.warmup, "seconds": seconds, "loss": value})
    if len(passes) != 2 * len(steps):
        raise SystemExit(f"{len(passes)} passes through a layer in {len(steps)} steps: no checkpointing")
    return steps


def count_passes(model: PeftModel) -> list[None]:
    """A list that grows with each pass through the first layer's norm: checkpointing makes two a step."""
    passes: list[None] = []
    norm = next(m for name, m in model.named_modules() if name.endswith("layers.0.input_layernorm"))
    norm.register_forward_hook(lambda *_: passes.append(None))
    return passes


def measure(args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    phases = Phases(args.device)
    gpu = open_cuda() if args.device == "cuda" else None
    phases.end("import")
    model, load_seconds = load(args.model, getattr(torch, args.dtype), args.device)
    phases.end("load")
    result: dict[str, object] = {"load_seconds": load_seconds}
    if args.job == "train":
        adapted = attach(model, args)
        result["steps"] = train(adapted, args)
        phases.end("train")
    result["peak_bytes"] = phases.peaks
    result["peaks_are_of_phases"] = phases.reset
    if gpu is not None:
        result["gpu"] = gpu
        result["device_peak_bytes"] = phases.device_peaks
    result["versions"] = {name: version(name) for name in PACKAGES}
    return result


def version(package: str) -> str:
    """An environment of the caller's may hold a package that was only unpacked."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("load", "train"))
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--prepare", action="store_true", help="by peft's prepare_model_for_kbit_training")
    for name in ("threads", "seed", "sequence", "trained-tokens", "warmup", "steps", "lora-r", "lora-alpha"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning-rate", "weight-decay"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    print(json.dumps(measure(parse())))
