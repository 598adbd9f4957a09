"""A Trainer on two ranks, replicated (DDP) and sharded (FSDP2): what one rank does, for :mod:`tests.matrix.test_two_ranks`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from grok_callbacks import EverySteps, Probe
from tests.matrix._environments import STEPS, Environment, Start, Task, whole
from tests.matrix._monitors import LOGGED, REFUSED, all_monitors, found_by, mixins

SIZE = 16


class Sharded(Task):
    """Two parts of the network, and the rest of it, are sharded over the ranks."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        if not hasattr(self.model.net[0].weight, "full_tensor"):
            for part in (self.model.net[0], self.model.net[2], self):
                fully_shard(part, mesh=mesh)


def ddp():
    return {"strategy": DDPStrategy()}


def fsdp():
    return {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}


#: The rows that take two processes. Each rank's batches are half of the data, so that no two see the same.
ROWS = {
    "DDP on two processes": Environment(trainer=ddp),
    "FSDP2 on two processes": Environment(make=Sharded, trainer=fsdp),
    "FSDP2, bf16-mixed, accumulated": Environment(
        make=Sharded, trainer=lambda: {**fsdp(), "precision": "bf16-mixed", "accumulate_grad_batches": 2}
    ),
}
#: Rows in which mixins train as well.
WITH_MIXINS = ("DDP on two processes", "FSDP2 on two processes")


def fit(row, callbacks=(), used=()):
    module, trainer = ROWS[row].fit(callbacks, used, devices=2, max_steps=STEPS)
    return whole(module), trainer


def everything(rank, folder):
    """All that is asked of two ranks, in one start of them."""
    torch.set_num_threads(1)
    # The group is there already; Lightning is told that it need not launch anything.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    warnings.simplefilter("ignore")
    return {row: in_row(row, Path(folder) / f"{number}.ckpt") for number, row in enumerate(ROWS)}


def in_row(row, checkpoint):
    everyone = all_monitors(False, schedule=EverySteps(STEPS), probe=Probe(size=SIZE), on_error="raise")
    monitors = [monitor for monitor in everyone if (row, type(monitor).__name__) not in REFUSED]
    start = Start()
    result = {"plain": fit(row, [start])[0], "start": start.weights, "refused": {}}
    result["watched"], trainer = fit(row, monitors)
    trainer.save_checkpoint(checkpoint)
    recorder = monitors[0]._recorder
    result["found"] = found_by(recorder)
    result["steps"] = sorted({step for series in recorder.history.values() for step in series.steps})
    for monitor in everyone:
        if monitor not in monitors:
            try:
                fit(row, [monitor])
            except ValueError as error:
                result["refused"][type(monitor).__name__] = str(error)
    result["mixins"] = {}
    if row in WITH_MIXINS:
        idle = [idle for _, idle in mixins(False).values() if idle is not None]
        result["idle"] = fit(row, used=idle)[0]
        for column, (mixin, _) in mixins(False).items():
            try:
                weights, trainer = fit(row, used=[mixin])
                logged = {key: float(trainer.callback_metrics[key]) for key in (LOGGED.get(column),) if key}
                result["mixins"][column] = weights, logged
            except ValueError as error:
                result["mixins"][column] = str(error)
    return result
