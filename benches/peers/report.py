"""The comparison as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import mean, median

import machine
import process
from figures import Figure, Results
from work import Shapes

TITLES = {"load": "Load to NF4, from a warm page cache", "train": "QLoRA training", "infer": "Inference"}

# Other processes' share of the CPU time that a machine at rest may show.
IDLE = 0.03

# By how much what is used of a GPU before a measurement may differ: more is another process's.
STEADY_BYTES = 64e6

# Beside which rate of the machine training is held.
BEST_PRODUCT = {"cpu": "f32 matrix product", "cuda": "bf16 matrix product"}


def render(run: dict, results: Results, shapes: Shapes | None, engines: tuple[str, ...]) -> str:
    return "\n".join(
        [*head(run, results), *jobs(results, engines), *limits(run, results, shapes), *tail(results)]
    )


def head(run: dict, results: Results) -> Iterator[str]:
    about, settings = run["machine"], results.settings
    gpu = about.get("gpu")
    yield f"# evalfw beside its peers: {settings.model}" + (f" on {gpu['name']}" if gpu else "")
    yield ""
    inference = (
        f" Inference: a prompt of {settings.prompt_tokens} tokens (pp{settings.prompt_tokens}), then "
        f"{settings.generate_tokens} more, one by one (tg{settings.generate_tokens})."
    )
    yield (
        f"{run['started_at']}, {about['cpu']} ({', '.join(about['flags'])}), {about['logical_cores']} logical "
        f"cores, {about['memory_bytes'] / 1e9:.1f} GB. {settings.threads} threads, batch 1, rank "
        f"{settings.lora_r}, alpha {settings.lora_alpha}, all seven projections, dropout 0, AdamW, gradient "
        f"checkpointing (in which evalfw keeps {settings.kept_activations_gb:g} GB of activations); rows of {settings.sequence} tokens of which {settings.trained_tokens} have a loss; "
        f"steps: {settings.steps} that count, after {settings.warmup} that do not."
        f"{inference if 'infer' in settings.jobs else ''} "
        f"Rounds: {settings.rounds}, in A B B A order. Each measurement has a process of its own."
    )
    yield ""
    yield (
        "Medians of all samples, and their range. A ratio says how many times better evalfw is (faster, or "
        f"smaller), with the range over the rounds. {'A host peak' if gpu else 'A peak'} is the largest resident "
        "size of the process (of evalfw: of its worker) from its start, GB is 10^9 bytes. `samples.json` has "
        "every sample."
    )
    if gpu:
        yield from device(gpu, results)
    busy = max((m.foreign_cpu_share for m in results.measurements), default=0.0)
    if busy > IDLE:
        yield ""
        yield (
            f"**The machine was not idle**: other processes took up to {busy:.0%} of its cores' time during a "
            "measurement. These timings are not to be trusted."
        )


def device(gpu: dict, results: Results) -> Iterator[str]:
    yield ""
    yield (
        f"{gpu['name']}, {gpu['memory_bytes'] / 1e9:.1f} GB, driver {gpu['driver']} "
        f"(CUDA {gpu['driver_cuda']}). A device peak is taken from outside, in the same way for all: the most "
        "that NVML counted as used on the whole GPU while the process ran, asked every "
        f"{process.DEVICE_POLL_SECONDS * 1000:.0f} ms, less what it counted before. CUDA's context, workspaces "
        "of libraries and free pages that an allocator holds are in it. What the frameworks count themselves is "
        "in `samples.json`. A load begins after CUDA's context is there."
    )
    befores = [m.device_before_bytes for m in results.measurements if m.device_before_bytes is not None]
    if befores and max(befores) - min(befores) > STEADY_BYTES:
        yield ""
        yield (
            f"**The GPU was not at rest**: before the measurements {min(befores) / 1e9:.2f} to "
            f"{max(befores) / 1e9:.2f} GB of it were in use. These device peaks are not to be trusted."
        )


def jobs(results: Results, engines: tuple[str, ...]) -> Iterator[str]:
    for job in results.settings.jobs:
        quantities = results.quantities(job)
        contenders = results.contenders(job)
        names = [q.name for q in quantities]
        own = [name for name in contenders if name in engines]
        peers = [name for name in contenders if name not in engines]
        yield from ["", f"## {TITLES[job]}", ""]
        rows = [[name, *(show(results.figure(q, name)) for q in quantities)] for name in contenders]
        yield from table(["", *names], rows)
        pairs = [(engine, peer) for engine in own for peer in peers]
        if pairs:
            compared = [q for q in quantities if q.ratio]
            rows = []
            for engine, peer in pairs:
                ratios = (show(results.ratio(q, engine, peer), " ×") for q in compared)
                rows.append([f"{engine} : {peer}", *ratios])
            yield ""
            yield from table(["ratio", *(q.name for q in compared)], rows)


def limits(run: dict, results: Results, shapes: Shapes | None) -> Iterator[str]:
    best = machine.best(run["limits"])
    if not best:
        return
    yield from ["", "## Beside what this machine can do", ""]
    yield from table(
        ["limit", "best of all runs"],
        [[name, f"{prefixed(rate)}{unit(name)}"] for name, rate in best.items()],
    )
    if shapes is None:
        return
    settings = results.settings
    product = BEST_PRODUCT[settings.device]
    matrix = best.get(product)
    rows = []
    if matrix and "train" in settings.jobs:
        for recompute, label in ((True, "training"), (False, "training, recompute not counted")):
            flops = shapes.step_flops(settings, recompute)
            for name, seconds in middles(results, "train", "s/step"):
                rows.append([label, name, f"{flops / 1e12:.2f} TFLOP", share(flops / seconds / matrix)])
    if "infer" in settings.jobs:
        for name, size, shares in read_shares(results):
            shown = f"{share(shares.middle)} ({share(shares.low)}–{share(shares.high)})"
            rows.append(["generating", name, f"{size / 1e9:.3f} GB", shown])
    if rows:
        yield ""
        reading = "; generating: of the read rate around each run" if "infer" in settings.jobs else ""
        best_rate = f"of the best {product.removesuffix(' product')} rate{reading}"
        yield from table(["work", "", "of a step or token", best_rate], rows)


def read_shares(results: Results) -> Iterator[tuple[str, int, Figure]]:
    """Weights read per second, as a share of what the machine read just before and just after."""
    rates = next(q for q in results.quantities("infer") if q.name == "generated tokens/s")
    for contender in results.contenders("infer"):
        size = weight_bytes(results, contender)
        shares = [
            median(rates.values(m.samples, results.settings)) * size / mean(m.read_rates)
            for m in results.measurements
            if m.contender == contender and m.job == "infer" and m.samples and m.read_rates and size
        ]
        figure = Figure.of(shares)
        if size and figure:
            yield contender, size, figure


def tail(results: Results) -> Iterator[str]:
    failed = [m for m in results.measurements if m.error]
    if failed:
        yield from ["", "## Failed", ""]
        for m in failed:
            yield f"- {m.contender}, {m.job}, round {m.round}: {m.error}"
    yield from ["", "## Versions", ""]
    found = dict.fromkeys(
        f"{name}: {version}"
        for m in results.measurements
        if m.samples is not None
        for name, version in m.samples.versions.items()
    )
    yield from (f"- {line}" for line in found)
    yield from ["", "## Commands", "", "```"]
    yield from dict.fromkeys(m.command for m in results.measurements)
    yield from ["```", ""]


def middles(results: Results, job: str, name: str) -> Iterator[tuple[str, float]]:
    quantity = next(q for q in results.quantities(job) if q.name == name)
    for contender in results.contenders(job):
        figure = results.figure(quantity, contender)
        if figure is not None:
            yield contender, figure.middle


def weight_bytes(results: Results, contender: str) -> int | None:
    sizes = (m.samples.weight_bytes for m in results.measurements if m.contender == contender and m.samples)
    return next((size for size in sizes if size), None)


def prefixed(rate: float) -> str:
    return f"{rate / 1e12:.1f} T" if rate >= 1e12 else f"{rate / 1e9:.1f} G"


def share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def unit(limit: str) -> str:
    return "FLOP/s" if "product" in limit else "B/s"


def show(figure: Figure | None, suffix: str = "") -> str:
    if figure is None:
        return "–"
    middle = f"{number(figure.middle)}{suffix}"
    return middle if figure.low == figure.high else f"{middle} ({number(figure.low)}–{number(figure.high)})"


def number(value: float) -> str:
    """Three significant digits, and no fraction where there are more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---|" + "--:|" * (len(header) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"
