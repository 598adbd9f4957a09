"""Calibrates and scores the forecast of grokking on a suite of some hundred small runs.

``python -m benchmarks.forecast --only-runs`` makes the runs, which are cached and resumed; without options they are made, the
shipped models calibrated, and the table and the figures written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import _forecast_suite as suite


def main() -> None:
    arguments = parsed()
    chosen = suite.settings(arguments.scale)
    suite.run_suite(chosen, arguments.cache, workers=arguments.workers, ray=arguments.ray)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "grok_forecast_runs")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--only-runs", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
