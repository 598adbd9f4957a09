"""Calibrates and scores the forecast of grokking on a suite of some five hundred small runs.

``python -m benchmarks.forecast`` makes the runs that the cache lacks, writes the models that ship with the package, and prints
the tables; ``--smoke`` does all but the writing with a few runs of a few steps, to see that it works.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import _forecast_suite as suite
from benchmarks._common import publish
from benchmarks._forecast_data import Case, cases_of
from benchmarks._forecast_fit import calibrate
from benchmarks._forecast_report import report
from benchmarks._forecast_score import family_of
from grok_callbacks.forecast.features import MODES

SHIPPED = Path(__file__).parents[1] / "grok_callbacks" / "forecast"
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, then calibration, then scores, as far as asked."""
    options = _parsed(arguments)
    chosen = suite.settings(options.scale)
    if options.smoke:
        chosen = [replace(setting, max_steps=60) for setting in chosen if setting.architecture in ("onehot", "embedding")][:4]
    suite.run_suite(chosen, options.cache, workers=options.workers, ray=options.ray)
    if options.only_runs:
        return
    cases = cases_of(suite.load_all(chosen, options.cache))
    if options.smoke:
        print(f"{len(cases)} runs, {sum(len(case.steps) for case in cases)} forecasts")
        return
    if options.write:
        ship(cases, SHIPPED)
    publish(report(cases, RESULTS), RESULTS / "forecast.md", "python -m benchmarks.forecast --write")


def ship(cases: Sequence[Case], folder: Path) -> None:
    """Calibrate on all runs, thresholds and intervals on families left out, and write one file a mode."""
    judged = [case for case in cases if case.judged]
    text = (
        f"{len(judged)} small runs, {sum(case.is_positive for case in judged)} of which grokked: modular arithmetic (add, sub, "
        "mul, div, x^2+y^2, x^2+xy+y^2), permutation groups, xor, digits with large initial weights, random labels; multilayer "
        "perceptrons and one-layer transformers; full batches, AdamW, up to 9,000 steps. Thresholds and intervals are those of "
        "families left out. See benchmarks/results/forecast.md."
    )
    for mode in MODES:
        model = calibrate(cases, mode, family_of).to_model(text)
        (folder / f"{mode}.json").write_text(model.to_json(), encoding="utf-8")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "grok_forecast_runs", help="folder of the runs' files"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the runs to make; more than 1 for a cluster")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--ray", action="store_true", help="run on a Ray cluster, whose nodes share the cache folder")
    parser.add_argument("--only-runs", action="store_true", help="make the runs and stop")
    parser.add_argument("--write", action="store_true", help="write the models that ship with the package")
    parser.add_argument("--smoke", action="store_true", help="a few runs of a few steps")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
