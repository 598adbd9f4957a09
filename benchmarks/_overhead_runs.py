"""One run, in a process of its own: its time, the callbacks' share of it, and its peak memory."""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks._overhead_tasks import TASKS
from grok_callbacks import default_callbacks
from grok_callbacks.callbacks import _session


def run(name: str, preset: str, steps: int) -> dict[str, Any]:
    """One fit, with a preset or with none: its time, what of it was spent in the callbacks, and peak memory."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module, data = TASKS[name].make()
    spent = _clocked()
    callbacks = [] if preset == "none" else default_callbacks(preset)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=TensorBoardLogger(folder), callbacks=callbacks,
            val_check_interval=TASKS[name].validate_every, check_val_every_n_epoch=None, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=10, num_sanity_val_steps=0,
        )  # fmt: skip
        clock, cpu = time.perf_counter(), time.process_time()
        trainer.fit(module, data)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    recorder = callbacks[0]._recorder if callbacks else None
    return {
        "clock": clock,
        "cpu": cpu,
        "spent": spent[0],
        "peak": _peak(),
        "measurements": {slot.monitor.label: slot.measurements for slot in recorder._slots} if recorder is not None else {},
        "seconds": recorder.seconds if recorder is not None else {},
        "weights": float(sum(parameter.double().sum() for parameter in module.parameters())),
    }


def _peak() -> float:
    """Largest resident set so far in MiB; ``getrusage`` would count that of the process which started this one."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def _clocked() -> list[float]:
    """Have a clock run whenever the callbacks do anything at all; its reading is the one entry of the list."""
    spent = [0.0]

    def clocked(action: Callable[..., None]) -> Callable[..., None]:
        @wraps(action)
        def timed(*args: Any, **kwargs: Any) -> None:
            start = time.process_time()
            try:
                action(*args, **kwargs)
            finally:
                spent[0] += time.process_time() - start

        return timed

    for hook, action in list(_session._ACTIONS.items()):
        _session._ACTIONS[hook] = clocked(action)
    return spent


if __name__ == "__main__":
    print("RESULT " + json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
