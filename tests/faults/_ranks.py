"""Two ranks of which one dies: forked from one warmed process, ended by force if they hang.

``python -m tests.faults._ranks FOLDER``
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from grok_callbacks import EverySteps, Monitor, NormMonitor, default_callbacks
from tests._common import Counting, Logits, Plain, loader, trainer

# A survivor learns of a death at once, by the connection; this is for what would be a hang.
TIMEOUT, DEADLINE = 20, 60
AT = 3


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(Plain):
    """Dies in its own training step."""

    def __init__(self, rank=None):
        super().__init__()
        self.dying = rank

    def training_step(self, batch, batch_idx):
        if self.global_rank == self.dying and self.trainer.global_step == AT:
            die()
        return super().training_step(batch, batch_idx)


class Summing(Monitor):
    """Talks with the other rank; one dies, fails or exits on the way."""

    def __init__(self, rank, act, **kwargs):
        super().__init__(**kwargs)
        self.rank, self.act = rank, act

    def measure(self, snapshot):
        total = snapshot.ranks.all_reduce(torch.ones(()))
        if snapshot.step == AT and snapshot.ranks.rank == self.rank:
            self.act()
        return {"sum": total + snapshot.ranks.all_reduce(torch.ones(()))}


class Choosy(Monitor):
    """Looks at the model on one rank only, before, between or after what the ranks do together."""

    def __init__(self, rank, error, **kwargs):
        super().__init__(**kwargs)
        self.rank, self.error = rank, error

    def bind(self, view):
        view.ranks.all_reduce(torch.ones(()))
        if view.ranks.rank == self.rank:
            raise self.error("on one rank")
        view.ranks.all_reduce(torch.ones(()))

    def measure(self, snapshot):
        return {"choosy": snapshot.ranks.all_reduce(torch.ones(()))}


def fail():
    raise ZeroDivisionError("on one rank")


def choosy(rank, error, *, optional):
    monitor = Choosy(rank, error)
    monitor.optional = optional
    return monitor


EVERY = EverySteps(1)
CASES = {
    "nobody dies": lambda: (Plain(), [Counting(schedule=EVERY), *default_callbacks("economy", schedule=EVERY)]),
    **{
        f"{what} {rank}": case
        for rank in (0, 1)
        for what, case in {
            "plain dies": lambda rank=rank: (Dying(rank), []),
            "step dies": lambda rank=rank: (Dying(rank), [Summing(2, die, schedule=EVERY), NormMonitor(schedule=EVERY)]),
            "measurement dies": lambda rank=rank: (Plain(), [Summing(rank, die, schedule=EVERY), Counting(schedule=EVERY)]),
            "measurement fails": lambda rank=rank: (Plain(), [Summing(rank, fail, schedule=EVERY), Counting(schedule=EVERY)]),
            "bind fails": lambda rank=rank: (
                Plain(), [choosy(rank, KeyError, optional=True), Logits(schedule=EVERY), Counting(schedule=EVERY)],
            ),
            "bind refuses": lambda rank=rank: (Plain(), [choosy(rank, ValueError, optional=False), Counting(schedule=EVERY)]),
        }.items()
    },
}  # fmt: skip


def child(rank: int, port: int, case: str, file: Path) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.manual_seed(0)
    module, callbacks = CASES[case]()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer(callbacks, devices=2, strategy=strategy, max_steps=6).fit(module, loader())
            end = "finished"
        except BaseException as error:
            end = type(error).__name__
    steps = next((callback.steps for callback in callbacks if isinstance(callback, Counting)), None)
    said = [
        str(warning.message)
        for warning in caught
        if "switched off" in str(warning.message) or "left out" in str(warning.message)
    ]
    file.write_text(json.dumps({"end": end, "losses": len(module.losses), "steps": steps, "said": said}))


def run(case: str, folder: Path) -> list[dict[str, object]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [folder / f"{case.replace(' ', '_')}{rank}.json" for rank in (0, 1)]
    processes = []
    for rank, file in enumerate(files):
        process = os.fork()
        if process == 0:
            try:
                child(rank, port, case, file)
            finally:
                os._exit(0)  # As it is: nothing is to be waited for, such as the other rank.
        processes.append(process)
    hung = wait(processes)
    return [
        json.loads(file.read_text()) if file.exists() else {"end": "hung" if process in hung else "killed"}
        for file, process in zip(files, processes, strict=True)
    ]


def wait(processes: list[int]) -> set[int]:
    """Until all have ended; those that have not by the deadline are killed and returned."""
    left, deadline = set(processes), time.monotonic() + DEADLINE
    while left and time.monotonic() < deadline:
        left -= {process for process in left if os.waitpid(process, os.WNOHANG)[0]}
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return left


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    target = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    (target / "outcome.json").write_text(json.dumps({case: run(case, target) for case in CASES}))
