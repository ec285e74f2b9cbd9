"""Compiles a packed layer with torch.compile, without a break of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutelage.kernels import packed_linear_cuda
from tutelage.kernels._triton import _entry
from tutelage.quantizers import TERNARY, UniformQuantizer, pack


def main() -> None:
    """Prints what the graph of a layer holds on the CPU, then where the kernels serve."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantizer = UniformQuantizer(8)
    x = torch.randn(2, 32)
    packed, scale = pack(torch.randint(-1, 2, (6, 32)).float(), TERNARY), torch.rand(6, 1)

    def layer(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        y = packed_linear_cuda(x, packed, scale, None, 32, TERNARY, quantizer)
        return x.new_zeros(()) if y is None else y

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph.graph.nodes]
        print("operator" if any("triton_packed_linear" in t for t in targets) else "plain")
        return graph.forward  # type: ignore[no-any-return]

    torch.compile(layer, backend=backend, fullgraph=True)(x, packed, scale)
    if device == "cpu":
        _entry.serves = lambda _: True
    torch._dynamo.reset()
    operands = [t.to(device) for t in (x, packed, scale)]
    compiled = torch.compile(layer, backend=backend, fullgraph=True)(*operands)
    print("equal" if torch.equal(compiled, layer(*operands)) else "unequal")


if __name__ == "__main__":
    main()
