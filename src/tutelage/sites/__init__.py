"""Where a model's inner signals are, and how to see them. Knows nothing of quantizers."""

from ._discover import discover as discover
from ._inputs import synthesize_inputs as synthesize_inputs
from ._map import SITES as SITES
from ._map import Axis as Axis
from ._map import BlockSites as BlockSites
from ._map import Features as Features
from ._map import Projection as Projection
from ._map import Site as Site
from ._map import SiteMap as SiteMap
from ._tap import Signals as Signals
from ._tap import Tap as Tap
