"""Tensor to codes to tensor: quantizers and gradient estimators. Knows nothing of models."""

from ._base import BaseQuantizer as BaseQuantizer
from ._base import Granularity as Granularity
from ._base import Quantizer as Quantizer
from ._base import gain_gradient as gain_gradient
from ._estimators import ClippedSTE as ClippedSTE
from ._estimators import GradientEstimator as GradientEstimator
from ._estimators import StraightThrough as StraightThrough
from ._grid import BINARY as BINARY
from ._grid import FOUR_LEVEL as FOUR_LEVEL
from ._grid import TERNARY as TERNARY
from ._grid import Grid as Grid
from ._grid import Quantized as Quantized
from ._grid import signed as signed
from ._grid import unsigned as unsigned
from ._packing import ENCODINGS as ENCODINGS
from ._packing import Encoding as Encoding
from ._packing import are_codes as are_codes
from ._packing import pack as pack
from ._packing import packed_width as packed_width
from ._packing import recode as recode
from ._packing import unpack as unpack
from ._uniform import UniformQuantizer as UniformQuantizer
from ._uniform import UnsignedQuantizer as UnsignedQuantizer
from ._weights import BinaryQuantizer as BinaryQuantizer
from ._weights import FourLevelQuantizer as FourLevelQuantizer
from ._weights import TernaryQuantizer as TernaryQuantizer
