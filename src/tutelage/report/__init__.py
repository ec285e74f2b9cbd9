"""Reports: one HTML file about a run or a study."""

from ._facts import Wanted
from ._page import Finding
from ._write import Report, write_report

__all__ = ["Finding", "Report", "Wanted", "write_report"]
