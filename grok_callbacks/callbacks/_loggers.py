"""What the various loggers can do beyond scalars."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok_callbacks import _fits
from grok_callbacks.measures import QUESTIONS, group_by_chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "RESERVE", "add_figures", "add_layout", "add_texts", "excuse", "flush", "holds_figures", "is_short_of_space", "layout",
    "mark_begun", "mark_ended", "unheard",
]  # fmt: skip

#: MiB of a disk that are left to the run itself: more than all that is ever written at one step.
RESERVE = 16

_USUAL_PREFIX = "grok"


def _tensorboard(logger: Any) -> Any:
    """The SummaryWriter of a TensorBoard logger, ``None`` for other loggers and on other ranks."""
    if "TensorBoard" not in type(logger).__name__:
        return None
    experiment = logger.experiment
    # Of the class: on other ranks Lightning gives an object that has every attribute.
    return experiment if hasattr(type(experiment), "add_custom_scalars") else None


def holds_figures(logger: Any) -> bool:
    """Whether :func:`add_figures` can do anything with this logger."""
    return _tensorboard(logger) is not None or hasattr(logger, "log_image")


def add_figures(logger: Any, figures: Mapping[str, Figure], step: int) -> None:
    """Show figures at a step: in TensorBoard, and in loggers with ``log_image`` such as Weights & Biases."""
    import matplotlib.pyplot as plt

    writer = _tensorboard(logger)
    for key, figure in figures.items():
        if writer is not None:
            writer._get_file_writer().add_summary(_image(key, figure), step)
        else:
            logger.log_image(key, [figure], step=step)
        plt.close(figure)


def _image(key: str, figure: Figure) -> Any:
    """A figure as TensorBoard keeps it. ``add_figure`` would make three arrays of float32 of it first, of some 20 MB."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=figure.dpi)
    width, height = (int(size) for size in figure.bbox.size)
    picture = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=encoded.getvalue())
    return Summary(value=[Summary.Value(tag=key, image=picture)])


def is_short_of_space(logger: Any) -> bool:
    """Whether the disk that a logger writes on is nearly full.

    What the module logs is little and may find room for long. Were that taken by measurements, its own next value would end the
    run.
    """
    # Loggers of others; what they cannot tell, they are not asked.
    with suppress(Exception):
        folder = logger.log_dir if hasattr(logger, "log_dir") else logger.save_dir
        if folder is not None and "://" not in str(folder):
            path = Path(folder).absolute()
            usage = shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists()))
            # Where the size is unknown, both are zero.
            return usage.total > 0 and usage.free < RESERVE * 2**20
    return False


def flush(logger: Any) -> None:
    """Write out what a logger holds in memory."""
    logger.save()
    writer = _tensorboard(logger)
    if writer is not None:
        writer.flush()


def excuse(logger: Any) -> None:
    """Let a logger that has failed end in peace: what it still holds because of us cannot be written when it is closed."""
    finalize = logger.finalize

    def finalize_once(status: str) -> None:
        del logger.finalize
        with suppress(Exception):
            finalize(status)

    logger.finalize = finalize_once


def mark_begun(logger: Any, step: int) -> None:
    """Tell TensorBoard where a fit begins, and that what an interrupted one logged later than that is to be dropped.

    A run that goes on from a checkpoint continues one that was interrupted. So does a run from step 0 whose forerunner in the
    same folder never came to its end; a run that did end keeps its curves.
    """
    writer = _tensorboard(logger)
    if writer is not None:
        _fits.mark_begun(writer, step, goes_on=step > 0 or _fits.was_interrupted(Path(writer.log_dir)))


def mark_ended(logger: Any, step: int) -> None:
    """Note that a fit has come to its end, for those that follow in the same folder."""
    writer = _tensorboard(logger)
    if writer is not None:
        _fits.mark_ended(writer, step)


def unheard(logger: Any, values: Mapping[str, float]) -> dict[str, float]:
    """Those values whose curves a logger has not; all of them where that cannot be seen, and telling it twice does no harm."""
    writer = _tensorboard(logger)
    if writer is None:
        return dict(values)
    return {key: value for key, value in values.items() if not _fits.holds(Path(writer.log_dir), key)}


def add_texts(logger: Any, texts: Mapping[str, str], step: int) -> None:
    """Show texts in Markdown at a step; in TensorBoard only."""
    writer = _tensorboard(logger)
    for key, text in texts.items() if writer is not None else ():
        writer.add_text(key, text, global_step=step)


def layout(charts: Sequence[tuple[str, str, Sequence[str]]]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalar layout: a category for each question, a chart for what shares an axis.

    Args:
        charts: A question, the prefix and the keys that answer it, for each monitor.

    Returns:
        What ``SummaryWriter.add_custom_scalars`` takes.
    """
    result: dict[str, dict[str, list[Any]]] = {question: {} for question in QUESTIONS}
    for question, prefix, keys in charts:
        for chart, curves in group_by_chart(keys, prefix).items():
            # Events are single points, and stand in the text.
            if chart.family != "onset":
                title = chart.title if prefix == _USUAL_PREFIX else f"{chart.title} ({prefix})"
                tags = result.setdefault(question, {}).setdefault(title, ["Multiline", []])[1]
                tags += [_escaped(key) for key in curves.values()]
    return {question: shown for question, shown in result.items() if shown}


def _escaped(key: str) -> str:
    """TensorBoard reads the tags of a layout as regular expressions."""
    import re

    return f"^{re.escape(key)}$"


def add_layout(logger: Any, charts: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Give TensorBoard the layout; other loggers have none."""
    writer = _tensorboard(logger)
    if writer is not None and charts:
        writer.add_custom_scalars(charts)
