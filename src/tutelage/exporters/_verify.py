"""Comparing what was written with the student, before it takes its place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..errors import ExportError, OutputExistsError
from ._trace import Graph, outputs_of, sample_inputs

__all__ = ["Run", "deviation", "evaluating", "refuse_other_outputs", "refuse_standing"]

Run = Callable[[Mapping[str, Any]], list[Any]]
"""From numpy arrays by name to the outputs as numpy arrays."""

_SHAPES = ((3, 11), (1, 7), (4, 2))
"""Batch and tokens of the inputs that are tried; none is the shape that was traced."""


def refuse_standing(*paths: Path, overwrite: bool) -> None:
    """Refuses to replace files.

    Raises:
        OutputExistsError: Something stands at a path and ``overwrite`` is off, or it is a folder.
    """
    for path in paths:
        if path.is_dir():
            raise OutputExistsError(f"{path} is a folder; name a file.")
        if path.exists() and not overwrite:
            raise OutputExistsError(
                f"{path} exists; name another file, or pass overwrite=True (--overwrite)."
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode inside the context.

    Args:
        model: Any model; afterwards every module is in the mode it was in.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def deviation(reference: nn.Module, graph: Graph, run: Run) -> float:
    """Returns how far an engine is from a model, on synthesized inputs of three shapes.

    Args:
        reference: A transformers model in eval mode.
        graph: Says what goes in and comes out.
        run: The engine.

    Returns:
        The largest root mean square of a difference over that of the output.
    """
    positions = getattr(cast("Any", reference).config, "max_position_embeddings", None) or 64
    worst = 0.0
    for seed, (batch, tokens) in enumerate(_SHAPES):
        fitting = min(tokens, max(positions - 4, 1))  # some count positions from 2
        inputs = sample_inputs(reference, graph.inputs, batch=batch, tokens=fitting, seed=seed)
        with torch.no_grad():
            expected = outputs_of(reference, inputs)
        found = run({name: tensor.numpy() for name, tensor in inputs.items()})
        for name, array in zip(graph.outputs, found, strict=True):
            wanted = expected[name].double().numpy()
            if array.shape != wanted.shape or not np.isfinite(array).all():
                return math.inf
            apart = float(np.square(array - wanted).mean() / max(np.square(wanted).mean(), 1e-24))
            worst = max(worst, math.sqrt(apart))
    return worst


def refuse_other_outputs(found: float, tolerance: float, engine: str) -> None:
    """Refuses a graph that computes something else than the model.

    Args:
        found: What ``deviation`` returned.
        tolerance: The largest that is accepted.
        engine: Who computed it.

    Raises:
        ExportError: The deviation is larger than the tolerance.
    """
    if not found <= tolerance:
        raise ExportError(
            f"{engine} computes outputs that are {found:.1%} off the student's, of at most "
            f"{tolerance:.0%}, so nothing was written; deploy the model with tutelage.load."
        )
