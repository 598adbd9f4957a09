"""One run, in a process of its own: its time, the callbacks' share of it, and its peak memory; and several taking turns."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import grok_callbacks.recorder
from benchmarks._overhead_tasks import TASKS
from grok_callbacks import default_callbacks
from grok_callbacks.callbacks import _session

#: No callbacks; and none, but a few other forward passes before the first step.
NONE, USED = BARE = ("none", "used heap")
#: A preset that was given a budget.
CAPPED = "standard, budget 0.05"


def run(name: str, preset: str, steps: int, *others: Callback) -> dict[str, Any]:
    """One fit, with a preset or with none: its time, what of it was spent in the callbacks, peak memory and page faults."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module, data = TASKS[name].make()
    spent = _clocked()
    # The monitors' own clocks as well: they would go on while the process is stopped.
    grok_callbacks.recorder.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    callbacks = _callbacks(preset)
    if preset == USED:
        others = (*others, UsedHeap())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=[*callbacks, *others],
            logger=TensorBoardLogger(folder), val_check_interval=TASKS[name].validate_every, check_val_every_n_epoch=None,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=10,
            num_sanity_val_steps=0,
        )  # fmt: skip
        cpu = time.process_time()
        trainer.fit(module, data)
        cpu = time.process_time() - cpu
    recorder = callbacks[0]._recorder if callbacks else None
    return {
        "cpu": cpu,
        "spent": spent[0],
        "peak": _peak(),
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        "measurements": {slot.monitor.label: slot.measurements for slot in recorder._slots} if recorder is not None else {},
        "seconds": recorder.seconds if recorder is not None else {},
        "weights": _fingerprint(module),
    }


def _callbacks(preset: str) -> list[Any]:
    if preset in BARE:
        return []
    name, _, budget = preset.partition(", budget ")
    return default_callbacks(name, budget=float(budget) if budget else None)  # type: ignore[arg-type]


def _fingerprint(module: nn.Module) -> str:
    """Of the weights, to the last bit."""
    return sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())).hexdigest()


# Whether the allocator hands memory back within a step and fetches it anew in the next hangs on where things happen to lie, and
# on what was allocated before. With these settings it keeps all.
_KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25), "PYTHONHASHSEED": "0"}


def take_turns(name: str, presets: Sequence[str], steps: int, *, keep: bool = False) -> list[dict[str, Any]]:
    """The same run with each preset, in turns of so many steps: a slow moment of the machine meets all at the same step.

    Args:
        name: Of the task.
        presets: Of the runs.
        steps: Of each run.
        keep: Whether the allocator keeps what is freed, in all of them; otherwise it does as it comes.

    Returns:
        What each run gave, and as ``core`` the share of a core that it had in its turns.
    """
    allocator = _KEEP if keep else {}
    with ExitStack() as stack:
        processes = []
        going = {}
        for number, preset in enumerate(presets):
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = _started(errors, name, preset, str(steps), **allocator)
            stack.callback(process.kill)
            processes.append((process, errors))
            # It stops by itself at its first step.
            if os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]):
                going[number] = process
        turns = [0.0] * len(processes)
        while going:
            for number, process in list(going.items()):
                start = time.perf_counter()
                process.send_signal(signal.SIGCONT)
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                turns[number] += time.perf_counter() - start
                if not os.WIFSTOPPED(status):
                    del going[number]
        return [
            {**result, "core": result["cpu"] / turn}
            for result, turn in zip((_result(*process) for process in processes), turns, strict=True)
        ]


def save_checkpoints(name: str, presets: Sequence[str], steps: int) -> list[dict[str, float]]:
    """What a checkpoint costs at the end of a run with each preset, each in a process of its own."""
    results = []
    for preset in presets:
        with tempfile.TemporaryFile("w+") as errors:
            process = _started(errors, name, preset, str(steps), "checkpoints")
            results.append(_result(process, errors)["checkpoint"])
    return results


def _started(errors: IO[str], *words: str, **variables: str) -> subprocess.Popen[str]:
    """A process of this module's own, with further environment variables."""
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", __spec__.name, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)


class _Saves(Callback):
    """Saves checkpoints at the end: seconds and bytes of one."""

    TIMES = 20

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.ckpt"
            seconds = []
            for _ in range(self.TIMES):
                start = time.process_time()
                trainer.save_checkpoint(path)
                seconds.append(time.process_time() - start)
            self.found = {"seconds": statistics.median(seconds), "bytes": path.stat().st_size}


class _Turns(Callback):
    """Stops the process after so many steps, until somebody lets it go on."""

    STEPS = 20

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % self.STEPS == 0:
            os.kill(os.getpid(), signal.SIGSTOP)


class UsedHeap(Callback):
    """Has memory of other sizes used once, as validation on larger batches would."""

    SIZES = (256, 512, 1_488, 128, 700)
    TIMES = 3

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.random.fork_rng(), torch.no_grad():
            inputs = next(iter(trainer.datamodule.val_dataloader()))[0]  # type: ignore[attr-defined]
            pl_module.eval()
            for size in self.SIZES * self.TIMES:
                pl_module(inputs[torch.arange(size) % len(inputs)])
            pl_module.train()


def _result(process: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return read_result(process.stdout.read(), errors)


def read_result(output: str, errors: IO[str]) -> Any:
    """What a process of the benchmark printed last."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if not lines:
        errors.seek(0)
        raise RuntimeError(f"A run gave no result:\n{errors.read()[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


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


def _main(name: str, preset: str, steps: str, what: str = "") -> dict[str, Any]:
    if not what:
        return run(name, preset, int(steps), _Turns())
    saves = _Saves()
    run(name, preset, int(steps), saves)
    return {"checkpoint": saves.found}


if __name__ == "__main__":
    print("RESULT " + json.dumps(_main(*sys.argv[1:])))
