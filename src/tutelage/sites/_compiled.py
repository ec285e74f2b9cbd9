"""What ``torch.compile`` made, and hooks that come and go."""

from __future__ import annotations

import sys

import torch

__all__ = ["heed_hooks"]


def heed_hooks() -> None:
    """Makes code that ``torch.compile`` made look at a module's hooks before it is used.

    Hooks change from stage to stage, and by default compiled code keeps those that it saw first.
    What was compiled before is dropped, since it does not look. Nothing is imported where nothing
    was compiled. The setting stays for the life of the process.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return
    from torch._dynamo import config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
