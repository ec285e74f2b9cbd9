"""Exact products of integer codes in plain torch.

Codes are float32 tensors that hold integers. While every partial sum stays below 2^24 a float32
product of them is exact in any order, so it equals the int32 product bit for bit; int8 matrix
instructions are used where they are faster, with the same result.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["active_path", "int8_serves", "integer_linear", "integer_matmul", "resident_codes"]

_EXACT = 2**24
_INT8 = 127
_SHORTEST = 16


@functools.cache
def _int8_is_fast() -> bool:
    """Whether this CPU multiplies int8 exactly and faster than float32 (VNNI or AMX).

    Older instructions saturate at 16 bits; the largest operands are tried to be sure.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported():
        return False
    rows = torch.full((19, 259), _INT8, dtype=torch.int8)
    columns = torch.full((259, 21), _INT8, dtype=torch.int8)
    columns[:, ::2] = -_INT8
    exact = torch.matmul(rows.double(), columns.double())
    return bool(torch.equal(torch._int_mm(rows, columns).double(), exact))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cpu_multiplies_int8() -> bool:
    return _int8_is_fast()


_ON_CUDA: dict[int, bool] = {}


def _cuda_multiplies_int8(device: torch.device) -> bool:
    """Whether a CUDA device multiplies int8 exactly on tensor cores; tried once a device."""
    if not torch.cuda.is_available():
        return False
    given: int | None = device.index  # torch's stubs forget None
    index = torch.cuda.current_device() if given is None else given
    if index not in _ON_CUDA:
        if torch.cuda.is_current_stream_capturing():
            return False  # nothing can be tried while a graph is recorded
        _ON_CUDA[index] = torch.cuda.get_device_capability(index) >= (8, 0) and _tried(index)
    return _ON_CUDA[index]


def _tried(index: int) -> bool:
    rows = torch.full((32, 256), _INT8, dtype=torch.int8, device=f"cuda:{index}")
    columns = torch.full((24, 256), _INT8, dtype=torch.int8, device=f"cuda:{index}")
    columns[:, ::2] = -_INT8
    columns[:, 0] = _INT8
    exact = torch.matmul(rows.double(), columns.double().t())
    try:
        return bool(torch.equal(torch._int_mm(rows, columns.t()).double(), exact))
    except RuntimeError:
        return False


def active_path(device: torch.device) -> str:
    """Names the code that multiplies integer matrices on a device.

    Args:
        device: Where the operands are.

    Returns:
        ``"int8"`` (``torch._int_mm``) or ``"float32"``.
    """
    if device.type == "cpu":
        return "int8" if _cpu_multiplies_int8() else "float32"
    if device.type != "cuda" or torch.compiler.is_compiling():
        return "float32"
    return "int8" if _cuda_multiplies_int8(device) else "float32"


def int8_serves(device: torch.device, count: int, width: int, outputs: int) -> bool:
    """Whether int8 products serve for matrices (count, width) and (outputs, width).

    Args:
        device: Where they are.
        count: Rows of the first.
        width: What is summed over. With a single input torch 2.13's product returns garbage on
            CPUs, and short rows gain nothing.
        outputs: Rows of the second.
    """
    if active_path(device) != "int8" or not count or not outputs:
        return False
    if device.type == "cuda":
        return count > 16 and width % 8 == 0 and outputs % 8 == 0
    return width >= _SHORTEST


def resident_codes(codes: Tensor) -> Tensor:
    """Returns weight codes in the dtype that products on their device want.

    Args:
        codes: Integer codes of a weight, any dtype.

    Returns:
        The codes as int8 or float32, see ``active_path``.
    """
    return codes.to(torch.int8 if active_path(codes.device) == "int8" else torch.float32)


def integer_linear(
    x: Shaped[Tensor, "*batch in_features"], weight: Shaped[Tensor, "out_features in_features"]
) -> Float[Tensor, "*batch out_features"]:
    """Computes ``x @ weight.T`` exactly.

    Args:
        x: Integer-valued, magnitude at most 127, float32 or int8.
        weight: Integer-valued, magnitude at most 127, float32 or int8.

    Returns:
        The integer-valued product, float32: exact while in_features * 127 * max|weight| < 2^24,
        which holds for ternary weights up to 132,000 inputs.
    """
    width = x.shape[-1]
    if int8_serves(x.device, x.numel() // max(width, 1), width, len(weight)):
        rows = x.reshape(-1, width).to(torch.int8)
        product = torch._int_mm(rows, weight.to(torch.int8).t())
        # Reshaped first: what an autograd function returns must be no view, lest it be refused
        # where a model changes it in place.
        return product.reshape(*x.shape[:-1], weight.shape[0]).float()
    x = x if x.is_floating_point() else x.float()
    return torch.nn.functional.linear(x, weight.to(x.dtype))


def integer_matmul(
    a: Float[Tensor, "*batch m k"], b: Float[Tensor, "*batch k n"], largest: int
) -> Float[Tensor, "*batch m n"]:
    """Computes ``a @ b`` exactly for integer-valued batches of matrices.

    Args:
        a: Integer-valued, float32.
        b: Integer-valued, float32.
        largest: Bound of |a| times bound of |b|; says how many terms float32 can add exactly.

    Returns:
        The product in float32. Sums that could reach 2^24 are added in float64 over chunks of k
        and rounded once.
    """
    k = a.shape[-1]
    limit = max((_EXACT - 1) // largest, 1)
    if k <= limit:
        return torch.matmul(a, b)
    total = torch.zeros(
        (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]),
        dtype=torch.float64,
        device=a.device,
    )
    for start in range(0, k, limit):
        stop = min(start + limit, k)
        total += torch.matmul(a[..., start:stop], b[..., start:stop, :])
    return total.float()
