"""The demo: a network groks under the eyes of a preset."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from grok_callbacks.callbacks import GrokkingDetector, default_callbacks
from grok_callbacks.tasks.recipes import one_hot_recipe

if TYPE_CHECKING:
    from grok_callbacks.callbacks.monitor import Preset
    from grok_callbacks.forecast.onset import Outcome

__all__ = ["run_demo"]


def run_demo(
    output: Path,
    *,
    steps: int = 2000,
    seed: int = 0,
    weight_decay: float = 1.0,
    task: str = "add",
    preset: Preset = "standard",
) -> tuple[Path, Outcome | None]:
    """Train the quickest network to grok, with a progress bar, and say what happens while it does.

    Args:
        output: The run's folder; what an earlier demo left there is removed.
        steps: Optimiser steps.
        seed: Seed of the split and of the weights.
        weight_decay: Weight decay; with 0 the network memorises for good.
        task: Name of the task, see :func:`~grok_callbacks.tasks.make_task`.
        preset: Which monitors watch.

    Returns:
        The folder of the event files, and what the run was, ``None`` if that hangs on what was not measured.

    Raises:
        ValueError: If there is no such task, or ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    recipe = one_hot_recipe(task, weight_decay=weight_decay, seed=seed)
    recipe.data.steps_per_epoch = steps
    run_dir = Path(output)
    for stale in run_dir.glob("events.out.tfevents.*"):
        stale.unlink()
    callbacks = default_callbacks(preset)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=1,
        val_check_interval=min(10, steps),
        num_sanity_val_steps=0,
        callbacks=[*callbacks, TQDMProgressBar(refresh_rate=20)],
        logger=TensorBoardLogger(run_dir.parent, name=run_dir.name, version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    # For a network this small a second thread only waits, and on a busy machine it makes the run many times slower.
    with warnings.catch_warnings(), _one_thread():
        # Data of a thousand integer pairs need no workers.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(recipe.module, recipe.data)
    detector = next(callback for callback in callbacks if isinstance(callback, GrokkingDetector))
    return run_dir, detector.outcome


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
