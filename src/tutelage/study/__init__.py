"""Studies: methods, schemes, budgets and learning rates side by side; and a student's inside."""

from ._activations import ActivationRange, activation_ranges
from ._analysis import Analysis, analyze
from ._assisted import StageErrors, stage_errors
from ._latents import LatentWeights, latent_weights
from ._layers import BlockError, SignalError, block_errors
from ._load import load_study
from ._methods import METHODS
from ._oscillation import LayerFlips, OscillationWatcher
from ._run import compare_known, count_runs, run_study, summary_of
from ._sections import Study
from ._sharpness import Sharpness, sharpness
from ._summary import Comparison, Summary, Variant, summarize
from ._surface import Surface, loss_surface
from ._write import COLUMNS, rows

__all__ = [
    "COLUMNS",
    "METHODS",
    "ActivationRange",
    "Analysis",
    "BlockError",
    "Comparison",
    "LatentWeights",
    "LayerFlips",
    "OscillationWatcher",
    "Sharpness",
    "SignalError",
    "StageErrors",
    "Study",
    "Summary",
    "Surface",
    "Variant",
    "activation_ranges",
    "analyze",
    "block_errors",
    "compare_known",
    "count_runs",
    "latent_weights",
    "load_study",
    "loss_surface",
    "rows",
    "run_study",
    "sharpness",
    "stage_errors",
    "summarize",
    "summary_of",
]
