"""What replaces a signal, which gradients stop, and when."""

from ._schedule import Schedule as Schedule
from ._stages import NO_INTERVENTION as NO_INTERVENTION
from ._stages import Intervention as Intervention
from ._stages import Replace as Replace
from ._stages import intervention as intervention
from ._stages import register as register
from ._stages import stages as stages
