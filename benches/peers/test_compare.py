"""Tests of what decides the figures. They need no environment: `python3.11 -m unittest -v` in this folder."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import tomllib
import unittest
from dataclasses import dataclass
from pathlib import Path

import figures
import machine
import plan
import process
import report
import scenarios
from contenders import Contender, Evalfw, Peft
from figures import QUANTITIES, Results
from prepare import Places
from process import Finished
from samples import Measurement, Samples, Wrong
from settings import Settings
from work import Shapes

SETTINGS = Settings(
    model="tiny", sequence=64, rounds=2, threads=2, steps=3, repeats=2, prompt_tokens=16, generate_tokens=8
)
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
        quantity = next(q for q in QUANTITIES if q.job == "train" and q.name == name)
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

    def test_a_library_may_speak_before_the_answer(self) -> None:
        peft = Peft("p", "bfloat16", False, SETTINGS, "python", Path("m"))
        line = json.dumps({"load_seconds": 2.0, "peak_bytes": {"load": 6_000}, "versions": {}})
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


class Publishing(unittest.TestCase):
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
