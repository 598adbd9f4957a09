"""Marks in event files: where a fit began and where it ended, to tell one that was interrupted from one that ended.

Of its own session marks TensorBoard heeds START alone: it forgets what it has read of later steps. So a fit that goes on from
an interrupted one begins with it, any other with CHECKPOINT, and all that end in peace end with STOP.
"""

from __future__ import annotations

import mmap
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["begins_anew", "holds", "mark_begun", "mark_ended", "was_interrupted"]

_MARK = "grok_callbacks: fit %s at %020d"
# Found in the bytes of a file, whatever its size, without reading its records.
_MARKS = re.compile(rb"grok_callbacks: fit (begun|ended) at (\d{20})")


def mark_begun(writer: Any, step: int, *, goes_on: bool) -> None:
    """Say that a fit begins behind a step, and whether what an earlier one logged later than that is void."""
    _add(writer, "START" if goes_on else "CHECKPOINT", "begun", step + 1)


def mark_ended(writer: Any, step: int) -> None:
    """Say that a fit has ended in peace."""
    _add(writer, "STOP", "ended", step)


def _add(writer: Any, status: str, what: str, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    session_log = SessionLog(status=SessionLog.SessionStatus.Value(status), msg=_MARK % (what, time.time_ns()))
    writer._get_file_writer().add_event(Event(step=step, session_log=session_log), step)


def was_interrupted(folder: Path) -> bool:
    """Whether the last fit that wrote its marks into a folder's event files did not come to its end."""
    marks = [mark for file in folder.glob("events.out.tfevents.*") for mark in _marks(file)]
    return bool(marks) and max(marks)[1] == b"begun"


def holds(folder: Path, key: str) -> bool:
    """Whether a folder's event files have a curve of this name."""
    return any(_search(file, re.compile(re.escape(key.encode()))) for file in folder.glob("events.out.tfevents.*"))


def _marks(file: Path) -> list[tuple[bytes, bytes]]:
    return [(moment, what) for what, moment in _search(file, _MARKS)]


def _search(file: Path, pattern: re.Pattern[bytes]) -> list[Any]:
    # In files that are empty, gone by now or not ours to read there is nothing.
    with (
        suppress(OSError, ValueError),
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return pattern.findall(content)
    return []


def begins_anew(event: Any) -> bool:
    """Whether an event of a file begins a fit, for which what was logged from the event's step on is void."""
    if not event.HasField("session_log"):
        return False
    log = event.session_log
    mark = _MARKS.fullmatch(log.msg.encode())
    return log.status == log.START or (mark is not None and mark[1] == b"begun")
