"""A program that trains, is killed again and again, and resumes: one warmed process forks each child, in tenths of a second.

``python -m tests.faults._killed FOLDER KILLS SEED``
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from grok_callbacks import EveryEpoch, EverySteps, LogSpaced, default_callbacks
from tests._common import Counting, Plain, loader, samples, trainer

STEPS = 110
SAVE_EVERY = 4


class Batches:
    """A loader that goes on amid an epoch, so that Lightning resumes exactly from any step."""

    def __init__(self):
        self.dataset = samples(35)
        self.position = 0

    def __len__(self):
        return 5

    def __iter__(self):
        while self.position < len(self):
            self.position += 1
            x, y = self.dataset.tensors
            yield x[self.position - 1 :: 5], y[self.position - 1 :: 5]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Telling(L.Callback):
    """Writes each step that is being taken into a pipe, which outlives the process."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_batch_start(self, trainer, *args):
        os.write(self.pipe, f"{trainer.global_step}\n".encode())


class Scalars(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def train(folder: Path, pipe: int) -> None:
    """Train from the last checkpoint there is to the end."""
    torch.manual_seed(0)
    callbacks = [
        *default_callbacks("standard", schedule=LogSpaced(10)),
        Counting("steps", schedule=EverySteps(1)),
        Counting("epochs", schedule=EveryEpoch(2)),
        ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1),
        Telling(pipe),
    ]
    made = trainer(
        callbacks, max_steps=STEPS, logger=TensorBoardLogger(folder, name="", version="events"), enable_checkpointing=True,
        log_every_n_steps=10, check_val_every_n_epoch=3,
    )  # fmt: skip
    made.fit(Scalars(), Batches(), loader(16, seed=1), ckpt_path=last_checkpoint(folder))
    os.write(pipe, b"done\n")


def last_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    return found[-1] if found else None


def spawn(folder: Path) -> tuple[int, int]:
    """A child that trains; its process number, and the end of the pipe to read its steps from."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.close(reading)
    try:
        train(folder, writing)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_until(folder: Path, step: int | None, delay: float) -> tuple[str, int]:
    """Train until ``step`` is taken and ``delay`` seconds longer, then kill; or to the end. Returns what was told last."""
    process, reading = spawn(folder)
    told = ""
    with os.fdopen(reading) as pipe:
        for line in pipe if step != -1 else ():
            told = line.strip()
            if step is not None and (told == "done" or int(told) >= step):
                break
        if step is not None:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    return told, status


def main(folder: Path, kills: int, seed: int) -> dict[str, object]:
    chance = random.Random(seed)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    _, status = run_until(folder / "whole", None, 0.0)
    assert status == 0, "the uninterrupted run failed"
    outcomes: list[list[object]] = []
    for number in range(kills):
        last = last_checkpoint(folder / "killed")
        start = int(last.stem.split("=")[1]) if last is not None else 0
        # Spread over the run, so that there is one left to be killed at the end; now and then while the process starts.
        target = max(start, (number + 1) * (STEPS - 2) // kills - chance.randrange(8))
        step = -1 if chance.random() < 0.15 else target
        told, status = run_until(folder / "killed", step, chance.uniform(0.0, 0.15 if step == -1 else 0.02))
        outcomes.append([start, told, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0])
    told, status = run_until(folder / "killed", None, 0.0)
    return {"kills": outcomes, "last": [told, status]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    target = Path(sys.argv[1])
    # Children inherit what a first, tiny fit has imported.
    warm = trainer([*default_callbacks("standard")], max_steps=101, logger=TensorBoardLogger(target / "warm"))
    warm.fit(Plain(), loader())
    (target / "outcome.json").write_text(json.dumps(main(target, int(sys.argv[2]), int(sys.argv[3]))))
