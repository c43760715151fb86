"""What the `peft` engine does itself; that it computes the right thing is for `evalfw verify`."""

from __future__ import annotations

import importlib.util
import os
import unittest
from unittest import mock

import support  # noqa: F401  (puts the package on the path)

from evalfw_engines.errors import Input

MISSING = [name for name in ("torch", "transformers", "peft", "bitsandbytes") if importlib.util.find_spec(name) is None]


@unittest.skipIf(MISSING, f"the engine's own libraries are not in this Python: {', '.join(MISSING)}")
class Peft(unittest.TestCase):
    def test_nf4_is_decoded_block_after_block_across_rows(self) -> None:
        import torch
        from bitsandbytes import functional

        from evalfw_engines.engines.peft import decoding

        levels = functional.get_4bit_type("nf4", device="cpu")
        codes = torch.arange(4 * 24) % 16
        packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
        scales = torch.tensor([2.0, 3.0])
        got = decoding.decode(packed, scales, 64, "nf4", [4, 24], torch.float32)
        for index, code in enumerate(codes.tolist()):
            expected = levels[code] * (2.0 if index < 64 else 3.0)
            self.assertEqual(got.reshape(-1)[index], expected)

    def test_an_unknown_device_or_type_is_refused_by_the_variable_s_name(self) -> None:
        from evalfw_engines.engines.peft.device import Device

        for variable in ("EVALFW_DEVICE", "EVALFW_COMPUTE_DTYPE"):
            with mock.patch.dict(os.environ, {variable: "abacus"}), self.assertRaises(Input) as raised:
                Device.open()
            self.assertIn(variable, raised.exception.message)
            self.assertIn("abacus", raised.exception.message)

    def test_a_cpu_computes_in_bf16_only_where_it_has_instructions_for_it(self) -> None:
        from evalfw_engines import about
        from evalfw_engines.engines.peft.device import Device

        for flags, override, expected in (
            ({"avx2"}, "", "f32"), ({"avx512_bf16"}, "", "bf16"), ({"amx_bf16"}, "", "bf16"),
            ({"avx2"}, "bf16", "bf16"), ({"avx512_bf16"}, "f32", "f32"),
        ):
            variables = {"EVALFW_DEVICE": "cpu", "EVALFW_COMPUTE_DTYPE": override}
            with mock.patch.dict(os.environ, variables), mock.patch.object(about, "cpu_flags", lambda: flags):
                self.assertEqual(Device.open().compute, expected)


if __name__ == "__main__":
    unittest.main()
