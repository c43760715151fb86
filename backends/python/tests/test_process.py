"""A worker as the harness sees it: a process with three pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

from support import ROOT, write_checkpoint

from evalfw_engines import engines, protocol

HELLO = {"id": 1, "method": "hello", "params": {"protocol": protocol.VERSION}}
BYE = {"id": 9, "method": "bye", "params": {}}
SECONDS = 30


def run(*arguments: str, requests: list[dict] = (), **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment},
        timeout=SECONDS,
    )


def converse(script: str, requests: list[dict]) -> tuple[int, list[str], str]:
    """One request after the other, as the harness does it: a child that read requests would wait for the next one."""
    with tempfile.TemporaryFile("w+") as noise:
        worker = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, cwd=ROOT
        )
        deadline = threading.Timer(SECONDS, worker.kill)
        deadline.start()
        with worker:
            lines = []
            for request in requests:
                worker.stdin.write(json.dumps(request) + "\n")
                worker.stdin.flush()
                lines.append(worker.stdout.readline())
            lines += worker.stdout.readlines()
            worker.wait()
            deadline.cancel()
        noise.seek(0)
        return worker.returncode, lines, noise.read()


class Pipes(unittest.TestCase):
    @unittest.skipUnless(sys.platform in ("linux", "darwin"), "the noisy engine calls the C library by its Unix names")
    def test_whatever_a_library_prints_goes_to_standard_error(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model = write_checkpoint(Path(folder))
            load = {"id": 2, "method": "load", "params": {"model": str(model), "quantization": "none"}}
            code, lines, noise = converse(str(ROOT / "tests" / "noisy_engine.py"), requests=[HELLO, load, BYE])
        answers = [json.loads(line) for line in lines]
        self.assertEqual([answer["id"] for answer in answers], [1, 2, 9], noise)
        self.assertTrue(all("result" in answer for answer in answers))
        for place in ("open", "load"):
            for way in ("print", "__stdout__", "write", "puts", "child"):
                self.assertIn(f"{way} {place}", noise)
        self.assertEqual(code, 0)

    def test_end_of_input_ends_the_process(self) -> None:
        done = run("-m", "evalfw_engines", "peft", requests=[])
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_nothing_after_bye_is_answered(self) -> None:
        done = run("-m", "evalfw_engines", "peft", requests=[BYE, HELLO])
        self.assertEqual([json.loads(line) for line in done.stdout.splitlines()], [{"id": 9, "result": {}}])

    def test_a_harness_that_went_away_is_no_traceback(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as nobody:
            done = subprocess.run(
                [sys.executable, "-m", "evalfw_engines", "peft"],
                input=json.dumps(BYE).encode() + b"\n",
                stdout=nobody,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                timeout=SECONDS,
            )
        self.assertEqual(done.returncode, 1)
        self.assertNotIn(b"Traceback", done.stderr)


class CommandLine(unittest.TestCase):
    def test_versions_are_one_json_object(self) -> None:
        done = run("-m", "evalfw_engines", "--version")
        versions = json.loads(done.stdout)
        self.assertEqual(done.returncode, 0)
        self.assertIn("evalfw_engines", versions)
        self.assertTrue(all(isinstance(version, str) for version in versions.values()))
        done = run("-m", "evalfw_engines", "peft", "--version")
        self.assertEqual(done.returncode, 0)
        known = {"evalfw_engines", "python", *engines.ENGINES["peft"].packages}
        self.assertLessEqual(set(json.loads(done.stdout)), known)

    def test_an_unknown_engine_is_answered_with_those_there_are(self) -> None:
        done = run("-m", "evalfw_engines", "tensorflow")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        for name in engines.ENGINES:
            self.assertIn(name, done.stderr)
        self.assertEqual(run("-m", "evalfw_engines").returncode, 2)
        self.assertEqual(run("-m", "evalfw_engines", "tensorflow", "--version").returncode, 2)

    def test_a_missing_library_is_a_typed_error_of_hello(self) -> None:
        # Without site-packages no framework can be imported, whatever is installed.
        for name, entry in engines.ENGINES.items():
            done = run("-S", "-m", "evalfw_engines", name, requests=[HELLO, BYE])
            hello, bye = map(json.loads, done.stdout.splitlines())
            self.assertEqual(hello["error"]["kind"], "unavailable", hello)
            self.assertIn(name, hello["error"]["reason"])
            self.assertIn(entry.requirements, hello["error"]["advice"])
            self.assertIn("result", bye)


if __name__ == "__main__":
    unittest.main()
