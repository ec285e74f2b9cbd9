"""Where latent weights lie between the thresholds of their codes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..quantizers import BinaryQuantizer, FourLevelQuantizer, Quantizer, TernaryQuantizer
from ._oscillation import watched_layers

__all__ = ["EDGES", "LatentWeights", "latent_weights", "threshold_distance"]

EDGES = tuple(round(0.1 * index, 1) for index in range(41))
"""Edges of the histogram of distances, in units of the row's scale; the last bin is open."""


@dataclass(frozen=True)
class LatentWeights:
    """Latent weights of one layer.

    Attributes:
        layer: Name of the module.
        weights: Number of its weights.
        codes: Share of the weights at every code of the grid, as text to share.
        distances: Share of the weights in every bin of ``EDGES``: how far the latent weight is from
            the nearest threshold at which its code changes, in units of its row's scale. Empty
            where the thresholds of the quantizer are not known.
    """

    layer: str
    weights: int
    codes: dict[str, float]
    distances: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def threshold_distance(
    quantizer: Quantizer, rows: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows width"] | None:
    """Returns how far every weight is from the nearest threshold, in units of its scale.

    With m the mean magnitude of the row (or the tensor) the thresholds are 0 of binary codes,
    ``+-0.7 m`` of ternary ones, 0 and ``+-1.248 m`` of four levels. They move with the row, which
    is left out of account.

    Args:
        quantizer: The layer's.
        rows: Its latent weight.

    Returns:
        Float32; infinite where the scale is 0; ``None`` for a quantizer of another kind.
    """
    quantizers = BinaryQuantizer | TernaryQuantizer | FourLevelQuantizer
    if not isinstance(quantizer, quantizers):
        return None
    rows = rows.detach().float()
    if quantizer.clip is not None:
        rows = rows.clamp(-quantizer.clip, quantizer.clip)
    size = rows.abs()
    distance = size if not isinstance(quantizer, TernaryQuantizer) else None
    if not isinstance(quantizer, BinaryQuantizer):
        whole = quantizer.granularity == "tensor"
        mean = size.mean() if whole else size.mean(-1, keepdim=True)
        other = (size - quantizer.threshold * mean).abs()
        distance = other if distance is None else torch.minimum(distance, other)
    assert distance is not None
    return distance / quantizer.quantize(rows).scale


def latent_weights(student: nn.Module) -> list[LatentWeights]:
    """Counts codes and distances to thresholds in every quantized layer but the tables.

    Args:
        student: A prepared model.
    """
    found = []
    edges = torch.tensor([*EDGES[:-1], float("inf")])
    for name, layer in watched_layers(student).items():
        rows = layer.weight_rows().detach()
        codes = layer.weight_quantizer.quantize(rows).codes
        grid = layer.weight_quantizer.grid
        counts = {
            str(code): int((codes == code).sum()) for code in range(grid.lo, grid.hi + 1, grid.step)
        }
        distance = threshold_distance(layer.weight_quantizer, rows)
        shares: tuple[float, ...] = ()
        if distance is not None:
            kept = distance[distance.isfinite()].cpu()
            bins = torch.bucketize(kept, edges, right=True) - 1
            binned = torch.bincount(bins, minlength=len(EDGES) - 1)
            shares = tuple((binned.double() / max(len(kept), 1)).tolist())
        total = codes.numel()
        found.append(LatentWeights(name, total, {c: n / total for c, n in counts.items()}, shares))
    return found
