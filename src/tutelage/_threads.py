"""How many CPU threads torch uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["threads"]


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Uses so many CPU threads inside the context.

    Args:
        count: Their number; ``None`` leaves it.
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
