"""Reading a finished or running run's curves back from what its logger wrote."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grok_callbacks._fits import begins_anew
from grok_callbacks.history import History

__all__ = ["find_run", "read_run"]

_KINDS = ("events.out.tfevents.*", "metrics.csv")
# Floats know no whole numbers beyond it.
_LARGEST_STEP = 2.0**53
# Python's csv refuses longer cells unless told otherwise; a C long holds as much on every system.
_LONGEST_CELL = 2**31 - 1


def read_run(path: str | Path) -> History:
    """All scalars of one run from its TensorBoard event files or its ``metrics.csv``.

    Args:
        path: The run's folder, whatever lies below it, or a folder above it that holds no other run.

    Returns:
        Every series by tag. A step that was written twice, as after a resume, has its later value; of several fits in one
        folder, the last one's series are there. Of a file that was cut off when its process was killed, all that is complete;
        of a damaged one, what comes before the damage, with a warning.

    Raises:
        ValueError: If there is no such folder, no run in it, or several, or a table that cannot be read.
    """
    run = find_run(path)
    files = _files(run, _KINDS[0])
    return _read_events(files) if files else _read_csv(run / _KINDS[1])


def find_run(path: str | Path) -> Path:
    """The folder in which a run's logger wrote: this one, or the only one below it.

    Args:
        path: The run's folder, whatever lies below it, or a folder above it that holds no other run.

    Raises:
        ValueError: If there is no such folder, no run in it, or several.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"`path`: there is no folder {str(folder)!r}.")
    # Of several curves in one chart TensorBoard's writer makes folders of their own below the run's.
    if any(_files(folder, kind) for kind in _KINDS):
        return folder
    runs = sorted({file.parent for kind in _KINDS for file in _files(folder, f"**/{kind}")})
    if not runs:
        raise ValueError(f"`path`: no TensorBoard event file and no metrics.csv in {str(folder)!r}.")
    if len(runs) > 1:
        raise ValueError(f"`path`: several runs in {str(folder)!r}; name one of {', '.join(map(str, runs))}.")
    return runs[0]


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if file.is_file())


def _read_events(files: Iterable[Path]) -> History:
    history, kinds = History(), dict[str, str]()
    # By time, not by name: of two processes that began in one second, the names tell nothing.
    for file in sorted(files, key=_first_moment):
        count = 0
        for count, event in enumerate(_events(file), start=1):  # noqa: B007
            if begins_anew(event):
                # The run goes on from here, or another one begins: what was logged later than that no longer holds.
                history = history.until(event.step - 1)
            for value in event.summary.value:
                # Some writers say only once what a tag is.
                kind = kinds.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if kind == "scalars" and value.HasField("tensor"):
                    history.add(event.step, {value.tag: _scalar(value.tensor)})
        missing = _count_records(file) - count
        if missing > 0:
            warnings.warn(f"{file} is damaged: {missing} of its records are left out.", stacklevel=4)
    return history


def _events(file: Path) -> Iterator[Any]:
    """A file's events, one at a time, up to the first record that is cut off or whose checksum is wrong."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    yield from EventFileLoader(str(file)).Load()


def _first_moment(file: Path) -> float:
    return next((float(event.wall_time) for event in _events(file)), 0.0)


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
    history, broken = History(), 0
    text = file.read_text(errors="replace").replace("\0", "")
    # A last line without its end was cut off, perhaps amid a number.
    lines = text[: text.rfind("\n") + 1].splitlines()
    for row in _rows(file, lines):
        step = _number(row.pop("step", None))
        if step is None:
            continue
        if not abs(step) <= _LARGEST_STEP:
            broken += 1
            continue
        numbers = {key: number for key, value in row.items() if key and (number := _number(value)) is not None}
        history.add(int(step), numbers)
    if broken:
        warnings.warn(f"{file}: rows are left out whose step no run can have reached, {broken} of them.", stacklevel=3)
    return history


def _rows(file: Path, lines: Iterable[str]) -> list[dict[Any, Any]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        return list(csv.DictReader(lines))
    except csv.Error as error:
        raise ValueError(f"`path`: {file} is no table that can be read: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _number(text: Any) -> float | None:
    """The number that a cell holds; ``None`` for an empty one, and for words."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
