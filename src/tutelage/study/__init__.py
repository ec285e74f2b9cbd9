"""Studies: methods, schemes, budgets and learning rates side by side."""

from ._load import load_study
from ._methods import METHODS
from ._run import count_runs, run_study, summary_of
from ._sections import Study
from ._summary import Comparison, Summary, Variant, summarize
from ._write import COLUMNS, rows

__all__ = [
    "COLUMNS",
    "METHODS",
    "Comparison",
    "Study",
    "Summary",
    "Variant",
    "count_runs",
    "load_study",
    "rows",
    "run_study",
    "summarize",
    "summary_of",
]
