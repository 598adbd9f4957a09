"""Figures, pages and summaries of a run, from its history or from what its logger wrote."""

from grok_callbacks.report.figure import run_figure
from grok_callbacks.report.page import run_page
from grok_callbacks.report.read import find_run, read_run
from grok_callbacks.report.summary import RunSummary, summarize

__all__ = ["RunSummary", "find_run", "read_run", "run_figure", "run_page", "summarize"]
