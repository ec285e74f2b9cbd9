"""Studies: methods, schemes, budgets and learning rates side by side."""

from ._analysis import analyze
from ._layers import BlockError, SignalError, block_errors
from ._load import load_study
from ._methods import METHODS
from ._run import compare_known, count_runs, run_study, summary_of
from ._sections import Study
from ._summary import Comparison, Summary, Variant, summarize
from ._write import COLUMNS, rows

__all__ = [
    "COLUMNS",
    "METHODS",
    "BlockError",
    "Comparison",
    "SignalError",
    "Study",
    "Summary",
    "Variant",
    "analyze",
    "block_errors",
    "compare_known",
    "count_runs",
    "load_study",
    "rows",
    "run_study",
    "summarize",
    "summary_of",
]
