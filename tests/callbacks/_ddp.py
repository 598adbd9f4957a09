"""Runs in two processes, for the tests of distributed training: a program, as ``Trainer(strategy="ddp")`` wants it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from grok_callbacks import AtValidation, EverySteps, Monitor, Probe
from tests._common import Counting, Logits, Plain, Stream, loader, samples, trainer
from tests.callbacks._all_monitors import all_monitors
from tests.callbacks.test_forecast import Events, Norms, forecaster, model


class Summing(Monitor):
    """Splits its work over ranks."""

    def __init__(self, fails_on=None, **kwargs):
        super().__init__(**kwargs)
        self.fails_on = fails_on

    def measure(self, snapshot):
        for part in ("before", "between", "after"):
            if self.fails_on == (part, snapshot.ranks.rank) and snapshot.step >= 2:
                raise RuntimeError(f"rank {snapshot.ranks.rank} failed {part}")
            if part != "after":
                total = snapshot.ranks.all_reduce(torch.tensor(float(snapshot.ranks.rank + 1)))
        everyone = snapshot.ranks.gather(snapshot.ranks.rank)
        return {"sum": total, "ranks": float(len(everyone))}


class PerRank(Monitor):
    """Measures what differs by rank, under keys that differ by rank."""

    def measure(self, snapshot):
        return {"rank": float(snapshot.ranks.rank), f"key{snapshot.ranks.rank}": 1.0}


class Concluding(Monitor):
    def __init__(self, fails_on=None, **kwargs):
        super().__init__(**kwargs)
        self.fails_on = fails_on

    def measure(self, snapshot):
        return {}

    def analyse(self, history, step):
        if step >= 2 and self._recorder._ranks.rank == self.fails_on:
            raise RuntimeError("no conclusion")
        return {"conclusion": float(step)}


def run(folder, *, max_steps=6, callbacks=None, train=None, validation=None, ckpt_path=None, module=None, extra=(), **kwargs):
    L.seed_everything(3, verbose=False)
    callbacks = callbacks if callbacks is not None else [Summing(), *all_monitors(schedule=EverySteps(2), probe=Probe(size=12))]
    settings = {"devices": 2, "strategy": "ddp"} if int(os.environ.get("TEST_WORLD_SIZE", "1")) > 1 else {}
    made = trainer(
        [*callbacks, *extra], logger=TensorBoardLogger(folder, name="", version=""), max_steps=max_steps, **settings, **kwargs
    )
    module = module or Plain(logs=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(
            module,
            loader() if train is None else train,
            loader(16, seed=1) if validation is None else validation,
            ckpt_path=ckpt_path,
        )
    return (
        callbacks,
        made,
        [str(warning.message) for warning in caught if "grok" in str(warning.message) or "failed" in str(warning.message)],
    )


def report(callbacks, made, messages=()):
    recorder = callbacks[0]._recorder
    return {
        "history": {key: [series.steps, series.values] for key, series in recorder.history.items()},
        "metrics": sorted(key for key in made.callback_metrics if key.startswith("grok/")),
        "switched_off": recorder.switched_off,
        "warnings": list(messages),
        "steps": made.global_step,
        "probe": [recorder.samples(probe)["train"].inputs.sum().item() for probe in recorder.probes],
    }


def everything(folder):
    """All that is asked of two processes, in one start of them, since a start takes seconds."""
    results = {}
    results["all"] = report(*run(folder / "all", check_val_every_n_epoch=1))
    results["per rank"] = report(*run(folder / "rank", callbacks=[PerRank(schedule=EverySteps(1))], max_steps=3))

    stream = [DataLoader(Stream(samples(16, seed)), 8) for seed in (0, 1)]
    data = [Logits(probe=Probe(size=12), schedule=EverySteps(1)), Counting(schedule=AtValidation())]
    results["iterable"] = report(*run(folder / "iterable", callbacks=data, train=stream[0], validation=stream[1], max_steps=5))

    for part in ("before", "between", "after"):
        for rank in (0, 1):
            failing = [Counting(schedule=EverySteps(1)), Summing((part, rank), schedule=EverySteps(1)), Logits(prefix="last")]
            results[f"{part} {rank}"] = report(*run(folder / f"{part}{rank}", callbacks=failing, max_steps=4))
    for rank in (0, 1):
        concluding = [Concluding(rank, schedule=EverySteps(1)), Counting(schedule=EverySteps(1))]
        results[f"analysis {rank}"] = report(*run(folder / f"analysis{rank}", callbacks=concluding, max_steps=4))

    budget = [Counting(schedule=EverySteps(1), budget=1e-9), Counting("free", schedule=EverySteps(1))]
    results["budget"] = report(*run(folder / "budget", callbacks=budget, max_steps=4))

    # Stopped and resumed, with early stopping and checkpoints that read the measurements.
    def stopping():
        return [ModelCheckpoint(folder, monitor="grok/norm", filename="best"), EarlyStopping("grok/norm", patience=99)]

    _, made, _ = run(folder / "resumed", max_steps=3, extra=stopping(), enable_checkpointing=True)
    made.save_checkpoint(folder / "x.ckpt")
    results["resumed"] = report(
        *run(folder / "resumed", ckpt_path=folder / "x.ckpt", extra=stopping(), enable_checkpointing=True)
    )
    results["failures"] = failures(folder)
    results["warned"] = forecasting(folder / "warned", norm=0.3)
    results["hopeless"] = forecasting(folder / "hopeless", norm=3.0)
    return results


def forecasting(folder, norm):
    """A forecast that warns, or gives the run up."""
    said, printed = [], io.StringIO()
    forecast = forecaster(1, model=model(wait=2), stop_hopeless=True, on_warning=lambda forecast: said.append(forecast.step))
    callbacks = [Norms(norm, change_at=4, every=1), Events(2, every=1), forecast]
    with contextlib.redirect_stdout(printed):
        result = report(*run(folder, callbacks=callbacks, max_steps=14, module=Plain()))
    lines = [line for line in printed.getvalue().splitlines() if "generalise" in line]
    return {**result, "said": said, "printed": lines, "should_stop": forecast.should_stop}


def failures(folder):
    """What stops a run must stop it on both ranks."""
    outcomes = {}
    for name, callbacks in {
        "unreadable": [Logits(probe=Probe(unpack=only_on_rank_0))],
        "raise": [Summing(("before", 1), schedule=EverySteps(1), on_error="raise")],
    }.items():
        try:
            run(folder / name, callbacks=callbacks, max_steps=3)
            outcomes[name] = "nothing"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    return outcomes


def only_on_rank_0(batch):
    if torch.distributed.get_rank() == 0:
        raise KeyError("a batch of another kind")
    return batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    result = everything(target)
    (target / f"result{rank}.json").write_text(json.dumps(result))
