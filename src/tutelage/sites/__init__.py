"""Where a model's inner signals are, and how to see them. Knows nothing of quantizers."""

from ._map import SITES as SITES
from ._map import BlockSites as BlockSites
from ._map import Site as Site
from ._map import SiteMap as SiteMap
from ._tap import Projection as Projection
from ._tap import Signals as Signals
from ._tap import Tap as Tap
from ._trace import discover as discover
from ._trace import synthesize_inputs as synthesize_inputs
