"""Draws the pictures of the documentation's pages on measures, from two real runs.

One learns addition modulo 59 and groks; the other has the same network, optimiser and inputs, but random labels, so that all
it can do is memorise. What a measure does in the first and not in the second speaks for generalisation. Resumable: runs that
are there already are only drawn again.

    python docs/make_pictures.py --runs RUNS        # some minutes on one core
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from grok_callbacks import GroupLawMonitor, History, Probe, default_callbacks
from grok_callbacks.measures import Chart
from grok_callbacks.report import RunSummary, read_run, summarize
from grok_callbacks.report.figure import charts_of, draw_accuracies, draw_chart, mark_events, set_step_axis
from grok_callbacks.tasks.recipes import embedding_recipe

TASKS = {"add": "addition: groks", "random": "random labels: memorises"}
# The charts of a family that its page shows; all of them where it names none.
CHOSEN = {
    "complexity": ("Description length (bits)",),
    "robustness": ("Information under noise (nats)", "Change by noise (nats)"),
    "representation": ("Entropy of the features", "Distance of the classes", "Entropy of the predictions (nats)"),
    "li2": ("Stage of feature learning", "Alignment of the gradient"),
    "commutativity": ("Commutativity",),
    "forecast": ("Probability of generalising",),
}


def main() -> None:
    """Train what is not there yet, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "grok_pictures", help="%(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pictures", help="%(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for task, words in TASKS.items():
        folder = options.runs / task
        if not (folder / "done").exists():
            train(task, folder)
        runs[words] = read_run(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    families = dict.fromkeys(chart.family for history in runs.values() for chart in charts_of(history))
    for family in ("detector", *families):
        save(draw(family, runs), options.output / f"{family}.png")
        print(options.output / f"{family}.png")


def train(task: str, folder: Path) -> None:
    """One run with every measure, its events in ``folder``."""
    recipe = embedding_recipe(task)
    callbacks = default_callbacks("full", probe=Probe(size=256))
    if task == "add":
        callbacks.append(GroupLawMonitor(recipe.data.task.group.table))
    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=recipe.max_steps,
        check_val_every_n_epoch=10,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.parent, name=folder.name, version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(recipe.module, recipe.data)
    (folder / "done").touch()


def draw(family: str, runs: dict[str, History]) -> Figure:
    """A family's charts, one run beside the other on the same axes."""
    found: dict[str, dict[Chart, dict]] = {
        words: {chart: curves for chart, curves in charts_of(history).items() if chart.family == family and is_chosen(chart)}
        for words, history in runs.items()
    }
    charts = list(dict.fromkeys(chart for charts in found.values() for chart in charts)) or [Chart(family, "Accuracy")]
    columns = [words for words in runs if found[words] or family == "detector"]
    figure = Figure(figsize=(8.4, 0.5 + 2.2 * len(charts)), layout="constrained")
    panels = figure.subplots(len(charts), len(columns), sharey="row", sharex=True, squeeze=False)
    longest = max(runs.values(), key=lambda history: history["grok/norm"].steps[-1])
    for number, (row, chart) in enumerate(zip(panels, charts, strict=True)):
        for axes, words in zip(row, columns, strict=True):
            summary = summarize(runs[words])
            curves = found[words].get(chart, {})
            shown = (
                draw_accuracies(axes, summary) if family == "detector" else draw_chart(axes, chart, curves) if curves else {}
            )
            mark_events(axes, summary)
            set_step_axis(axes, longest)
            axes.tick_params(labelsize=8)
            if number == 0:
                axes.set_title(f"{words}\n{events_in_words(summary)}", fontsize=9)
        row[0].set_ylabel(chart.title.replace(" (", "\n("), fontsize=8)
        handles = [line for line in row[0].lines if line.get_linestyle() == "-"]
        row[-1].legend(handles, list(shown), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8)
    return figure


def is_chosen(chart: Chart) -> bool:
    """Whether a family's page shows a chart."""
    return chart.title in CHOSEN.get(chart.family, (chart.title,))


def events_in_words(summary: RunSummary) -> str:
    """The steps of the events."""
    words = {"memorized": "memorised", "onset": "onset", "generalized": "generalised"}
    return ", ".join(f"{words[event]} {step:,}" for event, step in summary.steps.items() if step is not None)


def save(figure: Figure, file: Path) -> None:
    """Write a figure, with a palette where Pillow is at hand."""
    figure.savefig(file, dpi=100, metadata={"Software": None})
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return
    image = Image.open(file).convert("RGB")
    image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
