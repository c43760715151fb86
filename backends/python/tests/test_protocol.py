"""The serve loop: the order of calls, errors by their kind, ids, and lines that are no requests."""

from __future__ import annotations

import json
import math
import tempfile
import unittest
from pathlib import Path

from support import (
    BATCH, RANK, SHAPE, TRAINING, Conversation, FakeEngine, adapter_values, write_adapter, write_batches,
    write_checkpoint,
)

from evalfw_engines import errors, lora, protocol, tensor_file

CALLS_ON_A_MODEL = {
    "attach_adapter": {"adapter": "a", "training": TRAINING},
    "train_step": {"step": 0, "dropout_seed": 0, "batches": {"file": "b", "lines": [0]}},
    "gradients": {"step": 0, "dropout_seed": 0, "batches": {"file": "b", "lines": [0]}, "output": "o"},
    "evaluate": {"batches": {"file": "b", "lines": [0]}},
    "prefill": {"tokens": [1]},
    "decode": {"first": 1, "steps": 1},
    "logits": {"tokens": [1], "output": "o"},
    "decoded_weights": {"output": "o"},
    "save_adapter": {"output": "o"},
    "memory": {},
    "tune": {"train": None, "evaluate": None, "generate": None},
}


class ServeTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model = write_checkpoint(self.folder / "model")
        self.adapter = write_adapter(self.folder / "adapter")
        self.batches = write_batches(self.folder / "batches.jsonl")

    def lines(self, *lines: int) -> dict:
        return {"file": str(self.batches), "lines": list(lines) or [0]}

    def loaded(self) -> Conversation:
        return Conversation().hello().say("load", model=str(self.model), quantization="none")

    def attached(self) -> Conversation:
        return self.loaded().say("attach_adapter", adapter=str(self.adapter), training=TRAINING)

    def assert_error(self, answer: dict, kind: str, *words: str) -> None:
        self.assertNotIn("result", answer)
        self.assertEqual(answer["error"]["kind"], kind, answer)
        for word in words:
            self.assertIn(word, answer["error"]["message"])

    def last(self, conversation: Conversation, engine=FakeEngine) -> dict:
        return conversation.answers(engine)[-1]


class Order(ServeTest):
    def test_a_whole_conversation(self) -> None:
        output = self.folder / "out"
        answers = (
            self.attached()
            .say("train_step", step=3, dropout_seed=9, batches=self.lines())
            .say("gradients", step=0, dropout_seed=0, batches=self.lines(), output=str(self.folder / "g.safetensors"))
            .say("evaluate", batches=self.lines())
            .say("prefill", tokens=[1, 2])
            .say("decode", first=2, steps=3)
            .say("logits", tokens=[1, 2], output=str(self.folder / "l.safetensors"))
            .say("save_adapter", output=str(output))
            .say("memory")
            .say("bye")
            .say("memory")
            .answers()
        )
        self.assertEqual([answer["id"] for answer in answers], list(range(1, 13)))
        results = [answer["result"] for answer in answers]
        info, loaded, attached, step, gradients, evaluation, prefill, decode, *_, memory, bye = results
        self.assertEqual((info["protocol"], info["engine"]), (protocol.VERSION, "fake"))
        times = loaded["times"]
        parts = sum(times[part] for part in ("read_seconds", "quantize_seconds", "upload_seconds"))
        self.assertAlmostEqual(parts, times["total_seconds"])
        self.assertEqual(loaded["parameters"], SHAPE.parameters())
        self.assertEqual(loaded["checkpoint_bytes"], 4 * SHAPE.parameters())
        self.assertEqual(attached["trainable_parameters"], sum(math.prod(v.shape) for v in adapter_values(0).values()))
        for report in (step, gradients):
            self.assertEqual((report["loss"], report["grad_norm"]), (1.5, 0.25))
            self.assertGreater(report["seconds"], 0)
        self.assertEqual((evaluation["loss"], evaluation["tokens"]), (1.5, 4))
        self.assertEqual(prefill["next"], 2)
        self.assertEqual((decode["tokens"], len(decode["seconds"])), ([3, 4, 5], 3))
        self.assertEqual(memory, {"in_use_bytes": None, "reserved_bytes": None, "peak_bytes": None})
        self.assertEqual(bye, {})
        logits = tensor_file.read_header(self.folder / "l.safetensors")["logits"]
        self.assertEqual((logits.shape, logits.dtype), ((2, SHAPE.vocab_size), "F32"))
        self.assertEqual(
            set(tensor_file.read_header(self.folder / "g.safetensors")), set(lora.tensor_shapes(SHAPE, RANK))
        )
        saved = lora.Adapter.read(output, SHAPE)
        self.assertEqual(saved.config, lora.LoraConfig(RANK, 4.0, 0.1))

    def test_the_engine_is_handed_what_was_asked_and_synchronised(self) -> None:
        engine = FakeEngine()
        self.attached().say("train_step", step=3, dropout_seed=9, batches=self.lines(0, 0)).answers(engine)
        self.assertEqual(engine.model.calls[-2:], [("train_step", 3, 9, 2), ("synchronize",)])
        attach = next(call for call in engine.model.calls if call[0] == "attach_adapter")
        self.assertEqual(attach[2].max_grad_norm, None)

    def test_nothing_comes_before_hello(self) -> None:
        for method, params in {"load": {"model": "m", "quantization": "none"}, "limits": {}}.items():
            self.assert_error(self.last(Conversation().say(method, **params)), "protocol", "after hello")
        for method, params in CALLS_ON_A_MODEL.items():
            for start in (Conversation(), Conversation().hello()):
                self.assert_error(self.last(start.say(method, **params)), "protocol", "no model is loaded")

    def test_hello_comes_once_and_first(self) -> None:
        answers = Conversation().hello().hello().say("limits").answers()
        self.assert_error(answers[1], "protocol", "once")
        self.assert_error(answers[2], "protocol")

    def test_another_version_is_refused_and_may_be_corrected(self) -> None:
        answers = Conversation().say("hello", protocol=protocol.VERSION + 1).hello().answers()
        self.assert_error(answers[0], "protocol", f"version {protocol.VERSION + 1}", f"version {protocol.VERSION}")
        self.assertEqual(answers[1]["result"]["engine"], "fake")

    def test_a_model_is_loaded_once_but_a_failed_load_may_be_repeated(self) -> None:
        missing = str(self.folder / "missing")
        load = {"model": str(self.model), "quantization": "nf4"}
        answers = (
            Conversation().hello().say("load", model=missing, quantization="nf4").say("load", **load)
            .say("load", **load).say("limits").answers()
        )
        self.assert_error(answers[1], "input", missing, "not a folder")
        self.assertIn("result", answers[2])
        self.assert_error(answers[3], "protocol", "once")
        self.assert_error(answers[4], "protocol", "before load")

    def test_limits_of_a_cpu_are_not_measured(self) -> None:
        answer = self.last(Conversation().hello().say("limits"))
        self.assertEqual(set(answer["result"].values()), {None})

    def test_a_base_that_the_engine_does_not_have_is_unsupported(self) -> None:
        load = {"model": str(self.model)}
        self.assert_error(self.last(Conversation().hello().say("load", quantization="native", **load)), "unsupported")
        self.assert_error(self.last(Conversation().hello().say("load", quantization="q2", **load)), "protocol", "q2")

    def test_training_needs_an_adapter_and_decoding_a_prompt(self) -> None:
        step = {"step": 0, "dropout_seed": 0, "batches": self.lines()}
        for method, params in {
            "train_step": step, "gradients": {**step, "output": "o"}, "save_adapter": {"output": "o"},
        }.items():
            self.assert_error(self.last(self.loaded().say(method, **params)), "protocol", "no adapter")
        self.assert_error(self.last(self.loaded().say("decode", first=1, steps=1)), "protocol", "prefill")

    def test_what_an_engine_leaves_out_is_unsupported(self) -> None:
        self.assert_error(self.last(self.loaded().say("decoded_weights", output="o")), "unsupported")

    def test_a_text_is_tokenized_at_any_time_after_hello(self) -> None:
        class Tokenizing(FakeEngine):
            def tokenize(self, folder, text):
                return [len(folder.name), len(text)]

        say = {"folder": str(self.model), "text": "four"}
        answers = Conversation().say("tokenize", **say).hello().say("tokenize", **say).answers(Tokenizing)
        self.assert_error(answers[0], "protocol", "hello")
        self.assertEqual(answers[2]["result"], {"tokens": [5, 4]})
        answers = self.loaded().say("tokenize", **say).answers(Tokenizing)
        self.assertEqual(answers[2]["result"], {"tokens": [5, 4]})

    def test_tuning_is_no_work_here(self) -> None:
        tune = self.loaded().say("tune", train=self.lines(), evaluate=None, generate={"prompt": [1], "steps": 2})
        self.assertEqual(self.last(tune)["result"], {"measured": 0, "cached": 0, "late": 0, "seconds": 0.0})

    def test_the_conversation_ends_with_its_input(self) -> None:
        self.assertEqual(len(Conversation().hello().line(b"").answers()), 1)


class Errors(ServeTest):
    def test_each_kind_keeps_its_name_and_what_it_says(self) -> None:
        cases = [
            (errors.Input("f: a"), {"kind": "input", "message": "f: a"}),
            (errors.Unavailable("r", "a"), {"kind": "unavailable", "reason": "r", "advice": "a"}),
            (errors.Unsupported("u"), {"kind": "unsupported", "message": "u"}),
            (errors.OutOfMemory("o"), {"kind": "out_of_memory", "message": "o"}),
            (errors.NotFinite("n"), {"kind": "not_finite", "message": "n"}),
            (errors.Wrong("w"), {"kind": "wrong", "message": "w"}),
            (errors.Framework("f"), {"kind": "framework", "message": "f"}),
            (errors.Protocol("p"), {"kind": "protocol", "message": "p"}),
        ]
        for raised, expected in cases:
            with self.subTest(expected["kind"]):
                self.assertEqual(self.training_fails_by(raised)["error"], expected)

    def test_other_exceptions_are_the_framework_s(self) -> None:
        answer = self.training_fails_by(KeyError("layer"))
        self.assert_error(answer, "framework", "KeyError", "layer")
        self.assert_error(self.training_fails_by(SystemExit(3)), "framework", "SystemExit")

    def test_exhausted_memory_is_told_by_type_or_by_words(self) -> None:
        for raised in (
            MemoryError(),
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        ):
            self.assert_error(self.training_fails_by(raised), "out_of_memory")

    def test_an_error_ends_no_conversation(self) -> None:
        engine = FakeEngine()
        engine.model.loss = RuntimeError("broken")
        answers = self.attached().say("evaluate", batches=self.lines()).say("prefill", tokens=[1]).answers(engine)
        self.assert_error(answers[3], "framework", "broken")
        self.assertEqual(answers[4]["result"]["next"], 1)

    def training_fails_by(self, raised: BaseException) -> dict:
        engine = FakeEngine()
        engine.model.loss = raised
        return self.last(self.attached().say("train_step", step=0, dropout_seed=0, batches=self.lines()), engine)

    def test_a_loss_that_is_no_number_is_not_finite(self) -> None:
        for loss in (math.nan, math.inf):
            engine = FakeEngine()
            engine.model.loss = loss
            step = self.attached().say("train_step", step=0, dropout_seed=0, batches=self.lines())
            self.assert_error(self.last(step, engine), "not_finite", "loss")
            evaluation = self.attached().say("evaluate", batches=self.lines())
            self.assert_error(self.last(evaluation, engine), "not_finite", "evaluation")
        engine = FakeEngine()
        engine.model.norm = math.nan
        step = self.attached().say("train_step", step=0, dropout_seed=0, batches=self.lines())
        self.assert_error(self.last(step, engine), "not_finite", "gradient norm")

    def test_a_device_that_does_not_open_is_an_answer(self) -> None:
        def missing() -> None:
            raise errors.Unavailable("no torch", "install it")

        answers = Conversation().hello().say("limits").answers(missing)
        self.assertEqual(answers[0]["error"], {"kind": "unavailable", "reason": "no torch", "advice": "install it"})
        self.assert_error(answers[1], "protocol")

    def test_what_an_engine_gives_is_held_against_what_was_asked(self) -> None:
        engine = FakeEngine()
        engine.model.logits_shape = (1, 3)
        logits = self.loaded().say("logits", tokens=[1], output=str(self.folder / "l"))
        self.assert_error(self.last(logits, engine), "framework", "logits", "(1, 3)")

        class Incomplete(FakeEngine):
            def __init__(self) -> None:
                super().__init__()
                self.model.adapter = lambda: dict(list(adapter_values(1).items())[1:])

        save = self.attached().say("save_adapter", output=str(self.folder / "s"))
        self.assert_error(self.last(save, Incomplete), "framework", "q_proj.lora_A.weight")

    def test_an_output_that_cannot_be_written_is_named(self) -> None:
        output = str(self.folder / "missing" / "l.safetensors")
        self.assert_error(self.last(self.loaded().say("logits", tokens=[1], output=output)), "input", output)

    def test_an_answer_that_is_no_json_is_an_error(self) -> None:
        class Odd(FakeEngine):
            def info(self):
                return {**super().info(), "features": {1, 2}, "threads": math.nan}

        answers = Conversation().hello().say("limits").answers(Odd)
        self.assert_error(answers[0], "framework")
        self.assertIn("result", answers[1])


class Lines(ServeTest):
    def test_what_is_no_request_is_answered_by_a_protocol_error(self) -> None:
        garbage = [
            b"not json", b"[]", b"3", b"null", b"{}", b'{"id": -1, "method": "memory", "params": {}}',
            b'{"id": "1", "method": "memory", "params": {}}', b'{"id": true, "method": "memory", "params": {}}',
            b'{"id": 1.5}', b"\xff\xfe\x00", b"[" * 100_000, b'{"id": ' + b"9" * 10_000 + b"}",
            b'{"id": 1, "method": "bye", "params": {"x": NaN}}', b"x" * 5_000_000,
        ]
        conversation = Conversation()
        for line in garbage:
            conversation.line(line)
        answers = conversation.hello().answers()
        self.assertEqual(len(answers), len(garbage) + 1)
        for line, answer in zip(garbage, answers):
            with self.subTest(line[:40]):
                self.assert_error(answer, "protocol")
                self.assertEqual(answer["id"], 0)
                self.assertLess(len(json.dumps(answer)), 2_000)
        self.assertIn("result", answers[-1])

    def test_the_id_is_told_where_it_can_be_read(self) -> None:
        for request, word in (
            ({"id": 7, "method": "dance", "params": {}}, "dance"),
            ({"id": 7, "method": ["hello"], "params": {}}, "unknown method"),
            ({"id": 7, "params": {}}, "unknown method"),
            ({"id": 7, "method": "memory"}, "params"),
            ({"id": 7, "method": "memory", "params": []}, "params"),
            ({"id": 7, "method": "hello", "params": {}}, "protocol"),
            ({"id": 7, "method": "hello", "params": {"protocol": "1"}}, "protocol"),
        ):
            (answer,) = Conversation().line(request).answers()
            self.assertEqual(answer["id"], 7)
            self.assert_error(answer, "protocol", word)

    def test_the_largest_id_is_echoed(self) -> None:
        number = 2**64 - 1
        (answer,) = Conversation().line({"id": number, "method": "bye", "params": {}}).answers()
        self.assertEqual(answer, {"id": number, "result": {}})

    def test_empty_lines_are_passed_over_and_a_last_line_needs_no_end(self) -> None:
        answers = Conversation().line(b"").line(b"  \r").hello().answers()
        self.assertEqual(len(answers), 1)

    def test_unknown_parameters_are_passed_over(self) -> None:
        (answer,) = Conversation().say("hello", protocol=protocol.VERSION, colour="red").answers()
        self.assertIn("result", answer)

    def test_a_parameter_of_another_type_is_named(self) -> None:
        cases = [
            ("prefill", {"tokens": []}, "protocol", "no tokens"),
            ("prefill", {"tokens": [1, -1]}, "protocol", "tokens"),
            ("prefill", {"tokens": [True]}, "protocol", "tokens"),
            ("prefill", {"tokens": "1"}, "protocol", "tokens"),
            ("prefill", {"tokens": [10]}, "input", "token id 10"),
            ("logits", {"tokens": [1]}, "protocol", "output"),
            ("logits", {"tokens": [1], "output": "a\0b"}, "protocol", "output"),
            ("evaluate", {"batches": [1]}, "protocol", "batches"),
            ("evaluate", {"batches": self.lines(-1)}, "protocol", "lines"),
            ("evaluate", {"batches": self.lines(0, 1)}, "input", "has 1 lines, line 1 asked for"),
            ("attach_adapter", {"adapter": str(self.adapter)}, "protocol", "training"),
            ("tokenize", {"folder": "f", "text": 3}, "protocol", "text"),
            ("tokenize", {"text": "x"}, "protocol", "folder"),
        ]
        for method, params, kind, word in cases:
            with self.subTest(f"{method} {params}"):
                self.assert_error(self.last(self.loaded().say(method, **params)), kind, word)

    def test_settings_that_adamw_cannot_train_with_are_refused_by_field(self) -> None:
        for field, value in (
            ("learning_rate", -1.0), ("learning_rate", "fast"), ("beta1", 1.0), ("beta2", -0.1), ("epsilon", 0.0),
            ("weight_decay", -0.1), ("max_grad_norm", 0.0), ("gradient_checkpointing", 1),
            ("kept_activation_bytes", -1), ("learning_rate", True),
        ):
            with self.subTest(f"{field} {value}"):
                training = {**TRAINING, field: value}
                attach = self.loaded().say("attach_adapter", adapter=str(self.adapter), training=training)
                self.assert_error(self.last(attach), "protocol", field)
        del training["learning_rate"]
        attach = self.loaded().say("attach_adapter", adapter=str(self.adapter), training=training)
        self.assert_error(self.last(attach), "protocol", "learning_rate")

    def test_whole_numbers_will_do_for_settings(self) -> None:
        training = {**TRAINING, "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 1}
        attach = self.loaded().say("attach_adapter", adapter=str(self.adapter), training=training)
        self.assertIn("result", self.last(attach))


class BatchesOfACall(ServeTest):
    def test_batches_without_a_loss_are_refused_but_a_part_may_be(self) -> None:
        silent = {**BATCH, "labels": [[-100] * 4, [-100] * 4]}
        self.batches = write_batches(self.folder / "mixed.jsonl", BATCH, silent)
        self.assert_error(
            self.last(self.loaded().say("evaluate", batches=self.lines(1))), "input", "mixed.jsonl", "has a loss"
        )
        self.assertIn("result", self.last(self.loaded().say("evaluate", batches=self.lines(0, 1))))

    def test_a_file_is_read_once(self) -> None:
        conversation = self.loaded().say("evaluate", batches=self.lines())

        engine = FakeEngine()
        evaluate = engine.model.evaluate
        engine.model.evaluate = lambda batches: (self.batches.unlink(missing_ok=True), evaluate(batches))[1]
        answers = conversation.say("evaluate", batches=self.lines()).answers(engine)
        self.assertIn("result", answers[-1])


if __name__ == "__main__":
    unittest.main()
