"""What the package costs a script that does not use it, and one that does, before training begins.

``python -m benchmarks.import_time --output benchmarks/results/import_time.md``

Lightning asks every installed package for callbacks when a Trainer is made: it loads the package's entry point and calls it.
Medians over fresh interpreters that begin outside of the repository, the files compiled already.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks._common import markdown, parser, publish

# What a fresh interpreter runs: each block of a case is timed on its own, and the modules that it loads are counted.
_BEGIN = """
import json, sys, time
results = []
def note(begun, known, times=1):
    seconds = time.perf_counter() - begun
    results.append((1000 * seconds / times, len(set(sys.modules) - known)))
known, begun = set(sys.modules), time.perf_counter()
import lightning.pytorch
note(begun, known)
"""
_FACTORY = """
from importlib.metadata import entry_points
known, begun = set(sys.modules), time.perf_counter()
found = list(entry_points(group="lightning.pytorch.callbacks_factory"))
note(begun, known)
(ours,) = [entry for entry in found if entry.value == "grok_callbacks._auto:callbacks_factory"]
known, begun = set(sys.modules), time.perf_counter()
first = ours.load()()
note(begun, known)
known, begun = set(sys.modules), time.perf_counter()
later = [ours.load()() for _ in range(100)]
note(begun, known, times=100)
if first or any(later):
    raise RuntimeError("callbacks without GROK_CALLBACKS")
"""
_IMPORT = """
known, begun = set(sys.modules), time.perf_counter()
import grok_callbacks
note(begun, known)
known, begun = set(sys.modules), time.perf_counter()
grok_callbacks.default_callbacks()
note(begun, known)
"""
_END = "print(json.dumps(results))"

_LIGHTNING = "`import lightning.pytorch`"
_ROWS = {
    _FACTORY: (
        _LIGHTNING,
        "Lightning's own search for entry points, whatever is installed",
        "this package's, `GROK_CALLBACKS` unset: first Trainer",
        "the same: each later Trainer",
    ),
    _IMPORT: (_LIGHTNING, "`import grok_callbacks`", "then `grok_callbacks.default_callbacks()`"),
}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    found: dict[str, list[tuple[float, int]]] = {}
    # Ratios within one interpreter, since the time of importing Lightning hangs on what the disk has at hand.
    shares: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        for case, names in _ROWS.items():
            results = _run(_BEGIN + case + _END)
            if repeat == 0:
                continue  # compiles, and fetches from disk
            for name, (milliseconds, modules) in zip(names, results, strict=True):
                found.setdefault(name, []).append((milliseconds, modules))
                shares.setdefault(name, []).append(milliseconds / results[0][0])
    rows = [
        [
            name,
            _decimal(statistics.median(milliseconds for milliseconds, _ in values)),
            _decimal(statistics.median(shares[name])),
            round(statistics.median(modules for _, modules in values)),
        ]
        for name, values in found.items()
    ]
    table = markdown(["in a fresh interpreter", "ms", "of importing Lightning", "modules newly loaded"], rows)
    text = f"Medians of {arguments.repeats} interpreters, in each of which Lightning is imported first; wall-clock time."
    publish(f"{text}\n\n{table}", arguments.output, "python -m benchmarks.import_time")


def _decimal(value: float) -> str:
    """Two digits or all before the point, without an exponent."""
    digits = max(2, len(f"{value:.0f}"))
    return np.format_float_positional(value, precision=digits, fractional=False, trim="-")


def _run(script: str) -> list[tuple[float, int]]:
    # From a folder without a copy of the package, as a user's script: what is found is what pip has installed.
    environment = {name: value for name, value in os.environ.items() if name not in {"GROK_CALLBACKS", "PYTHONPATH"}}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env=environment, check=True, capture_output=True, text=True
        )
    return [(milliseconds, modules) for milliseconds, modules in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main()
