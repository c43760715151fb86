"""Tests of what decides the figures. They need no environment: `python3.11 -m unittest -v` in this folder."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import sys
import tempfile
import tomllib
import unittest
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import compare
import figures
import gpu
import machine
import plan
import prepare
import process
import report
import scenarios
from contenders import Contender, Evalfw, Peft
from figures import QUANTITIES, Results
from prepare import Places, Unprepared
from process import Finished
from samples import Measurement, Samples, Wrong
from settings import Settings
from work import Shapes

SETTINGS = Settings(
    model="tiny", sequence=64, rounds=2, threads=2, steps=3, repeats=2, prompt_tokens=16, generate_tokens=8
)
ON_CUDA = replace(SETTINGS, device="cuda", jobs=("load", "train"), warmup=5)
HALF_B = Shapes(896, 4864, 24, 14, 2, 64, 151936)


@dataclass
class Named(Contender):
    name: str
    jobs: tuple[str, ...]

    def command(self, job: str) -> list[str]:
        return [self.name, job]

    def read(self, job: str, finished: Finished) -> Samples:
        raise NotImplementedError


def answer(stdout: object, code: int = 0) -> Finished:
    return Finished(code, False, json.dumps(stdout), [], 1.0, 5_000, 0.0)


def measured(contender: str, job: str, number: int, **taken) -> Measurement:
    samples = Samples(detail={}, versions={}, **taken)
    return Measurement(contender, job, number, "command", "now", samples=samples)


class Order(unittest.TestCase):
    def test_rounds_go_from_both_ends(self) -> None:
        both = [Named("a", ("load", "train")), Named("b", ("train", "load")), Named("c", ("infer",))]
        order = [f"{job}{number}{c.name}" for job, number, c in plan.interleaved(both, SETTINGS)]
        loads = ["load0a", "load0b", "load1b", "load1a"]
        trains = ["train0a", "train0b", "train1b", "train1a"]
        self.assertEqual(order, [*loads, *trains, "infer0c", "infer1c"])


class Ratios(unittest.TestCase):
    def results(self) -> Results:
        taken = [
            measured("ours", "train", 0, step_seconds=[1.0, 2.0, 3.0], peak_bytes=10**9),
            measured("peer", "train", 0, step_seconds=[8.0], peak_bytes=4 * 10**9),
            measured("peer", "train", 1, step_seconds=[4.0], peak_bytes=4 * 10**9),
            measured("ours", "train", 1, step_seconds=[2.0], peak_bytes=10**9),
            Measurement("absent", "train", 0, "command", "now", error="exit code 1"),
        ]
        return Results(taken, SETTINGS)

    def ratio(self, name: str, peer: str) -> figures.Figure | None:
        quantity = next(q for q in QUANTITIES["cpu"] if q.job == "train" and q.name == name)
        return self.results().ratio(quantity, "ours", peer)

    def test_over_one_is_better_in_speed_and_in_memory(self) -> None:
        # 64 / 2 tokens/s by the median of four steps; (8 + 16) / 2 by that of two.
        self.assertEqual(self.ratio("tokens/s", "peer"), figures.Figure(32 / 12, 2.0, 4.0))
        self.assertEqual(self.ratio("peak GB", "peer"), figures.Figure(4.0, 4.0, 4.0))

    def test_a_peer_that_failed_has_no_ratio_and_stands_in_the_report(self) -> None:
        self.assertIsNone(self.ratio("tokens/s", "absent"))
        about = {"cpu": "x", "flags": [], "logical_cores": 2, "memory_bytes": 8e9}
        run = {"started_at": "now", "machine": about, "limits": []}
        text = report.render(run, self.results(), None, ("ours",))
        self.assertIn("absent, train, round 0: exit code 1", text)
        self.assertIn("| ours : peer | 2.67 × (2–4) |", text)
        self.assertNotIn("not idle", text)

    def test_a_disturbed_measurement_is_said(self) -> None:
        results = self.results()
        results.measurements[1].foreign_cpu_share = 0.4
        about = {"cpu": "x", "flags": [], "logical_cores": 2, "memory_bytes": 8e9}
        text = report.render({"started_at": "", "machine": about, "limits": []}, results, None, ("ours",))
        self.assertIn("took up to 40%", text)

    def test_generating_is_held_against_the_read_rate_around_it(self) -> None:
        sizes = {"weight_bytes": 5 * 10**8, "generate_seconds": [1.0]}
        taken = [measured("ours", "infer", number, **sizes) for number in range(3)]
        for measurement, rates in zip(taken, ([4e10, 6e10], [4e10, 4e10], []), strict=True):
            measurement.read_rates = rates
        results = Results(taken, SETTINGS)
        shares = list(report.read_shares(results))
        tokens = SETTINGS.generate_tokens
        low, high = 5e8 * tokens / 5e10, 5e8 * tokens / 4e10
        self.assertEqual(shares, [("ours", 5 * 10**8, figures.Figure((low + high) / 2, low, high))])


class OnAGpu(unittest.TestCase):
    GPU = {"name": "G 1", "memory_bytes": 80_000_000_000, "driver": "580.1", "driver_cuda": "13.0"}
    RATES = [
        {
            "matrix_flops_per_second": {"bf16": {"a": 8e14, "b": 7e14}, "f32": {"a": 5e13}},
            "copy_bytes_per_second": {"device": 3e12},
        }
    ]

    def results(self, ours_device_bytes: int = 2 * 10**9) -> Results:
        ours = {"step_seconds": [0.01], "peak_bytes": 10**9, "device_peak_bytes": ours_device_bytes}
        peer = {"step_seconds": [0.02], "peak_bytes": 4 * 10**9, "device_peak_bytes": 5 * 10**9}
        taken = [
            measured("ours", "train", 0, load_seconds=[1.5], **ours),
            measured("peer", "train", 0, load_seconds=[9.0], **peer),
        ]
        for measurement in taken:
            measurement.device_before_bytes = 600_000_000
        return Results(taken, ON_CUDA)

    def report(self, results: Results) -> str:
        about = {"cpu": "x", "flags": [], "logical_cores": 2, "memory_bytes": 8e9, "gpu": self.GPU}
        run = {"started_at": "now", "machine": about, "limits": self.RATES}
        return report.render(run, results, HALF_B, ("ours",))

    def test_the_report_has_the_device_and_its_share_of_bf16(self) -> None:
        text = self.report(self.results())
        self.assertIn("tiny on G 1", text)
        self.assertIn("|  | s/step | tokens/s | device peak GB | host peak GB | load, s |", text)
        self.assertIn("| ours | 0.01 | 6400 | 2 | 1 | 1.5 |", text)
        self.assertIn("| ours : peer | 2 × | 2.5 × | 4 × |", text)
        self.assertIn("| device memory copy, in and out | 3.0 TB/s |", text)
        self.assertIn("| bf16 matrix product | 800.0 TFLOP/s |", text)
        share = HALF_B.step_flops(ON_CUDA, recompute=True) / 0.01 / 8e14
        self.assertIn(f"| training | ours | 0.16 TFLOP | {share:.1%} |", text)
        self.assertIn("of the best bf16 matrix rate", text)
        self.assertNotIn("not at rest", text)
        self.assertNotIn("Inference", text)

    def test_an_engine_that_took_nothing_of_the_gpu_has_no_ratio(self) -> None:
        self.assertIn("| ours : peer | 2 × | – | 4 × |", self.report(self.results(ours_device_bytes=0)))

    def test_memory_of_others_is_said(self) -> None:
        results = self.results()
        results.measurements[1].device_before_bytes = 900_000_000
        self.assertIn("not at rest**: before the measurements 0.60 to 0.90 GB", self.report(results))


class Arguments(unittest.TestCase):
    def parsed(self, *given: str) -> argparse.Namespace:
        with mock.patch.dict(os.environ, {"EVALFW_PEERS_PYTHON": ""}):
            return compare.arguments(list(given))

    def refused(self, *given: str) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as end:
            self.parsed(*given)
        self.assertEqual(end.exception.code, 2)
        return said.getvalue()

    def test_each_device_has_its_jobs_and_defaults(self) -> None:
        cpu, cuda = self.parsed(), self.parsed("--device", "cuda")
        self.assertEqual((cpu.only, cpu.engine, cpu.steps), (("load", "train", "infer"), ("candle-cpu",), 3))
        self.assertEqual((cuda.only, cuda.steps, cuda.timeout), (("load", "train"), 20, 900))
        self.assertEqual(cuda.engine, ("candle-cuda", "candle-cuda-bf16"))
        own = self.parsed("--device", "cuda", "--engine", "burn-wgpu", "--steps", "4", "--only", "train")
        self.assertEqual((own.only, own.engine, own.steps), (("train",), ("burn-wgpu",), 4))

    def test_inference_beside_peers_is_for_the_cpu_alone(self) -> None:
        said = self.refused("--device", "cuda", "--only", "train,infer")
        self.assertIn("infer beside peers is not for cuda, which has load, train", said)
        self.assertIn("invalid choice: 'rocm'", self.refused("--device", "rocm"))

    def test_a_checkpoint_of_ones_own_names_the_model(self) -> None:
        self.assertEqual(self.parsed().model, "0.5b")
        self.assertEqual(self.parsed("--checkpoint", "models/7b/").model, "7b")
        self.assertEqual(self.parsed("--checkpoint", "models/x", "--model", "7b").model, "7b")

    def test_a_python_of_ones_own(self) -> None:
        with mock.patch.dict(os.environ, {"EVALFW_PEERS_PYTHON": "/p/python"}):
            self.assertEqual(compare.arguments([]).python, "/p/python")
            self.assertEqual(compare.arguments(["--python", "/q"]).python, "/q")
        self.assertEqual(prepare.interpreter(sys.executable), Path(sys.executable))
        with self.assertRaisesRegex(Unprepared, "/no/python: no program"):
            prepare.interpreter("/no/python")


class Checkpoints(unittest.TestCase):
    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder, self.scratch = Path(temporary.name, "7b"), Path(temporary.name, "scratch")
        self.folder.mkdir()
        self.scratch.mkdir()

    def test_a_tokenizer_is_left_out_and_the_folder_left_alone(self) -> None:
        for name in ("config.json", "model.safetensors"):
            (self.folder / name).write_text(name)
        self.assertEqual(prepare.own_checkpoint(self.folder, self.scratch), self.folder)
        (self.folder / "tokenizer.json").write_text("{}")
        view = prepare.own_checkpoint(self.folder, self.scratch)
        self.assertEqual(sorted(f.name for f in view.iterdir()), ["config.json", "model.safetensors"])
        self.assertEqual((view / "config.json").read_text(), "config.json")
        self.assertTrue((self.folder / "tokenizer.json").exists())

    def test_what_is_no_checkpoint_is_refused(self) -> None:
        with self.assertRaisesRegex(Unprepared, "config.json is missing"):
            prepare.own_checkpoint(self.folder, self.scratch)
        (self.folder / "config.json").write_text("{}")
        with self.assertRaisesRegex(Unprepared, "no weights there"):
            prepare.own_checkpoint(self.folder, self.scratch)


class Answers(unittest.TestCase):
    def evalfw(self) -> Evalfw:
        return Evalfw("e", SETTINGS, HALF_B, "evalfw", Path("m"), Path("s"), Path("t"))

    def record(self, **step: int) -> list[dict]:
        counts = {"slot_tokens": 64, "real_tokens": 64, "trained_tokens": 32, **step}
        steps = [{"warmup": i == 0, "seconds": 9.0 - i, "loss": 12.0, **counts} for i in range(3)]
        samples = {
            "train": steps,
            "phases": [{"name": "train", "peak_bytes": 7}],
            "prefill": [],
            "decode": [],
        }
        environment = {"evalfw_version": "1", "commit": "c"}
        head = {"outcome": "ok", "error": None, "peak_memory_bytes": 9, "environment": environment}
        return [{**head, "framework": "candle", "framework_version": "2", "samples": samples}]

    def test_what_the_kernels_are_kept_to_stands_in_the_command(self) -> None:
        with mock.patch.dict(os.environ, {"EVALFW_SIMD": "avx2"}):
            self.assertEqual(self.evalfw().command("load")[:3], ["env", "EVALFW_SIMD=avx2", "evalfw"])
        with mock.patch.dict(os.environ):
            os.environ.pop("EVALFW_SIMD", None)
            self.assertEqual(self.evalfw().command("load")[0], "evalfw")

    def test_warm_up_does_not_count(self) -> None:
        samples = self.evalfw().read("train", answer(self.record()))
        self.assertEqual((samples.step_seconds, samples.losses), ([8.0, 7.0], [12.0] * 3))
        self.assertEqual((samples.peak_bytes, samples.train_peak_bytes), (9, 7))

    def test_other_work_than_the_peers_do_is_refused(self) -> None:
        for other in ({"trained_tokens": 31}, {"real_tokens": 60}, {"slot_tokens": 128}):
            with self.assertRaises(Wrong):
                self.evalfw().read("train", answer(self.record(**other)))

    def test_a_cell_that_failed_says_why(self) -> None:
        failed = [{"outcome": "crashed", "error": {"message": "signal 9"}}]
        with self.assertRaisesRegex(Wrong, "crashed: signal 9"):
            self.evalfw().read("train", answer(failed, code=1))

    def test_what_an_engine_says_of_its_device_is_kept(self) -> None:
        [record] = self.record()
        for own in ({"in_use_bytes": 1, "reserved_bytes": None, "peak_bytes": 3}, None):
            record["samples"].update(device_memory=own, load={"total_seconds": 4.0}, memory=[{}])
            samples = self.evalfw().read("train", answer([record]))
            self.assertEqual(samples.detail["samples"]["device_memory"], own)
            self.assertEqual(samples.load_seconds, [4.0])
            self.assertNotIn("memory", samples.detail["samples"])

    def test_a_load_that_is_not_in_the_record_is_refused(self) -> None:
        with self.assertRaisesRegex(Wrong, "no load"):
            self.evalfw().read("load", answer(self.record()))

    def test_a_peak_that_was_not_reset_is_not_that_of_the_steps(self) -> None:
        peft = Peft("p", "bfloat16", False, ON_CUDA, "python", Path("m"))
        given = {"load_seconds": 2.0, "peak_bytes": {"load": 6, "train": 7}, "steps": [], "versions": {}}
        peaks = [
            peft.read("train", answer({**given, "peaks_are_of_phases": reset})).train_peak_bytes
            for reset in (True, False)
        ]
        self.assertEqual(peaks, [7, None])
        self.assertIn("--device cuda", " ".join(peft.command("train")))

    def test_a_library_may_speak_before_the_answer(self) -> None:
        peft = Peft("p", "bfloat16", False, SETTINGS, "python", Path("m"))
        given = {
            "load_seconds": 2.0,
            "peak_bytes": {"load": 6_000},
            "peaks_are_of_phases": True,
            "versions": {},
        }
        line = json.dumps(given)
        samples = peft.read("load", Finished(0, False, f"hello\n{line}\n", [], 1.0, 5_000, 0.0))
        self.assertEqual((samples.load_seconds, samples.peak_bytes), ([2.0], 6_000))
        for broken in (answer({}, code=-9), Finished(0, False, "", [], 1.0, 0, 0.0)):
            with self.assertRaises(Wrong):
                peft.read("load", broken)


class Work(unittest.TestCase):
    def test_parameters_of_the_half_billion_model(self) -> None:
        projections = 24 * sum(i * o for i, o in HALF_B.projections())
        self.assertEqual(projections, 357_826_560)
        self.assertEqual(HALF_B.nf4_weight_bytes(), round(projections * 0.515869140625) + 2 * 896 * 151936)

    def test_checkpointing_costs_one_forward_pass_of_the_layers(self) -> None:
        once, twice = (HALF_B.step_flops(SETTINGS, recompute) for recompute in (False, True))
        head = 2 * 32 * 896 * 151936
        # Backward through the adapters and attention costs twice what forward does, the frozen base once.
        self.assertLess(2 * (twice - once), once - 2 * head)
        self.assertGreater(2.2 * (twice - once), once - 2 * head)

    def test_the_scenarios_are_toml(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            scenarios.write(Path(folder) / "s", SETTINGS)
            train = tomllib.loads((Path(folder) / "s" / "train.toml").read_text())
            suite = tomllib.loads((Path(folder) / "s" / "suites" / "train.toml").read_text())
        self.assertEqual((train["sequence_length"], train["gradient_checkpointing"]), (64, True))
        self.assertEqual(suite["cells"], [{"scenario": "train", "repetitions": 1}])


class Processes(unittest.TestCase):
    def python(self, code: str, timeout: float = 60) -> Finished:
        return process.run([sys.executable, "-c", code], {"ANSWER": "42"}, timeout)

    def test_memory_of_children_counts(self) -> None:
        hold = "import time; held = bytearray(60_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(1)"
        run = f"subprocess.run([sys.executable, '-c', {hold!r}])"
        finished = self.python(f"import os, subprocess, sys; print(os.environ['ANSWER']); {run}")
        self.assertEqual((finished.error, finished.stdout), (None, "42\n"))
        self.assertGreater(finished.tree_peak_bytes, 60_000_000)

    def test_errors_and_time_limits_are_told_apart(self) -> None:
        self.assertEqual(self.python("raise SystemExit(3)").error, "exit code 3")
        self.assertEqual(self.python("import os; os.kill(os.getpid(), 9)").error, "killed by signal 9")
        self.assertEqual(self.python("import time; time.sleep(60)", timeout=0.3).error, "out of time")

    def test_nothing_is_left_behind_in_a_group_of_its_own(self) -> None:
        code = (
            "import subprocess, time; "
            "print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True); time.sleep(60)"
        )
        finished = self.python(code, timeout=2)
        self.assertTrue(process.alive(os.getpid()))
        self.assertFalse(process.alive(int(finished.stdout)))

    def test_an_idle_wait_is_no_ones_work(self) -> None:
        early = process.CpuTimes(busy=100.0, own=10.0)
        late = process.CpuTimes(busy=104.0, own=13.0)
        self.assertGreater(late.foreign_share_since(early, 1.0), 0)
        self.assertEqual(process.CpuTimes(103.0, 13.0).foreign_share_since(early, 1.0), 0.0)


class FakeDevice(gpu.Device):
    """Says one number after another, and the last one for ever."""

    def __init__(self, *used: int) -> None:
        self.used = list(used)

    def used_bytes(self) -> int:
        return self.used.pop(0) if len(self.used) > 1 else self.used[0]


class FakeNvml:
    """As libnvidia-ml.so.1 answers: a status, and the rest through pointers."""

    used = 700

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name: str):
        return lambda *arguments: 9 if name == self.fails else self.answer(name, arguments)

    def answer(self, name: str, arguments: tuple) -> int:
        match name:
            case "nvmlDeviceGetMemoryInfo":
                arguments[1]._obj.total, arguments[1]._obj.used = 1000, self.used
            case "nvmlDeviceGetName":
                arguments[1].value = b"G 1"
            case "nvmlSystemGetDriverVersion":
                arguments[0].value = b"580.1"
            case "nvmlSystemGetCudaDriverVersion_v2":
                arguments[0]._obj.value = 13010
            case "nvmlInit_v2" | "nvmlDeviceGetHandleByIndex_v2":
                pass
            case _:
                raise AssertionError(name)
        return 0


class DeviceMemory(unittest.TestCase):
    def run_beside(self, *used: int) -> Finished:
        return process.run([sys.executable, "-c", "import time; time.sleep(0.5)"], {}, 60, FakeDevice(*used))

    def test_the_peak_is_above_what_was_used_before(self) -> None:
        finished = self.run_beside(100, 100, 150, 900, 300)
        self.assertEqual((finished.device_before_bytes, finished.device_peak_bytes), (100, 800))

    def test_an_ended_process_first_gives_its_memory_back(self) -> None:
        finished = self.run_beside(900, 500, 100, 100, 400)
        self.assertEqual((finished.device_before_bytes, finished.device_peak_bytes), (100, 300))

    def test_memory_that_others_give_back_is_not_negative(self) -> None:
        self.assertEqual(self.run_beside(100, 100, 50).device_peak_bytes, 0)

    def test_without_a_device_there_is_no_figure(self) -> None:
        self.assertIsNone(process.run([sys.executable, "-c", ""], {}, 60).device_peak_bytes)

    def test_what_nvml_says(self) -> None:
        device = gpu.Nvml(FakeNvml(), 0)
        self.assertEqual(device.used_bytes(), 700)
        about = {"name": "G 1", "memory_bytes": 1000, "driver": "580.1", "driver_cuda": "13.1"}
        self.assertEqual(device.describe(), about)
        self.assertEqual(ctypes.sizeof(gpu.Memory), 24)

    def test_a_driver_that_refuses_is_named(self) -> None:
        with self.assertRaisesRegex(gpu.NvmlError, "nvmlInit_v2 said 9"):
            gpu.Nvml(FakeNvml("nvmlInit_v2"), 0)
        device = gpu.Nvml(FakeNvml("nvmlDeviceGetMemoryInfo"), 0)
        with self.assertRaisesRegex(gpu.NvmlError, "nvmlDeviceGetMemoryInfo said 9"):
            process.run([sys.executable, "-c", ""], {}, 60, device)

    def test_the_gpu_that_is_measured_is_the_one_that_cuda_may_use(self) -> None:
        self.assertEqual([gpu.visible_index(text) for text in (None, "0", "3,1")], [0, 0, 3])
        for other in ("", "GPU-5f0c", "-1"):
            with self.assertRaisesRegex(gpu.NvmlError, "by its number"):
                gpu.visible_index(other)
        shown = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3"}
        self.assertEqual(gpu.Nvml(FakeNvml(), 3).environment(), shown)

    def test_without_a_driver_the_error_says_what_is_needed(self) -> None:
        with (
            mock.patch.object(gpu, "LIBRARIES", ("libno-such-library.so.1",)),
            mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "0"}),
            self.assertRaisesRegex(gpu.NvmlError, "needs an NVIDIA GPU and its driver: libno-such-library"),
        ):
            gpu.Nvml.open()


class Publishing(unittest.TestCase):
    def test_what_the_caller_named_is_shown_without_its_place(self) -> None:
        given = {
            Path("/t/venv/bin/python3"): "python",
            Path("/t/venv"): "$VENV",
            Path("/m/7b"): "$CHECKPOINT",
        }
        places = Places(Path("/c/peers"), Path("/tmp/scratch-1"), given)
        shown = places.display("/t/venv/bin/python3 --model /m/7b in /t/venv/lib/torch")
        self.assertEqual(shown, "python --model $CHECKPOINT in $VENV/lib/torch")

    def test_an_environment_of_ones_own_is_shown_by_its_variable(self) -> None:
        places = Places(Path("/c/peers"), Path("/tmp/scratch-1"))
        args = compare.arguments(["--out", "/o"])
        with mock.patch.dict(os.environ, {"EVALFW_LLAMA_VENV": "/v/llama"}):
            places = compare.with_names(places, args, None)
        self.assertEqual(places.display("/v/llama/bin/python x"), "$EVALFW_LLAMA_VENV/bin/python x")

    def test_folders_of_this_machine_are_not_shown(self) -> None:
        places = Places(Path.home() / ".cache" / "evalfw" / "peers", Path("/tmp/scratch-1"))
        shown = places.display(f"{Path.home()}/.cache/evalfw/x /tmp/scratch-1/runs {Path.home()}/y")
        self.assertEqual(shown, "~/.cache/evalfw/x $SCRATCH/runs ~/y")

    def test_the_best_of_several_limits(self) -> None:
        taken: list[dict] = [
            {"matrix_flops_per_second": {"f32": {"a": 1.0, "b": 3.0}}, "read_bytes_per_second": {"1": 5.0}},
            {"matrix_flops_per_second": {"f32": {"a": 2.0}}, "read_bytes_per_second": {"1": 6.0}},
            {"error": "exit code 1"},
        ]
        self.assertEqual(machine.best(taken), {"f32 matrix product": 3.0, "memory read, 1 thread": 6.0})


if __name__ == "__main__":
    unittest.main()
