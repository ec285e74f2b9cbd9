"""Speed, memory and size of a student beside other engines: ``tutelage bench``."""

from ._engine import Engine as Engine
from ._engine import Runner as Runner
from ._registry import ENGINES as ENGINES
from ._result import BenchResult as BenchResult
from ._result import EngineFigures as EngineFigures
from ._result import Speed as Speed
from ._run import run_bench as run_bench
