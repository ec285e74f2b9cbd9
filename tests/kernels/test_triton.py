"""Triton kernels against the plain path, in Triton's interpreter and on a device.

Without a CUDA device the kernels run in the interpreter (see conftest.py), with one compiled.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tutelage
from helpers import DEFAULT_PRESETS
from tutelage.kernels import (
    packed_linear_cuda,
    scaled_integer_linear,
    triton_packed_linear,
    triton_status,
    triton_weight_only_linear,
)
from tutelage.kernels._triton import _entry, _status
from tutelage.nn import QuantLinear
from tutelage.quantizers import (
    BINARY,
    FOUR_LEVEL,
    TERNARY,
    Grid,
    Quantized,
    UniformQuantizer,
    UnsignedQuantizer,
    pack,
    packed_width,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GRIDS = pytest.mark.parametrize(
    "grid", [TERNARY, FOUR_LEVEL, BINARY], ids=["ternary", "four-level", "binary"]
)
# (inputs, outputs): single ones, tails of bytes, words and tiles, whole tiles, several blocks
SHAPES = [(1, 1), (3, 5), (16, 33), (33, 16), (96, 17), (130, 40), (256, 40), (4128, 9)]


def needs_triton(test: Any) -> Any:
    return pytest.mark.skipif(not HAS_TRITON, reason="needs triton")(test)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if not HAS_TRITON:
        pytest.skip("needs triton")
    if (request.param == "interpreter") != INTERPRETED:
        pytest.skip("TRITON_INTERPRET is read once, when triton is imported")
    return "cpu" if request.param == "interpreter" else "cuda"


def weights(grid: Grid, outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes, float32, and one scale a row."""
    made = torch.Generator().manual_seed(seed)
    index = torch.randint(grid.levels, (outputs, inputs), generator=made)
    return (index * grid.step + grid.lo).float(), torch.rand(outputs, 1, generator=made) + 0.01


def tokens_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, top: int) -> np.ndarray:
    """The contract, one number at a time in numpy's float32."""
    rows = []
    for token in x.numpy():
        largest = np.abs(token).max() if token.size else np.float32(0)
        s = np.float32(largest) / np.float32(top)
        s = np.float32(1) if s < np.finfo(np.float32).tiny else s
        quantized = np.rint(token / s).astype(np.int64)
        acc = (codes.numpy().astype(np.int64) @ quantized).astype(np.float32)
        y = (acc * s) * scale.numpy().reshape(-1)
        rows.append(y if bias is None else y + bias.numpy())
    return np.stack(rows)


def run(
    device: str,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Grid,
    levels: int = 127,
) -> Tensor:
    y = triton_packed_linear(
        x.to(device),
        pack(codes, grid).to(device),
        scale.to(device),
        None if bias is None else bias.to(device),
        codes.shape[1],
        grid,
        levels,
    )
    assert y.dtype == torch.float32
    return y.cpu()


class TestQuantized:
    @GRIDS
    @pytest.mark.parametrize(
        ("tokens", "shape"),
        [*((1, shape) for shape in SHAPES), *((3, shape) for shape in SHAPES), (17, (40, 33))],
        ids=str,
    )
    def test_equals_the_formula(
        self, device: str, grid: Grid, shape: tuple[int, int], tokens: int
    ) -> None:
        codes, scale = weights(grid, shape[1], shape[0])
        x, bias = tokens_of(tokens, shape[0]), tokens_of(shape[1], seed=2)
        got = run(device, x, codes, scale, bias, grid)
        assert np.array_equal(got.numpy(), by_hand(x, codes, scale, bias, 127))

    @pytest.mark.parametrize("preset", DEFAULT_PRESETS)
    @pytest.mark.parametrize("tokens", [1, 5])
    def test_equals_the_layer_of_every_preset(
        self, device: str, preset: str, tokens: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_entry, "serves", lambda _: True)
        spec = tutelage.Scheme.preset(preset).linear("any")
        assert spec is not None
        assert spec.weight is not None
        assert spec.input is not None
        layer = QuantLinear.from_linear(
            torch.nn.Linear(48, 19), spec.weight.build(), spec.input.build(), spec.arithmetic
        )
        x = tokens_of(3, tokens, 48)[:: 1 if tokens > 1 else 3]
        quantized = layer.weight_quantizer.quantize(layer.weight)
        grid = layer.weight_quantizer.grid
        got = packed_linear_cuda(
            x.to(device),
            pack(quantized.codes, grid).to(device),
            quantized.scale.to(device),
            layer.bias.detach().to(device),
            48,
            grid,
            layer.input_quantizer,
            spec.arithmetic,
        )
        assert got is not None
        assert torch.equal(got.cpu(), layer(x).detach())

    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_other_floats_are_widened(self, device: str, dtype: torch.dtype, tokens: int) -> None:
        codes, scale = weights(TERNARY, 9, 64)
        x = tokens_of(tokens, 64).to(dtype)
        got = run(device, x, codes, scale, None, TERNARY)
        assert np.array_equal(got.numpy(), by_hand(x.float(), codes, scale, None, 127))

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_ties_go_to_even(self, device: str, tokens: int) -> None:
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] * 4] * tokens)
        for at in range(8):
            codes = torch.full((1, 32), -1.0)
            codes[0, at] = 1.0
            got = run(device, x, codes, torch.ones(1, 1), None, TERNARY)
            assert np.array_equal(got.numpy(), by_hand(x, codes, torch.ones(1, 1), None, 127))

    @pytest.mark.parametrize("tokens", [1, 4])
    def test_quotients_are_divided_not_multiplied(self, device: str, tokens: int) -> None:
        # Next to ties x * (1 / s) goes to the other code for some; one-hot weights show it.
        top = tokens_of(tokens, 1, seed=127).abs() + 1
        s = top / 127
        ties = (torch.arange(63) + 0.5) * s
        x = torch.cat([top, torch.nextafter(ties, torch.zeros(()))], 1)
        x[:, 2::3] = torch.nextafter(ties, top)[:, 1::3]
        x[:, 3::3] = ties[:, 2::3]
        assert not torch.equal((x / s).round(), (x * s.reciprocal()).round())
        codes = torch.eye(64)
        got = run(device, x, codes, torch.ones(64, 1), None, TERNARY)
        assert np.array_equal(got.numpy(), by_hand(x, codes, torch.ones(64, 1), None, 127))

    @pytest.mark.parametrize("width", [32, 33])
    @pytest.mark.parametrize("top", [0.0, 1e-45, 1e-40, 1.4e-36, 1.6e-36, 1e-30, 1e36])
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_scales_at_the_ends_of_float32(
        self, device: str, top: float, tokens: int, width: int
    ) -> None:
        codes, scale = weights(TERNARY, 5, width)
        x = tokens_of(tokens, width)
        x = x / x.abs().max() * top
        got = run(device, x, codes, scale, None, TERNARY)
        expected = scaled_integer_linear(
            UniformQuantizer(8).quantize(x), Quantized(codes, scale), None
        )
        assert np.array_equal(got.numpy(), by_hand(x, codes, scale, None, 127))
        assert torch.equal(got, expected)

    def test_a_row_of_zeros_gives_the_bias(self, device: str) -> None:
        codes, scale = weights(FOUR_LEVEL, 7, 64)
        x = tokens_of(3, 64)
        x[1] = 0.0
        bias = tokens_of(7)
        assert torch.equal(run(device, x, codes, scale, bias, FOUR_LEVEL)[1], bias)
        assert torch.equal(run(device, x[1:2], codes, scale, bias, FOUR_LEVEL)[0], bias)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_spoils_its_own_token_only(self, device: str, bad: float) -> None:
        codes, scale = weights(TERNARY, 7, 64)
        x = tokens_of(3, 64)
        x[1, 5] = bad
        got = run(device, x, codes, scale, None, TERNARY)
        assert got[1].isnan().all()
        good = by_hand(x[::2], codes, scale, None, 127)
        assert np.array_equal(got[::2].numpy(), good)
        assert run(device, x[1:2], codes, scale, None, TERNARY).isnan().all()

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_one_scale_for_the_whole_weight(self, device: str, tokens: int) -> None:
        codes, _ = weights(TERNARY, 21, 64)
        x, scale = tokens_of(tokens, 64), torch.full((1, 1), 0.3)
        got = run(device, x, codes, scale, None, TERNARY)
        assert np.array_equal(got.numpy(), by_hand(x, codes, scale, None, 127))

    @pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (2, 3), (1, 1, 1)], ids=str)
    def test_batches(self, device: str, batch: tuple[int, ...]) -> None:
        codes, scale = weights(TERNARY, 6, 32)
        x = tokens_of(*batch, 32)
        got = run(device, x, codes, scale, tokens_of(6), TERNARY)
        assert got.shape == (*batch, 6)
        if x.numel():
            flat = by_hand(x.reshape(-1, 32), codes, scale, tokens_of(6), 127)
            assert np.array_equal(got.reshape(-1, 6).numpy(), flat)

    def test_strided_tokens_and_bytes_that_start_anywhere(self, device: str) -> None:
        codes, scale = weights(TERNARY, 6, 32)
        x = tokens_of(32, 4).t()
        expected = by_hand(x.contiguous(), codes, scale, None, 127)
        assert np.array_equal(run(device, x, codes, scale, None, TERNARY).numpy(), expected)
        holder = torch.zeros(1 + 6 * 8, dtype=torch.uint8)
        holder[1:] = pack(codes, TERNARY).reshape(-1)
        packed = holder.to(device)[1:].view(6, 8)
        for rows in (1, 4):
            y = triton_packed_linear(
                x[:rows].to(device), packed, scale.to(device), None, 32, TERNARY, 127
            )
            assert np.array_equal(y.cpu().numpy(), expected[:rows])

    def test_the_largest_sums(self, device: str) -> None:
        x = torch.full((2, 1024), 5.0)
        codes = torch.full((3, 1024), 3.0)
        for rows in (1, 2):
            got = run(device, x[:rows], codes, torch.ones(3, 1), None, FOUR_LEVEL)
            scale = np.float32(5.0) / np.float32(127)
            assert (got.numpy() == np.float32(1024 * 127 * 3) * scale).all()


class TestWeightOnly:
    @GRIDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("tokens", "inputs"), [(1, 64), (3, 70), (17, 33)])
    def test_close_to_float64(
        self, device: str, grid: Grid, dtype: torch.dtype, tokens: int, inputs: int
    ) -> None:
        codes, scale = weights(grid, 18, inputs)
        x, bias = tokens_of(tokens, inputs).to(dtype), tokens_of(18, seed=3)
        operands = (x, pack(codes, grid), scale, bias)
        y = triton_weight_only_linear(*(t.to(device) for t in operands), inputs, grid)
        exact = x.double() @ (codes * scale).double().t() + bias
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.cpu().double(), exact, rtol=0.0, atol=2e-5)

    @pytest.mark.parametrize(
        ("dtype", "largest"),
        [(torch.float32, 2**24 - 1), (torch.bfloat16, 255), (torch.float16, 2047)],
        ids=str,
    )
    def test_no_bit_of_an_input_is_lost(
        self, device: str, dtype: torch.dtype, largest: int
    ) -> None:
        # One weight that counts: float32 goes through three bfloat16 numbers of 8 bits each.
        x = torch.tensor([[largest, -largest, largest // 3, 1.0]]).to(dtype)
        codes = torch.eye(4)
        y = triton_weight_only_linear(
            x.to(device), pack(codes, TERNARY).to(device), torch.ones(4, 1, device=device), None,
            4, TERNARY,
        )  # fmt: skip
        assert torch.equal(y.cpu(), x.float())


class TestOperators:
    @pytest.mark.parametrize("name", ["triton_packed_linear", "triton_weight_only_linear"])
    def test_shapes_without_triton(self, name: str) -> None:
        x = torch.empty(2, 3, 32, dtype=torch.bfloat16, device="meta")
        packed = torch.empty(6, 8, dtype=torch.uint8, device="meta")
        scale = torch.empty(6, 1, device="meta")
        numbers = (32, 2, -1, 1, 127)[: 5 if "packed" in name else 4]
        y = getattr(torch.ops.tutelage, name)(x, packed, scale, None, *numbers)
        assert (y.shape, y.dtype) == ((2, 3, 6), torch.float32)

    def test_follow_the_rules_of_operators(self, device: str) -> None:
        codes, scale = weights(TERNARY, 6, 32)
        operands = [t.to(device) for t in (tokens_of(2, 32), pack(codes, TERNARY), scale)]
        tests = ("test_schema", "test_faketensor")
        for op, numbers in (
            (torch.ops.tutelage.triton_packed_linear, (32, 2, -1, 1, 127)),
            (torch.ops.tutelage.triton_weight_only_linear, (32, 2, -1, 1)),
        ):
            for bias in (None, torch.zeros(6, device=device)):
                torch.library.opcheck(op.default, (*operands, bias, *numbers), test_utils=tests)

    @needs_triton
    def test_compiled_graphs_hold_the_operator(self) -> None:
        # In a process without the checks of shapes, which torch.compile cannot trace.
        script = Path(__file__).with_name("triton_compile.py")
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["plain", "operator", "equal"]


class TestEntry:
    def call(self, quantizer: Any, arithmetic: str = "integer", **more: Any) -> Tensor | None:
        codes, scale = weights(TERNARY, 6, more.get("width", 32))
        x = more.get("x", tokens_of(2, codes.shape[1]))
        packed = more.get("packed", pack(codes, TERNARY))
        return packed_linear_cuda(
            x, packed, scale, None, codes.shape[1], TERNARY, quantizer, arithmetic
        )

    def test_leaves_the_cpu_to_others(self) -> None:
        assert self.call(UniformQuantizer(8)) is None

    @needs_triton
    @pytest.mark.skipif(not INTERPRETED, reason="stands on the interpreter")
    @pytest.mark.parametrize(
        ("quantizer", "arithmetic"),
        [
            (UniformQuantizer(8), "float"),
            (UniformQuantizer(8, "tensor"), "integer"),
            (UniformQuantizer(8, clip=2.5), "integer"),
            (UniformQuantizer(8, reciprocal=True), "integer"),
            (UnsignedQuantizer(8), "integer"),
        ],
        ids=["float", "tensor", "clip", "reciprocal", "unsigned"],
    )
    def test_what_it_does_not_compute_it_leaves_to_the_plain_path(
        self, quantizer: Any, arithmetic: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_entry, "serves", lambda _: True)
        assert self.call(UniformQuantizer(8)) is not None
        assert self.call(quantizer, arithmetic) is None

    @needs_triton
    @pytest.mark.skipif(not INTERPRETED, reason="stands on the interpreter")
    def test_refuses_what_is_not_exact_or_does_not_fit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_entry, "serves", lambda _: True)
        widest = (2**24 - 1) // 127
        packed = torch.zeros(6, packed_width(widest + 1, TERNARY), dtype=torch.uint8)
        x = torch.zeros(1, widest + 1)
        quantizer = UniformQuantizer(8)
        assert self.call(quantizer, width=widest + 1, x=x, packed=packed) is None
        assert self.call(quantizer, packed=torch.zeros(8, 6, dtype=torch.uint8).t()) is None
        assert self.call(quantizer, packed=torch.zeros(6, 9, dtype=torch.uint8)) is None
        assert self.call(None, x=tokens_of(2, 32).requires_grad_()) is None
        with torch.no_grad():
            assert self.call(None, x=tokens_of(2, 32).requires_grad_()) is not None
        y = self.call(quantizer, x=tokens_of(2, 32).requires_grad_())
        assert y is not None
        assert not y.requires_grad


class TestStatus:
    @pytest.fixture
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """Pretends that there is an H100."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
        monkeypatch.setattr(_status, "_REASONS", {})
        monkeypatch.setattr(_status, "_INSTALLED", True)
        return monkeypatch

    def test_says_why_not(self, hopper: pytest.MonkeyPatch) -> None:
        assert triton_status("cpu").startswith("inactive: the kernels need a CUDA device")
        with hopper.context() as patch:
            patch.setattr(_status, "_INSTALLED", False)
            assert "triton is not installed" in triton_status("cuda")
            assert not _status.serves(torch.device("cuda"))
        with hopper.context() as patch:
            patch.setenv("TUTELAGE_TRITON", "0")
            assert "TUTELAGE_TRITON=0" in triton_status("cuda")
        with hopper.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            assert triton_status("cuda") == "inactive: torch sees no CUDA device"
        hopper.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "7, 5" in triton_status("cuda")
        assert not _status.serves(torch.device("cuda"))

    @needs_triton
    def test_active_once_a_product_was_right(self, hopper: pytest.MonkeyPatch) -> None:
        tried: list[torch.device] = []
        hopper.setattr(_status, "_check", lambda device: tried.append(device) or "")
        assert triton_status().startswith("active: Triton")
        assert triton_status().endswith("on H100 (sm_90)")
        assert _status.serves(torch.device("cuda", 0))
        assert tried == [torch.device("cuda", 0)]

    @pytest.mark.parametrize("how", ["raises", "wrong"])
    def test_a_first_kernel_that_fails_is_told_once(
        self, hopper: pytest.MonkeyPatch, how: str
    ) -> None:
        def check(_: torch.device) -> str:
            if how == "raises":
                raise RuntimeError("no C compiler")
            return "5 tokens"

        hopper.setattr(_status, "_check", check)
        with pytest.warns(RuntimeWarning, match="no C compiler|wrong"):
            assert not _status.serves(torch.device("cuda", 0))
        assert triton_status().startswith("inactive: ")  # and no second warning
        assert not _status.serves(torch.device("cuda", 0))

    def test_the_check_sees_a_wrong_product(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tutelage.kernels._triton import _launch

        assert _status._check(torch.device(device)) == ""
        for name, what in (("weight_only", "bfloat16"), ("quantized", "quantized")):
            right = getattr(_launch, name)
            monkeypatch.setattr(_launch, name, lambda *a, right=right, **k: right(*a, **k) + 1)
            assert _status._check(torch.device(device)) == f"1 {what} tokens"


@needs_triton
class TestTiles:
    @pytest.mark.parametrize("shared", [99, 163, 227])
    @pytest.mark.parametrize("terms", [0, 1, 3])
    @pytest.mark.parametrize("bits", [1, 2])
    def test_every_number_of_tokens_has_some(self, bits: int, terms: int, shared: int) -> None:
        from tutelage.kernels._triton._tiles import tiles

        for bucket in (8, 16, 32, 64, 128, 256, 4096):
            found = tiles(bucket, bits, terms, shared * 1024)
            assert found
            assert all(tile[0] <= bucket for tile in found)
            assert tiles(bucket, bits, terms, 227 * 1024)[0] in found or shared < 227


@needs_triton
def test_compiled_code_is_what_the_contract_needs() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_ptx.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["gemm_small"]["mma_int8"]
    assert counts["gemm_large"]["wgmma_int8"]
    assert counts["weight_only"]["wgmma_bf16"]
    assert counts["gemv"]["dp4a"]
    for name in ("gemv", "quantize"):
        assert counts[name]["division"] == 17  # one scale, 16 quotients a thread
        assert counts[name]["wide_loads"] >= 4
    for name in ("gemm_small", "gemm_large"):
        assert counts[name]["wide_copies"]
        assert not counts[name]["narrow_copies"]
    for name, count in counts.items():
        assert not count["approximate_division"], name
        assert not count["fused"], name
    uniform = counts["row_uniform"]  # rounding by adding and subtracting is not simplified away
    assert uniform["lifted"] == uniform["lowered"] == uniform["division"] - 1 == 8
    assert counts["row_weight"]["division"] == 2
    assert counts["row_weight"]["float64"]
