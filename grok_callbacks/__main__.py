"""The command line: ``grok-callbacks demo`` and ``grok-callbacks report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

REPORT_NAME = "grok_report.png"


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
    except ValueError as error:
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

    report = commands.add_parser("report", help="draw the figure of a run from its event files", description=_REPORT)
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with TensorBoard events or a metrics.csv")
    report.add_argument("--output", type=Path, help=f"the figure's file (RUN_DIR/{REPORT_NAME})")
    report.set_defaults(run=_run_report)
    return parser


_DEMO = "Train a one-hidden-layer network on modular arithmetic until it groks: about 20 seconds on one core."
_REPORT = "Draw accuracies, measures and events of any monitored run, and say what kind of run it is."


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
    print(f"Outcome: {outcome}.")
    print(f"Curves: tensorboard --logdir {run_dir}")
    return _draw(run_dir, run_dir / REPORT_NAME)


def _run_report(options: argparse.Namespace) -> int:
    return _draw(options.run_dir, options.output or options.run_dir / REPORT_NAME)


def _draw(run_dir: Path, output: Path) -> int:
    from grok_callbacks.report import read_run, run_figure, summarize

    history = read_run(run_dir)
    summary = summarize(history)
    figure = run_figure(history, title=str(run_dir), summary=summary)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    print(summary.verdict)
    print(f"Figure: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
