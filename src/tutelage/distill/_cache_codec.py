"""How a stored teacher writes numbers: exactly, in half precision, or in eight bits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import DataError, RecipeError

__all__ = ["CODECS", "Codec", "bytes_of", "check_codec", "decode", "encode"]

Codec = Literal["float32", "float16", "int8"]
"""Of every number x that is stored, ``decode(encode(x))`` differs from it by

* ``"float32"``: nothing;
* ``"float16"``: at most 2^-11 |x|, or 2^-25 where |x| < 2^-14;
* ``"int8"``: at most amax / 254 (and float32's rounding), with amax the largest magnitude of its
  row: a token's vector, or a query's scores in one head.
"""

CODECS: tuple[Codec, ...] = get_args(Codec)


def check_codec(name: str) -> Codec:
    """Returns the codec of a name.

    Args:
        name: One of ``CODECS``.

    Raises:
        RecipeError: There is none of this name.
    """
    for codec in CODECS:
        if codec == name:
            return codec
    raise RecipeError(f"there is no codec {name!r}; use one of {', '.join(map(repr, CODECS))}.")


def bytes_of(codec: Codec, numbers: int, rows: int) -> int:
    """Returns how many bytes numbers take.

    Args:
        codec: The codec.
        numbers: How many.
        rows: Rows they are in.
    """
    return numbers + 4 * rows if codec == "int8" else numbers * (2 if codec == "float16" else 4)


def encode(codec: Codec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encodes a signal.

    Args:
        codec: The codec.
        x: Float32, rows along the last dimension.

    Returns:
        The codes, flat, and the scale of every row, flat, where there is one.

    Raises:
        DataError: A number is beyond the range of float16, or not finite.
    """
    x = x.detach().float().cpu()
    if not bool(torch.isfinite(x).all()):
        raise DataError("the teacher's signals are not all finite; check its weights and the data.")
    if codec == "float32":
        return x.reshape(-1).clone(), None
    if codec == "float16":
        half = x.reshape(-1).half()
        if bool(half.isinf().any()):
            raise DataError(
                f"the teacher's signals reach {float(x.abs().max()):.3g}, beyond the range of "
                "float16; use codec='int8' or codec='float32'."
            )
        return half, None
    top = x.abs().amax(-1, keepdim=True)
    scale = torch.where(top < torch.finfo(torch.float32).tiny * 127, 1.0, top / 127)
    return (x / scale).round_().to(torch.int8).reshape(-1), scale.reshape(-1)


def decode(codes: Tensor, scale: Tensor | None, shape: tuple[int, ...], out: Tensor) -> None:
    """Decodes a signal into a part of a tensor.

    Args:
        codes: What ``encode`` returned.
        scale: Likewise.
        shape: Shape of the signal.
        out: Float32, of this shape; written to.
    """
    out.copy_(codes.view(shape))
    if scale is not None:
        out.mul_(scale.view(*shape[:-1], 1))
