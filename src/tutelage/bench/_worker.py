"""A process of a measurement: ``python -m tutelage.bench._worker JOB FOLDER [ENGINE...]``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from ..errors import TutelageError
from ._workspace import Workspace

__all__ = ["REFUSED", "main"]

REFUSED = 3
"""Exit code after an error of the library, which is on the last line of stderr."""


def main(arguments: list[str]) -> int:
    """Does one job.

    Args:
        arguments: Name of the job, the folder, and names of engines.

    Returns:
        The exit code.
    """
    job, work, names = arguments[0], Workspace(Path(arguments[1])), tuple(arguments[2:])
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    import torch
    import transformers

    from . import _jobs

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(work.plan.threads)
    try:
        if job == "prepare":
            _jobs.prepare(work)
            _jobs.convert(work)
        elif job == "residence":
            _jobs.residence(work, names[0])
        else:
            _jobs.latency(work, names)
    except TutelageError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
