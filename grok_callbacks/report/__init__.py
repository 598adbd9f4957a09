"""Figures and summaries of a run, from its history or from what its logger wrote."""

from grok_callbacks.report.figure import run_figure
from grok_callbacks.report.read import read_run
from grok_callbacks.report.summary import RunSummary, summarize

__all__ = ["RunSummary", "read_run", "run_figure", "summarize"]
