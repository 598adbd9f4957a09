"""The command line: ``grok-callbacks demo`` and ``grok-callbacks report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grok_callbacks.report import RunSummary

__all__ = ["main"]

REPORT_NAME = "grok_report"
# What a run's folder may say about its settings, as Lightning's loggers name it.
_SETTINGS = "hparams.yaml"
_MOST_SETTINGS = 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after the program's name; by default those it was called with.

    Returns:
        The exit status: 0, or 2 if the command could not be carried out.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"grok-callbacks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grok-callbacks", description="Is a training run memorising, compressing, or about to generalise?"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small network that groks, and watch it", description=_DEMO)
    demo.add_argument("--output", type=Path, default=Path("grok_runs/demo"), help="folder for events and figure (%(default)s)")
    demo.add_argument("--steps", type=int, default=2000, help="optimiser steps (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the split and of the weights (%(default)s)")
    demo.add_argument("--weight-decay", type=float, default=1.0, help="0 memorises and never generalises (%(default)s)")
    demo.add_argument("--task", default="add", help="add, sub, mul, x2y2, x2xyy2, random ... (%(default)s)")
    demo.add_argument("--preset", default="standard", choices=["economy", "standard", "full"], help="monitors (%(default)s)")
    demo.set_defaults(run=_run_demo)

    report = commands.add_parser(
        "report", help="draw the figure of a run, or write its page, from its event files", description=_REPORT
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with TensorBoard events or a metrics.csv")
    report.add_argument("--html", action="store_true", help="write a page instead: figures, explanations, sources")
    report.add_argument("--output", type=Path, help=f"the report's file (RUN_DIR/{REPORT_NAME}.png or .html)")
    report.set_defaults(run=_run_report)
    return parser


_DEMO = "Train a one-hidden-layer network on modular arithmetic until it groks: about 20 seconds on one core."
_REPORT = (
    "Draw accuracies, measures and events of any monitored run, and say what kind of run it is; with --html as one page that "
    "needs no TensorBoard, no network and no script."
)


def _run_demo(options: argparse.Namespace) -> int:
    # Imported here: the report needs no Lightning, and --help needs nothing.
    from grok_callbacks.tasks.demo import run_demo

    print(f"Modular arithmetic ({options.task} mod 31), 70% of all pairs to learn from, weight decay {options.weight_decay:g}.")
    run_dir, outcome = run_demo(
        options.output,
        steps=options.steps,
        seed=options.seed,
        weight_decay=options.weight_decay,
        task=options.task,
        preset=options.preset,
    )
    print(f"Outcome: {outcome or 'unknown'}.")
    print(f"Curves: tensorboard --logdir {run_dir}")
    return _draw(run_dir, run_dir / f"{REPORT_NAME}.png")


def _run_report(options: argparse.Namespace) -> int:
    if options.html:
        return _write_page(options.run_dir, options.output or options.run_dir / f"{REPORT_NAME}.html")
    return _draw(options.run_dir, options.output or options.run_dir / f"{REPORT_NAME}.png")


def _draw(run_dir: Path, output: Path) -> int:
    from grok_callbacks.report import read_run, run_figure, summarize

    history = read_run(run_dir)
    summary = summarize(history)
    figure = run_figure(history, title=str(run_dir), summary=summary)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Without a format matplotlib would write to another file than the one that was named.
    figure.savefig(output, dpi=130, format=output.suffix[1:] or "png")
    _say(summary)
    print(f"Figure: {output}")
    return 0


def _write_page(run_dir: Path, output: Path) -> int:
    from grok_callbacks.report import find_run, read_run, run_page, summarize

    history = read_run(run_dir)
    summary = summarize(history)
    settings = find_run(run_dir) / _SETTINGS
    text = settings.read_text(encoding="utf-8", errors="replace")[:_MOST_SETTINGS].strip() if settings.is_file() else ""
    page = run_page(history, title=str(run_dir), summary=summary, settings="" if text == "{}" else text)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    _say(summary)
    print(f"Page: {output}")
    return 0


def _say(summary: RunSummary) -> None:
    print("\n".join([summary.verdict, *summary.remarks]))


if __name__ == "__main__":
    sys.exit(main())
