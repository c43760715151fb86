"""Batches, checkpoints and adapters that are wrong: the error names the file and the field."""

from __future__ import annotations

import importlib.util
import json
import struct
import tempfile
import unittest
from pathlib import Path

from support import (
    BATCH, CONFIG, RANK, SHAPE, Values, adapter_values, write_adapter, write_batches, write_checkpoint,
)

from evalfw_engines import checkpoint, lora, tensor_file
from evalfw_engines.batches import Batch, read_batches
from evalfw_engines.errors import EngineError, Framework, Input

HAS_NUMPY = importlib.util.find_spec("numpy") is not None


class FilesTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assert_input_error(self, work, *words: object) -> None:
        with self.assertRaises(Input) as raised:
            work()
        for word in words:
            self.assertIn(str(word), raised.exception.message)


class Batches(FilesTest):
    def read(self, vocab_size: int = 12) -> list[Batch]:
        return read_batches(self.folder / "b.jsonl", vocab_size)

    def refused(self, batch: object, *words: str) -> None:
        text = batch if isinstance(batch, str) else json.dumps(batch)
        (self.folder / "b.jsonl").write_text(json.dumps(BATCH) + "\n" + text + "\n")
        with self.subTest(text[:60]):
            self.assert_input_error(self.read, "b.jsonl: line 2", *words)

    def test_the_tokens_with_a_loss_are_counted(self) -> None:
        write_batches(self.folder / "b.jsonl")
        (batch,) = self.read()
        self.assertEqual(batch, Batch(**BATCH))
        self.assertEqual((batch.trained_tokens(), batch.slots), (4, 4))
        self.assertEqual(batch.attention_mask(), [[1, 1, 1, 0], [1, 1, 1, 1]])
        # Nothing predicts a first token.
        self.assertEqual(Batch([[1, 2]], [[1, 2]], [2]).trained_tokens(), 1)

    def test_shapes_padding_and_ids_are_checked(self) -> None:
        self.refused({**BATCH, "input_ids": []}, "input_ids is empty")
        self.refused({**BATCH, "input_ids": [[]]}, "input_ids is empty")
        self.refused({**BATCH, "lengths": [3]}, "number of examples")
        self.refused({**BATCH, "input_ids": [[5, 6, 7, 0], [8]]}, "example 1", "4 slots")
        self.refused({**BATCH, "lengths": [5, 4]}, "example 0 has a length of 5, but only 4 slots")
        self.refused({**BATCH, "lengths": [3, 2]}, "example 1 has a label at slot 2")
        self.refused({**BATCH, "input_ids": [[5, 6, 7, 0], [8, 9, 1, 12]]}, "token id 12", "vocabulary of 12")
        self.refused({**BATCH, "labels": [[-100, -100, 7, -100], [-100, 9, 1, 12]]}, "label 12")
        self.refused({**BATCH, "labels": [[-100, -100, 7, -100], [-100, 9, 1, -1]]}, "label -1")

    def test_what_is_no_batch_is_named_by_field(self) -> None:
        self.refused({"input_ids": [[1]]}, "labels")
        self.refused({**BATCH, "input_ids": [[5, 6, 7, "0"], [8, 9, 1, 2]]}, "input_ids")
        self.refused({**BATCH, "input_ids": [[5, 6, 7, True], [8, 9, 1, 2]]}, "input_ids")
        self.refused({**BATCH, "input_ids": [[5, 6, 7, -1], [8, 9, 1, 2]]}, "input_ids")
        self.refused({**BATCH, "labels": 3}, "labels")
        self.refused({**BATCH, "lengths": [3, 4.0]}, "lengths")
        self.refused({**BATCH, "lengths": [3, -4]}, "lengths")
        self.refused("[]", "not an object")
        self.refused("", "line 2")
        self.refused("[" * 100_000, "line 2")

    def test_a_file_that_cannot_be_read_is_named(self) -> None:
        self.assert_input_error(self.read, "b.jsonl")
        (self.folder / "b.jsonl").write_bytes(b"\xff\xfe\n")
        self.assert_input_error(self.read, "b.jsonl")

    def test_an_empty_file_has_no_batches(self) -> None:
        (self.folder / "b.jsonl").write_text("")
        self.assertEqual(self.read(), [])


class Checkpoints(FilesTest):
    def refused(self, *words: object) -> None:
        self.assert_input_error(lambda: checkpoint.Checkpoint.open(self.folder), *words)

    def test_parameters_bytes_and_shards(self) -> None:
        opened = checkpoint.Checkpoint.open(write_checkpoint(self.folder))
        # Embedding 80; a layer: q 64+8, k and v 32+4 each, o 64, mlp 3*96, norms 16; last norm 8.
        self.assertEqual(opened.config.parameters(), 80 + 2 * (72 + 36 + 36 + 64 + 288 + 16) + 8)
        self.assertEqual(opened.bytes(), 4 * opened.config.parameters())
        self.assertTrue(opened.config.tie_word_embeddings)
        self.assertFalse(opened.is_sharded())

    def test_shards_are_found_through_the_index(self) -> None:
        write_checkpoint(self.folder)
        (self.folder / checkpoint.SINGLE_FILE).unlink()
        names = list(SHAPE.tensors())
        parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, part in parts.items():
            tensor_file.write(self.folder / file, {name: Values(SHAPE.tensors()[name]) for name in part})
        index = self.folder / checkpoint.INDEX_FILE
        index.write_text(json.dumps({"weight_map": {n: file for file, part in parts.items() for n in part}}))
        self.assertTrue(checkpoint.Checkpoint.open(self.folder).is_sharded())
        (self.folder / "b.safetensors").unlink()
        self.refused("b.safetensors", "shard is missing")
        for name in ("../b.safetensors", "/b", "..", 3):
            index.write_text(json.dumps({"weight_map": {"x": name}}))
            self.refused(checkpoint.INDEX_FILE, "weight_map")
        for text in ("{", "[]", "{}", '{"weight_map": 3}'):
            index.write_text(text)
            self.refused(checkpoint.INDEX_FILE)

    def test_what_is_not_there_is_named(self) -> None:
        self.assert_input_error(lambda: checkpoint.Checkpoint.open(self.folder / "x"), "x", "not a folder")
        self.refused("config.json")
        write_checkpoint(self.folder)
        (self.folder / checkpoint.SINGLE_FILE).unlink()
        self.refused("has neither")

    def test_a_tensor_that_does_not_fit_is_named(self) -> None:
        write_checkpoint(self.folder, {**CONFIG, "num_hidden_layers": 3})
        self.refused("model.layers.2.input_layernorm.weight")
        write_checkpoint(self.folder, {**CONFIG, "vocab_size": 11})
        self.refused("model.safetensors", "model.embed_tokens.weight has shape [10, 8]", "[11, 8]")

    def test_fields_that_no_engine_implements_are_refused(self) -> None:
        for field, value in (
            ("model_type", "llama"), ("architectures", ["Qwen2MoeForCausalLM"]), ("use_sliding_window", True),
            ("rope_scaling", {"type": "yarn"}), ("rope_parameters", {"rope_type": "yarn"}), ("hidden_act", "gelu"),
            ("hidden_size", 0), ("hidden_size", "8"), ("num_hidden_layers", 4_000_000_000),
            ("num_key_value_heads", 3), ("quantization_config", {}), ("head_dim", 3), ("vocab_size", None),
            ("tie_word_embeddings", "yes"),
        ):
            with self.subTest(f"{field} {value}"):
                write_checkpoint(self.folder, {**CONFIG, field: value})
                self.refused("config.json", "key_value" if field == "num_key_value_heads" else field)

    def test_a_config_that_is_no_object_is_refused(self) -> None:
        write_checkpoint(self.folder)
        for text in ("[]", "{", "[" * 100_000, "\0"):
            (self.folder / "config.json").write_text(text)
            self.refused("config.json")

    def test_a_tied_head_may_be_stored_only_as_a_copy(self) -> None:
        write_checkpoint(self.folder)
        tensors = {name: Values(shape) for name, shape in SHAPE.tensors().items()}
        for value, wrong in ((0.0, False), (1.0, True)):
            head = Values(SHAPE.tensors()[checkpoint.EMBEDDING], value)
            tensor_file.write(self.folder / checkpoint.SINGLE_FILE, {**tensors, checkpoint.HEAD: head})
            if wrong:
                self.refused(checkpoint.HEAD, "tie_word_embeddings")
            else:
                checkpoint.Checkpoint.open(self.folder)


class TensorFiles(FilesTest):
    def refused(self, content: bytes, *words: str) -> None:
        path = self.folder / "t.safetensors"
        path.write_bytes(content)
        self.assert_input_error(lambda: tensor_file.read_header(path), "t.safetensors", *words)

    def test_truncated_and_foreign_files_are_refused(self) -> None:
        path = self.folder / "whole.safetensors"
        tensor_file.write(path, {"x": Values((2, 3))})
        whole = path.read_bytes()
        self.assertEqual(tensor_file.read_header(path)["x"].shape, (2, 3))
        self.refused(b"", "truncated")
        self.refused(whole[:7], "truncated")
        self.refused(whole[:20], "truncated")
        self.refused(whole[:-1], "truncated")
        self.refused(whole + b"x", "too long")
        self.refused(struct.pack("<Q", 2**63) + b"{}", "header")
        self.refused(b"PK\x03\x04" * 10)

    def test_headers_that_lie_are_refused(self) -> None:
        good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        for header in (
            "[]", "{", '{"x": 3}', '{"x": {}}',
            json.dumps({"x": {**good, "dtype": "F13"}}), json.dumps({"x": {**good, "shape": [2]}}),
            json.dumps({"x": {**good, "shape": [-1]}}), json.dumps({"x": {**good, "data_offsets": [4, 0]}}),
            json.dumps({"x": {**good, "data_offsets": [0]}}), json.dumps({"x": {**good, "shape": ["1"]}}),
            json.dumps({"x": {**good, "dtype": []}}),
        ):
            with self.subTest(header):
                self.refused(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4, "header")

    @unittest.skipUnless(HAS_NUMPY, "values are numpy's, and this Python has none")
    def test_values_are_widened_and_must_be_finite(self) -> None:
        path = self.folder / "t.safetensors"
        for dtype, content, expected in (
            ("F32", struct.pack("<2f", 1.5, -2.0), [1.5, -2.0]),
            ("F16", struct.pack("<2e", 1.5, -2.0), [1.5, -2.0]),
            ("BF16", b"\xc0\x3f\x00\xc0", [1.5, -2.0]),
        ):
            header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, len(content)]}}).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + content)
            values = tensor_file.read_values("x", tensor_file.read_header(path)["x"])
            self.assertEqual((values.dtype.name, values.tolist()), ("float32", expected))
        tensor_file.write(path, {"x": Values((3,), float("nan"))})
        self.assert_input_error(
            lambda: tensor_file.read_values("x", tensor_file.read_header(path)["x"]), "x is not finite at element 0"
        )


class Adapters(FilesTest):
    def setUp(self) -> None:
        super().setUp()
        write_adapter(self.folder)
        self.config = json.loads((self.folder / lora.CONFIG_FILE).read_text())

    def read(self) -> lora.Adapter:
        return lora.Adapter.read(self.folder, SHAPE)

    def with_config(self, **fields: object) -> None:
        (self.folder / lora.CONFIG_FILE).write_text(json.dumps({**self.config, **fields}))

    def test_what_was_written_is_read(self) -> None:
        adapter = self.read()
        self.assertEqual((adapter.config, adapter.config.scale), (lora.LoraConfig(RANK, 4.0, 0.1), 2.0))
        self.assertEqual(list(adapter.found), list(lora.tensor_shapes(SHAPE, RANK)))

    @unittest.skipUnless(HAS_NUMPY, "values are numpy's, and this Python has none")
    def test_values_survive_the_disk(self) -> None:
        tensors = self.read().tensors()
        self.assertTrue(all((values == 0.5).all() for values in tensors.values()))

    def test_what_has_no_effect_is_read(self) -> None:
        for field, value in (
            ("task_type", None), ("revision", "main"), ("modules_to_save", []), ("init_lora_weights", "gaussian"),
            ("init_lora_weights", False), ("eva_config", {"rho": 2.0}), ("an_option_of_tomorrow", None),
            ("rank_pattern", {}), ("layers_to_transform", []), ("peft_version", "9"), ("target_modules", "all-linear"),
            ("target_modules", ".*_proj"), ("target_modules", [*checkpoint.PROJECTIONS, "not_there"]),
        ):
            with self.subTest(f"{field} {value}"):
                self.with_config(**{field: value})
                self.read()

    def test_what_changes_the_computation_is_refused_by_field(self) -> None:
        for field, value in (
            ("peft_type", "LOHA"), ("task_type", "SEQ_CLS"), ("bias", "all"), ("alpha_pattern", {"q_proj": 40}),
            ("rank_pattern", {"q_proj": 3}), ("use_dora", True), ("use_rslora", True), ("fan_in_fan_out", True),
            ("modules_to_save", ["lm_head"]), ("layers_to_transform", 0), ("velora_config", {}),
            ("an_option_of_tomorrow", 1), ("init_lora_weights", "pissa"), ("init_lora_weights", ["eva"]),
            ("r", 0), ("r", 2.0), ("r", True), ("lora_alpha", None), ("lora_alpha", "4"), ("lora_dropout", 1.0),
            ("lora_dropout", "0"), ("target_modules", None), ("target_modules", []), ("target_modules", 3),
            ("target_modules", ["q_proj"]), ("target_modules", ".*"), ("target_modules", "(q_proj"),
            ("target_modules", [*checkpoint.PROJECTIONS, "lm_head"]), ("target_modules", "_proj"),
        ):
            with self.subTest(f"{field} {value}"):
                self.with_config(**{field: value})
                self.assert_input_error(self.read, lora.CONFIG_FILE, field)

    def test_an_adapter_for_another_shape_is_refused(self) -> None:
        self.with_config(r=3)
        self.assert_input_error(self.read, lora.WEIGHTS_FILE, "q_proj.lora_A.weight has shape [2, 8], expected [3, 8]")

    def test_missing_and_superfluous_tensors_are_refused(self) -> None:
        path = self.folder / lora.WEIGHTS_FILE
        values = adapter_values(1.0)
        first = next(iter(values))
        tensor_file.write(path, {name: value for name, value in values.items() if name != first})
        self.assert_input_error(self.read, lora.WEIGHTS_FILE, first, "missing")
        tensor_file.write(path, {**values, "x": Values((1,))})
        self.assert_input_error(self.read, lora.WEIGHTS_FILE, "holds 29 tensors")

    def test_missing_and_broken_files_are_named(self) -> None:
        for name, content in ((lora.CONFIG_FILE, b"{"), (lora.CONFIG_FILE, b"\xff"), (lora.WEIGHTS_FILE, b"{}")):
            path = self.folder / name
            kept = path.read_bytes()
            path.write_bytes(content)
            self.assert_input_error(self.read, name)
            path.unlink()
            self.assert_input_error(self.read, name)
            path.write_bytes(kept)

    def test_gradients_of_another_shape_are_the_framework_s_fault(self) -> None:
        values = {**adapter_values(1.0), lora.tensor_name(1, "k_proj", "B"): Values((1, 1))}
        with self.assertRaises(Framework) as raised:
            lora.write_tensors(self.folder / "g", values, SHAPE, RANK)
        self.assertIn("k_proj.lora_B.weight", str(raised.exception))
        self.assertIsInstance(raised.exception, EngineError)


if __name__ == "__main__":
    unittest.main()
