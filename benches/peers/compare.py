"""Measures evalfw beside the tools that people use today, and writes results/peers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import machine
import plan
import prepare
import process
import report
import scenarios
from contenders import PEFT_VARIANTS, Contender, Evalfw, LlamaCpp, Peft
from figures import Results
from gpu import Nvml
from prepare import Places, Unprepared
from samples import Measurement, Wrong
from settings import DEVICE_JOBS, JOBS, Settings
from work import Shapes


# What differs where --device does. A GPU needs more steps: they are short, and the first ones find kernels.
DEFAULTS: dict[str, dict] = {
    "cpu": {"engine": ("candle-cpu",), "warmup": 1, "steps": 3, "timeout": 3600, "kept_activations_gb": 0.35},
    "cuda": {
        "engine": ("candle-cuda", "candle-cuda-bf16"),
        "warmup": 5,
        "steps": 20,
        "timeout": 900,
        "kept_activations_gb": 0.0,
    },
}


class Comparison:
    """One run, kept in a folder of its own and written again after each measurement."""

    def __init__(
        self, settings: Settings, engines: tuple[str, ...], places: Places, out: Path, gpu: Nvml | None = None
    ) -> None:
        self.settings = settings
        self.gpu = gpu
        self.engines = engines
        self.places = places
        self.shapes: Shapes | None = None
        self.measurements: list[Measurement] = []
        started = datetime.now(UTC)
        self.run: dict = {
            "started_at": started.isoformat(timespec="seconds"),
            "settings": asdict(settings),
            "machine": machine.describe(gpu),
            "limits": [],
        }
        device = "-cuda" if gpu else ""
        self.folder = out / f"{started:%Y%m%d-%H%M%S}-{settings.model}-s{settings.sequence}{device}"
        self.folder.mkdir(parents=True)

    def measure_all(self, contenders: list[Contender], limits_python: str | None) -> None:
        self.take_limits(limits_python)
        for job, number, contender in plan.interleaved(contenders, self.settings):
            say(f"{job}, round {number}: {contender.name}")
            before = self.read_rate(job, limits_python)
            measurement = self.measure(job, number, contender)
            measurement.read_rates = [*before, *self.read_rate(job, limits_python)]
            say(f"  {measurement.error or 'ok'}, {measurement.wall_seconds:.1f} s")
            self.measurements.append(measurement)
            self.write()
        self.take_limits(limits_python)
        self.write()

    def take_limits(self, python: str | None) -> None:
        if python is not None:
            say("the machine's limits")
            self.run["limits"].append(machine.limits(python, self.settings.threads, self.gpu))

    def read_rate(self, job: str, python: str | None) -> list[float]:
        """For inference, which reads every weight for each token."""
        if job != "infer" or python is None or self.gpu:
            return []
        rate = machine.read_rate(python, self.settings.threads)
        return [] if rate is None else [rate]

    def measure(self, job: str, number: int, contender: Contender) -> Measurement:
        command = contender.command(job)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        shown = self.places.display(" ".join(command))
        result = Measurement(contender.name, job, number, shown, started)
        environment = {} if contender.is_evalfw else {"OMP_NUM_THREADS": str(self.settings.threads)}
        if self.gpu:
            environment |= self.gpu.environment()
        try:
            finished = process.run(command, environment, self.settings.timeout_seconds, self.gpu)
        except OSError as error:
            result.error = self.places.display(str(error))
            return result
        result.wall_seconds = finished.wall_seconds
        result.foreign_cpu_share = finished.foreign_cpu_share
        result.device_before_bytes = finished.device_before_bytes
        try:
            if finished.timed_out:
                raise Wrong("out of time")
            result.samples = contender.read(job, finished)
            result.samples.device_peak_bytes = finished.device_peak_bytes
        except (Wrong, ValueError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, Wrong) else finished.error or repr(error)
            result.stderr_tail = [self.places.display(line) for line in finished.stderr_tail]
            result.error = ": ".join([reason, *result.stderr_tail[-1:]])
        return result

    def unprepared(self, name: str, jobs: tuple[str, ...], error: Unprepared) -> None:
        """What could not be installed or made is in the record as well."""
        say(f"{name}: {error}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        reason = self.places.display(str(error))
        self.measurements += [
            Measurement(name, job, 0, "not started", now, error=reason)
            for job in jobs
            if job in self.settings.jobs
        ]

    def write(self) -> None:
        record = {**self.run, "measurements": [asdict(m) for m in self.measurements]}
        text = self.places.display(json.dumps(record, indent=1)) + "\n"
        replace(self.folder / "samples.json", text)
        replace(self.folder / "report.md", self.render())

    def render(self) -> str:
        results = Results(self.measurements, self.settings)
        return report.render(self.run, results, self.shapes, self.engines)


def with_names(places: Places, args: argparse.Namespace, python: Path | None) -> Places:
    """With names for what the caller named by a path, which belongs to this machine."""
    given = {Path(args.out).absolute(): "results/peers"}
    if args.evalfw:
        given[Path(args.evalfw).absolute()] = "evalfw"
    if args.checkpoint:
        given[Path(args.checkpoint).absolute()] = "$CHECKPOINT"
    if python:
        given[python] = "python"
        if (python.parents[1] / "pyvenv.cfg").is_file():
            given[python.parents[1]] = "$VENV"
    for name in ("EVALFW_LLAMA_VENV", "EVALFW_REFERENCE_VENV"):
        if venv := os.environ.get(name):
            given[Path(venv)] = f"${name}"
    return dataclasses.replace(places, given=given)


def replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def compare(args: argparse.Namespace, places: Places) -> Comparison:
    """Raises `Unprepared` where evalfw itself or the model is missing."""
    settings = Settings(
        model=args.model,
        sequence=args.sequence,
        rounds=args.rounds,
        threads=args.threads,
        steps=args.steps,
        kept_activations_gb=args.kept_activations_gb,
        repeats=args.repeats,
        prompt_tokens=args.prompt_tokens,
        generate_tokens=args.generate_tokens,
        jobs=tuple(job for job in JOBS if job in args.only),
        device=args.device,
        warmup=DEFAULTS[args.device]["warmup"],
        timeout_seconds=args.timeout,
    )
    gpu = Nvml.open() if args.device == "cuda" else None
    python = prepare.interpreter(args.python) if args.python else None
    binary = str(Path(args.evalfw).absolute()) if args.evalfw else prepare.evalfw(args.device)
    if args.checkpoint:
        checkpoint = prepare.own_checkpoint(Path(args.checkpoint).absolute(), places.scratch)
    else:
        checkpoint = prepare.checkpoint(binary, settings.model, places.cache)
    places = with_names(places, args, python)
    comparison = Comparison(settings, args.engine, places, Path(args.out).absolute(), gpu)
    # Kept, so that its commands can be run again.
    suites = comparison.folder / "scenarios"
    scenarios.write(suites, settings)
    comparison.shapes = Shapes.read(checkpoint)

    def or_none(name: str, jobs: tuple[str, ...], make: Callable[[], str]) -> str | None:
        try:
            return make()
        except Unprepared as error:
            comparison.unprepared(name, jobs, error)
            return None

    files = sorted(checkpoint.glob("*.safetensors"))
    contenders: list[Contender] = [
        Evalfw(engine, settings, comparison.shapes, binary, checkpoint, suites, places.scratch)
        for engine in args.engine
    ]
    torch_python = str(python) if python else or_none("peft", Peft.jobs, prepare.reference_python)
    if torch_python is not None:
        for name in args.peft or usual_peft(args.device):
            dtype, kbit = PEFT_VARIANTS[name]
            contenders.append(Peft(name, dtype, kbit, settings, torch_python, checkpoint))
    if "infer" in settings.jobs:
        llama_python = or_none(LlamaCpp.name, LlamaCpp.jobs, prepare.llama_python)
        gguf = llama_python and or_none(
            LlamaCpp.name, LlamaCpp.jobs, lambda: str(prepare.gguf(llama_python, checkpoint))
        )
        if llama_python and gguf:
            contenders.append(LlamaCpp(settings, llama_python, Path(gguf)))
            files.append(Path(gguf))
    prepare.warm_page_cache(files)
    comparison.measure_all(contenders, torch_python)
    return comparison


def usual_peft(device: str) -> tuple[str, ...]:
    """In bf16 where the device multiplies it: a CPU that does not takes minutes for a step, and seconds in f32."""
    return ("peft-bf16",) if device == "cuda" or machine.multiplies_bf16() else ("peft-f32",)


def names(known: tuple[str, ...] | None = None) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part for part in text.split(",") if part))
        unknown = [name for name in found if known is not None and name not in known]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known or ())}")
        return found

    return parse


def count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number over 0")
    return int(text)


def gigabytes(text: str) -> float:
    amount = float(text)
    if not (math.isfinite(amount) and amount >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of at least 0")
    return amount


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    add = parser.add_argument
    add(
        "--device",
        choices=tuple(DEVICE_JOBS),
        default="cpu",
        help="cuda: load and train on an NVIDIA GPU [cpu]",
    )
    add("--model", metavar="SIZE", help="a size that `evalfw synth` knows [0.5b]")
    add("--checkpoint", metavar="DIR", help="a checkpoint to take as it is; --model is then only its name")
    add("--sequence", type=count, default=512, help="tokens of a training row [512]")
    add("--rounds", type=count, default=2, help="processes for each measurement; 2 is A B B A [2]")
    add("--only", type=names(JOBS), metavar="JOB,…", help=f"of {', '.join(JOBS)} [all that the device has]")
    engines = "; on cuda ".join(",".join(by_device["engine"]) for by_device in DEFAULTS.values())
    add("--engine", type=names(), metavar="E,…", help=f"of evalfw [{engines}]")
    peft = tuple(PEFT_VARIANTS)
    add(
        "--peft",
        type=names(peft),
        metavar="P,…",
        help=f"of {', '.join(peft)} [peft-bf16; peft-f32 on a CPU without instructions for bf16]",
    )
    add("--threads", type=count, default=machine.logical_cores(), help="[one for each logical core]")
    add(
        "--steps",
        type=count,
        help="training steps that count [3, after 1 that does not; on cuda 20, after 5]",
    )
    add(
        "--kept-activations-gb",
        type=gigabytes,
        metavar="GB",
        help="memory in which evalfw's checkpointing keeps activations [0.35; on cuda 0]",
    )
    add("--repeats", type=count, default=5, help="prompts that count, after one that does not [5]")
    add("--prompt-tokens", type=count, default=128, help="[128]")
    add("--generate-tokens", type=count, default=64, help="[64]")
    add("--evalfw", metavar="FILE", help="a binary to measure [build the working tree]")
    own = os.environ.get("EVALFW_PEERS_PYTHON") or None
    add("--python", metavar="FILE", default=own, help="one with torch and peft, as it is [made if need be]")
    add("--timeout", type=count, metavar="SECONDS", help="for each process [3600; on cuda 900]")
    add("--out", default=prepare.REPOSITORY / "results" / "peers", metavar="DIR", help="[results/peers]")
    args = parser.parse_args(given)
    if args.sequence < 2:
        parser.error("--sequence: half of the row has a loss, so it needs two tokens")
    able = DEVICE_JOBS[args.device]
    args.only = args.only or able
    unable = [job for job in args.only if job not in able]
    if unable:
        all_able = ", ".join(able)
        parser.error(
            f"--only: {', '.join(unable)} beside peers is not for {args.device}, which has {all_able}"
        )
    if args.model is None:
        args.model = Path(args.checkpoint).absolute().name if args.checkpoint else "0.5b"
    for name in ("engine", "steps", "timeout", "kept_activations_gb"):
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS[args.device][name])
    return args


def main() -> int:
    args = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="evalfw-peers-") as scratch:
        try:
            comparison = compare(args, Places.find(Path(scratch)))
        except (Unprepared, OSError) as error:
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            say("interrupted; what was measured is kept")
            return 130
    print(comparison.render())
    say(f"written to {comparison.folder}")
    return 1 if any(m.error for m in comparison.measurements) else 0


if __name__ == "__main__":
    sys.exit(main())
