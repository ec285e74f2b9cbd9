"""Students in formats of other engines: one module a format, behind ``export``."""

from ._export import FORMATS as FORMATS
from ._export import export as export
