"""Reading a finished or running run's curves back from what its logger wrote."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

from grok_callbacks._fits import begins_anew
from grok_callbacks.history import History

__all__ = ["find_run", "read_run"]


def read_run(path: str | Path) -> History:
    """All scalars of one run from its TensorBoard event files or its ``metrics.csv``.

    Args:
        path: The run's folder, or a folder above it that holds no other run.

    Returns:
        Every series by tag. A step that was written twice, as after a resume, has its later value; of several fits in one
        folder, the last one's series are there. Of a file that was cut off when its process was killed, all that is complete;
        of a damaged one, what comes before the damage, with a warning.

    Raises:
        ValueError: If there is no such folder, no run in it, or several.
    """
    run = find_run(path)
    events = sorted(run.glob("events.out.tfevents.*"))
    return _read_events(run) if events else _read_csv(run / "metrics.csv")


def find_run(path: str | Path) -> Path:
    """The folder in which a run's logger wrote: this one, or the only one below it.

    Args:
        path: The run's folder, or a folder above it that holds no other run.

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
    return runs[0]


def _read_events(folder: Path) -> History:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    loaded: list[list[Any]] = []
    for file in folder.glob("events.out.tfevents.*"):
        # The loader stops at the first record that is cut off or whose checksum is wrong.
        events = list(EventFileLoader(str(file)).Load())
        missing = _count_records(file) - len(events)
        if missing > 0:
            warnings.warn(f"{file} is damaged: {missing} of its records are left out.", stacklevel=4)
        loaded.append(events)
    history, kinds = History(), dict[str, str]()
    # By time, not by name: of two processes that began in one second, the names tell nothing.
    for events in sorted(filter(None, loaded), key=lambda events: events[0].wall_time):
        for event in events:
            if begins_anew(event):
                # The run goes on from here, or another one begins: what was logged later than that no longer holds.
                history = history.until(event.step - 1)
            for value in event.summary.value:
                # Some writers say only once what a tag is.
                kind = kinds.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if kind == "scalars" and value.HasField("tensor"):
                    history.add(event.step, {value.tag: _scalar(value.tensor)})
    return history


def _scalar(tensor: Any) -> float:
    from tensorboard.util.tensor_util import make_ndarray

    return float(make_ndarray(tensor).item())


def _count_records(file: Path) -> int:
    """Complete records of an event file, whatever is in them: each has its length, 12 bytes before and 4 behind."""
    size, position, count = file.stat().st_size, 0, 0
    with file.open("rb") as stream:
        while position + 12 <= size:
            stream.seek(position)
            position += 12 + int.from_bytes(stream.read(8), "little") + 4
            count += position <= size
    return count


def _read_csv(file: Path) -> History:
    history = History()
    text = file.read_text(errors="replace").replace("\0", "")
    # A last line without its end was cut off, perhaps amid a number.
    lines = text[: text.rfind("\n") + 1].splitlines()
    for row in csv.DictReader(lines):
        step = _number(row.pop("step", None))
        if step is not None and math.isfinite(step):
            numbers = {key: number for key, value in row.items() if key and (number := _number(value)) is not None}
            history.add(int(step), numbers)
    return history


def _number(text: Any) -> float | None:
    """The number that a cell holds; ``None`` for an empty one, and for words."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
