"""How the commands say a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["reporter"]


def reporter(console: Console) -> Callable[[str], None]:
    """Returns a function that prints a line as it is, without markup and without wrapping.

    Args:
        console: Where to.
    """
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
