"""Reading a finished or running run's curves back from what its logger wrote."""

from __future__ import annotations

import csv
from pathlib import Path

from grok_callbacks.history import History

__all__ = ["read_run"]


def read_run(path: str | Path) -> History:
    """All scalars of one run from its TensorBoard event files or its ``metrics.csv``.

    Args:
        path: The run's folder, or a folder above it that holds no other run.

    Returns:
        Every series by tag. A step that was written twice, as after a resume, has its later value.

    Raises:
        ValueError: If there is no such folder, no run in it, or several.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"`path`: there is no folder {str(folder)!r}.")
    runs = sorted({file.parent for pattern in ("events.out.tfevents.*", "metrics.csv") for file in folder.rglob(pattern)})
    if not runs:
        raise ValueError(f"`path`: no TensorBoard event file and no metrics.csv in {str(folder)!r}.")
    if len(runs) > 1:
        raise ValueError(f"`path`: several runs in {str(folder)!r}; name one of {', '.join(map(str, runs))}.")
    events = sorted(runs[0].glob("events.out.tfevents.*"))
    return _read_events(runs[0]) if events else _read_csv(runs[0] / "metrics.csv")


def _read_events(folder: Path) -> History:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    # Zero keeps every scalar; without it TensorBoard samples 10,000 a tag.
    accumulator = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    accumulator.Reload()
    history = History()
    for tag in accumulator.Tags()[SCALARS]:
        for event in accumulator.Scalars(tag):
            history.add(event.step, {tag: event.value})
    return history


def _read_csv(file: Path) -> History:
    history = History()
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            step = row.get("step")
            if step:
                values = {key: float(value) for key, value in row.items() if key != "step" and value}
                history.add(int(float(step)), values)
    return history
