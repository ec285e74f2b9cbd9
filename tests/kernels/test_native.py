"""Compiled kernels against a float64 loop, against each other, and what happens without them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import same_bits
from tutelage.kernels import native, packed_linear, panel_bytes, to_panels
from tutelage.nn import QuantLinear
from tutelage.quantizers import Grid, TernaryQuantizer, UniformQuantizer
from tutelage.quantizers._grid import BINARY, FOUR_LEVEL, TERNARY

needs_native = pytest.mark.skipif(not native().active, reason=native().reason)
GRIDS = pytest.mark.parametrize(
    "grid", [BINARY, TERNARY, FOUR_LEVEL], ids=["binary", "ternary", "four-level"]
)
HERE = Path(__file__).parent
ISAS = range(len(native().isas))


def draw(rows: int, width: int, grid: Grid, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    index = torch.randint(grid.levels, (rows, width), generator=made).to(torch.uint8)
    scale = torch.rand(rows, 1, generator=made) + 0.01
    return index, scale, torch.randn(rows, generator=made)


def expected(
    x: Tensor, index: Tensor, scale: Tensor, bias: Tensor | None, grid: Grid, levels: int
) -> Tensor:
    """The contract in plain loops: integers exact in Python, every rounding to float32 by hand."""
    out = torch.empty(len(x), len(index))
    for m, row in enumerate(x):
        top = row.abs().max() if len(row) else torch.tensor(0.0)
        s = top / levels
        if s < torch.finfo(torch.float32).tiny:
            s = torch.tensor(1.0)
        codes = [round(float(v / s)) for v in row]
        for n, weights in enumerate(index.tolist()):
            total = sum(c * (grid.lo + grid.step * w) for c, w in zip(codes, weights, strict=True))
            y = torch.tensor(float(total)) * s * scale[n if len(scale) > 1 else 0, 0]
            out[m, n] = y if bias is None else y + bias[n]
    return out


@needs_native
@GRIDS
@pytest.mark.parametrize("isa", ISAS, ids=native().isas)
@pytest.mark.parametrize(
    ("count", "rows", "width"), [(1, 1, 1), (3, 5, 7), (2, 65, 70), (17, 4, 9), (5, 130, 64)]
)
def test_equals_a_plain_loop(isa: int, grid: Grid, count: int, rows: int, width: int) -> None:
    index, scale, bias = draw(rows, width, grid, seed=rows)
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(1)) * 3
    panels = to_panels(index, grid.bits)
    for levels in (127, 7, 1):
        for s, b in ((scale, bias), (scale[:1], None)):
            got = packed_linear(x, panels, s, b, rows, width, grid, levels, isa=isa)
            assert same_bits(got, expected(x, index, s, b, grid, levels))


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 70),
    rows=st.integers(1, 200),
    width=st.integers(1, 300),
    grid=st.sampled_from([BINARY, TERNARY, FOUR_LEVEL]),
    levels=st.sampled_from([127, 7]),
    seed=st.integers(0, 99),
)
def test_all_instruction_sets_agree(
    count: int, rows: int, width: int, grid: Grid, levels: int, seed: int
) -> None:
    index, scale, bias = draw(rows, width, grid, seed)
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=made)
    x *= torch.exp(torch.randn(count, 1, generator=made) * 20)
    panels = to_panels(index, grid.bits)
    assert panels.numel() == panel_bytes(rows, width, grid.bits)
    results = [
        packed_linear(x, panels, scale, bias, rows, width, grid, levels, isa=isa) for isa in ISAS
    ]
    codes, s = UniformQuantizer({127: 8, 7: 4}[levels]).quantize(x)
    weight = index.double() * grid.step + grid.lo
    want = (codes.double() @ weight.t()).float() * s * scale.reshape(-1) + bias
    for got in results:
        assert same_bits(got, want)


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=native().isas)
def test_codes_are_rounded_as_a_true_division_is(isa: int) -> None:
    # One row a scale, 512 quotients at and next to every half: a reciprocal would miss some.
    made = torch.Generator().manual_seed(0)
    tops = torch.cat(
        [torch.rand(300, generator=made) * 10, torch.tensor([1e-37, 3e38, 1.0, 127.0])]
    )
    halves = torch.arange(-127, 127) + 0.5
    rows = []
    for top in tops:
        s = top / 127
        at = halves * s
        near = torch.cat([at, torch.nextafter(at, at * 2), torch.nextafter(at, at * 0)])
        near = near.clamp(-top, top)
        rows.append(torch.cat([top.reshape(1), near]))
    x = torch.stack(rows)
    width = x.shape[1]
    index = torch.eye(width).to(torch.uint8) + 1
    got = packed_linear(
        x, to_panels(index, 2), torch.ones(1, 1), None, width, width, TERNARY, 127, isa=isa
    )
    codes, scale = UniformQuantizer().quantize(x)
    assert same_bits(got, codes * scale + 0.0)


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=native().isas)
def test_rows_without_numbers_stay_without(isa: int) -> None:
    index, scale, bias = draw(70, 40, TERNARY, seed=0)
    x = torch.randn(24, 40)
    x[3, 39], x[5, 0], x[7, 17] = math.nan, math.inf, -math.inf
    x[9] = 0.0
    y = packed_linear(x, to_panels(index, 2), scale, bias, 70, 40, TERNARY, 127, isa=isa)
    odd = torch.tensor([m in (3, 5, 7) for m in range(24)])
    assert y[odd].isnan().all()
    assert y[~odd].isfinite().all()
    assert same_bits(y[9], bias)


@needs_native
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", nn.functional.relu),
        ("gelu", nn.functional.gelu),
        ("gelu_tanh", lambda y: nn.functional.gelu(y, approximate="tanh")),
    ],
)
@pytest.mark.parametrize("isa", ISAS, ids=native().isas)
def test_activations(isa: int, activation: str, function: object) -> None:
    index, scale, bias = draw(64, 32, TERNARY, seed=3)
    x = torch.randn(40, 32) * torch.logspace(-3, 2, 40).reshape(-1, 1)
    arguments = (x, to_panels(index, 2), scale, bias, 64, 32, TERNARY, 127)
    plain = packed_linear(*arguments, isa=isa)
    got = packed_linear(*arguments, activation=activation, isa=isa)
    # AVX-512 computes erf and tanh itself; torch's own float32 erf is no nearer to float64's.
    want = function(plain.double()).float()  # type: ignore[operator]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@needs_native
def test_threads_share_the_work_and_change_nothing() -> None:
    index, scale, bias = draw(300, 512, TERNARY, seed=4)
    panels = to_panels(index, 2)
    threads = torch.get_num_threads()
    try:
        for count in (1, 30, 700):
            x = torch.randn(count, 512)
            for isa in ISAS[:3]:
                results = []
                for number in (1, 2, 3):
                    torch.set_num_threads(number)
                    y = packed_linear(x, panels, scale, bias, 300, 512, TERNARY, 127, isa=isa)
                    results.append(y)
                assert all(same_bits(results[0], y) for y in results[1:])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_the_operator_is_a_good_citizen() -> None:
    index, scale, bias = draw(20, 30, TERNARY, seed=5)
    arguments = (torch.randn(3, 30), to_panels(index, 2), scale, bias, 20, 30, 2, 1, -1, 127, 0, 0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tutelage.packed_linear, arguments, test_utils=tests)


@needs_native
def test_wrong_operands_are_refused() -> None:
    index, scale, bias = draw(20, 60, TERNARY, seed=6)
    panels = to_panels(index, 2)
    good = [torch.randn(3, 60), panels, scale, bias, 20, 60, 2, 1, -1, 127, 0, 0]
    wrong = {
        0: (torch.randn(3, 64), torch.randn(3, 60).half(), torch.randn(60, 3).t()),
        1: (panels[:-1], panels.to(torch.int8)),
        2: (scale[:-1], scale.double()),
        3: (bias[:-1],),
        4: (21 + 64,),
        6: (3,),
        9: (0, 128),
        11: (-1, len(native().isas)),
    }
    for position, values in wrong.items():
        for value in values:
            arguments = list(good)
            arguments[position] = value
            with pytest.raises((RuntimeError, ValueError)):
                torch.ops.tutelage.packed_linear(*arguments)


def packed_pair() -> tuple[nn.Module, nn.Module]:
    from tutelage.nn import PackedLinear
    from tutelage.quantizers import pack

    torch.manual_seed(0)
    student = QuantLinear.from_linear(nn.Linear(100, 70), TernaryQuantizer(), UniformQuantizer())
    packed = PackedLinear.from_linear(nn.Linear(100, 70), TernaryQuantizer(), UniformQuantizer())
    codes, scale = student.quantized_weight()
    state = {"weight": pack(codes, TERNARY).reshape(-1), "weight_scale": scale.reshape(-1, 1)}
    packed.load_state_dict({**state, "bias": student.bias})
    return student.eval(), packed.eval()


COMPILED = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from test_native import packed_pair
student, packed = packed_pair()
x = torch.randn(4, 6, 100)
want = student(x)
with torch.no_grad():
    exported = torch.export.export(packed, (x,))
    assert "tutelage.packed_linear" in str(exported.graph)
    assert torch.equal(exported.module()(x), want)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), want)
"""


def in_new_process(code: str, **settings_: str) -> str:
    """The checks of annotations, which dynamo cannot trace, are left behind."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(HERE), str(HERE.parent)],
        env={**os.environ, **settings_},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_native
def test_a_packed_layer_exports_and_compiles() -> None:
    in_new_process(COMPILED)


def test_a_packed_layer_computes_what_the_trained_one_does() -> None:
    student, packed = packed_pair()
    for shape in ((100,), (1, 100), (4, 6, 100), (0, 100)):
        x = torch.randn(shape)
        assert same_bits(packed(x), student(x))


def test_other_weights_loaded_later_are_those_that_compute() -> None:
    _, packed = packed_pair()
    x = torch.randn(2, 100)
    packed(x)
    state = {key: value.clone() for key, value in packed.state_dict().items()}
    state["weight"].fill_(0b01010101)  # all weights are zero
    packed.load_state_dict(state)
    assert same_bits(packed(x), packed.bias.expand(2, 70))


WITHOUT = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from test_native import packed_pair
from tutelage.kernels import native
student, packed = packed_pair()
x = torch.randn(5, 100)
assert torch.equal(student(x), packed(x))
print(native().isa, "|", native().reason)
"""


@pytest.mark.parametrize(
    ("settings_", "isa", "reason"),
    [
        ({"TUTELAGE_NATIVE": "0"}, "torch", "TUTELAGE_NATIVE=0"),
        (
            {"CXX": "/nowhere/g++", "TUTELAGE_CACHE": "new"},
            "torch",
            "g++', was not found",
        ),
        ({"CXX": "false", "TUTELAGE_CACHE": "new"}, "torch", "false failed"),
        ({"PATH": "/nowhere", "CXX": "", "TUTELAGE_CACHE": "new"}, "torch", "no C++ compiler"),
        ({"TUTELAGE_CACHE": "/proc/nowhere"}, "torch", "could not be written"),
        ({"TUTELAGE_ISA": "sse9"}, "torch", "TUTELAGE_ISA is 'sse9'"),
        ({"TUTELAGE_ISA": "scalar"}, "scalar", "TUTELAGE_ISA=scalar"),
    ],
    ids=["off", "no such compiler", "failing compiler", "none", "no cache", "unknown", "scalar"],
)
def test_without_them_the_same_numbers_come_from_torch(
    settings_: dict[str, str], isa: str, reason: str, tmp_path: Path
) -> None:
    if isa == "scalar" and not native().active:
        pytest.skip(native().reason)
    new = {k: str(tmp_path / "cache") if v == "new" else v for k, v in settings_.items()}
    if isa == "torch" and "could not be written" in reason and not native().active:
        pytest.skip(native().reason)
    told = in_new_process(WITHOUT, **new)
    assert told.startswith(f"{isa} |")
    assert reason in told
    assert not list((tmp_path / "cache").glob("*"))


@needs_native
def test_a_build_is_made_once_and_left_whole(tmp_path: Path) -> None:
    code = "from tutelage.kernels import native; assert native().active, native().reason"
    environment = {**os.environ, "TUTELAGE_CACHE": str(tmp_path / "cache")}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for run in runs:
        assert run.wait() == 0, run.stderr.read() if run.stderr else ""
        if run.stderr:
            run.stderr.close()
    made = list((tmp_path / "cache").iterdir())
    assert [file.suffix for file in made] == [".so"]
    before = made[0].stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert made[0].stat().st_mtime_ns == before
