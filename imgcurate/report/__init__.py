"""The report of a run: one HTML page that needs nothing else, to look at what stayed and what left."""

from imgcurate.report.hits import write_hits
from imgcurate.report.page import is_wanted, make_report

__all__ = ["is_wanted", "make_report", "write_hits"]
