"""What adaptive noise and a commutativity penalty buy, and which signal moves first, after Tan and Huang (arXiv 2311.06597).

Every cell of every table is one run whose result is one JSON file, so that what was cut off goes on where it stopped:

    python examples/reproduce_robustness.py --output runs/robustness          # 12 CPU-minutes, and the transformer's
    python examples/reproduce_robustness.py --output runs/robustness --report docs/reproductions
    python examples/reproduce_robustness.py --only paper                      # the paper's own size: hours, without a GPU
    python examples/reproduce_robustness.py --verify                          # that the loop is what a Trainer does

The mixins are the package's own, grafted by ``with_mixins``; the monitors are its own, driven by a ``Recorder``. The loop
around them is a plain one, quicker than a Trainer on networks this small, and bit for bit the same (``--verify``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from grok_callbacks import CommutativityMonitor, EverySteps, GroupLawMonitor, NormMonitor, Probe, Recorder, RobustnessMonitor
from grok_callbacks.forecast.onset import OnsetTracker
from grok_callbacks.mixins import CommutativityMixin, InputNoiseMixin, Mixin, with_mixins
from grok_callbacks.tasks import (
    DecoderTransformer,
    PairTaskDataModule,
    Recipe,
    embedding_recipe,
    one_hot_recipe,
    transformer_recipe,
)

EVERY = 10  # steps between measurements
AFTERWARDS = 200  # steps that a run goes on once it has generalised

METHODS: dict[str, Callable[[], Mixin | None]] = {
    "baseline": lambda: None,
    "noise": lambda: InputNoiseMixin(l1=0.5, l2=0.4, on="embedding"),
    "small noise": lambda: InputNoiseMixin(l1=0.06, l2=0.03, on="embedding"),
    "penalty": lambda: CommutativityMixin(weight=100.0),
    "small penalty": lambda: CommutativityMixin(weight=1.0),
    "mirrored data": lambda: None,
}


def paper_recipe(task: str = "add", size: int = 113, weight_decay: float = 1.0, seed: int = 0) -> Recipe:
    """The paper's network and data: one layer, no LayerNorm, 30% of all pairs."""
    data = PairTaskDataModule(task, size, train_fraction=0.3, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"d_model": 128, "mlp_width": 512, "layer_norm": False}
        module = DecoderTransformer(size, size, **shape, lr=1e-3, weight_decay=weight_decay)
    return Recipe(module, data, max_steps=20_000)


class Setting(NamedTuple):
    """A network on a task."""

    recipe: Callable[..., Recipe]
    task: str
    size: int
    max_steps: int
    title: str


SETTINGS = {
    "mlp add": Setting(embedding_recipe, "add", 59, 2000, "embedding MLP, x + y mod 59, 50%"),
    "mlp sub": Setting(embedding_recipe, "sub", 59, 1000, "embedding MLP, x - y mod 59, 50%"),
    "mlp random": Setting(embedding_recipe, "random", 59, 600, "embedding MLP, random labels, 50%"),
    "onehot s4": Setting(one_hot_recipe, "permutation", 4, 1000, "one-hot MLP, S_4, 70%"),
    "transformer add": Setting(transformer_recipe, "add", 31, 2000, "transformer, x + y mod 31, 40%"),
    "paper": Setting(paper_recipe, "add", 113, 20_000, "the paper's transformer, x + y mod 113, 30%"),
}


class Cell(NamedTuple):
    """One run."""

    setting: str
    method: str
    seed: int

    @property
    def file(self) -> str:
        """Name of the file with its result."""
        return f"{self.setting}-{self.method}-{self.seed}.json".replace(" ", "_")


PLAN = {
    "mlp add": ["baseline", "noise", "penalty", "small penalty", "small noise", "mirrored data"],
    "mlp random": ["baseline"],
    "mlp sub": ["baseline", "noise", "penalty", "small penalty"],
    "onehot s4": ["baseline", "penalty", "small penalty"],
    "transformer add": ["baseline", "noise", "penalty", "small penalty"],
    "paper": ["baseline", "noise", "penalty", "small penalty"],
}


def cells(seeds: int, only: list[str] | None) -> Iterator[Cell]:
    """All runs, seed by seed, so that what was cut off has whole seeds."""
    for setting in only or [name for name in PLAN if name != "paper"]:
        for seed in range(seeds):
            for method in PLAN[setting]:
                yield Cell(setting, method, seed)


# --- one run --------------------------------------------------------------------------------------------------------


def prepare(cell: Cell) -> Recipe:
    setting = SETTINGS[cell.setting]
    recipe = setting.recipe(setting.task, setting.size, seed=cell.seed)
    mixin = METHODS[cell.method]()
    return recipe if mixin is None else recipe._replace(module=with_mixins(recipe.module, mixin))


def monitors_of(cell: Cell, recipe: Recipe) -> list[Any]:
    """Commutativity on all pairs; on baseline runs the signals too."""
    train, val = (dataset[:] for dataset in (recipe.data.train_set, recipe.data.val_set))
    schedule = EverySteps(EVERY)
    everything = Probe(size=len(train[0]) + len(val[0]), train=train, validation=val)
    monitors: list[Any] = [CommutativityMonitor(probe=everything, schedule=schedule)]
    if cell.method == "baseline":
        monitors += [
            NormMonitor(schedule=schedule),
            RobustnessMonitor(
                num_samples=256, num_draws=5, gradient_probes=4, probe=Probe(size=256, train=train), schedule=schedule
            ),
        ]
        group = recipe.data.task.group
        if group is not None:
            monitors.append(GroupLawMonitor(group.table, probe=everything, schedule=EverySteps(5 * EVERY)))
    return monitors


def training_batch(cell: Cell, samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The full batch; with "mirrored data" every pair in both orders, which is what the penalty has to be better than."""
    if cell.method != "mirrored data":
        return samples
    inputs, targets = samples
    return torch.cat([inputs, inputs.flip(1)]), torch.cat([targets, targets])


@torch.no_grad()
def accuracy(module: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    module.eval()
    correct = (module(samples[0]).argmax(1) == samples[1]).float().mean().item()
    module.train()
    return correct


def train_steps(module: Any, batch: tuple[Tensor, Tensor], steps: int) -> Iterator[int]:
    """Take optimiser steps; gives the number taken so far, before each and after the last."""
    optimizer = module.configure_optimizers()
    for step in range(steps):
        yield step
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        module.backward(loss)
        optimizer.step()
    yield steps


def run(cell: Cell) -> dict[str, Any]:
    setting = SETTINGS[cell.setting]
    recipe = prepare(cell)
    module = recipe.module
    train, val = (dataset[:] for dataset in (recipe.data.train_set, recipe.data.val_set))
    recorder = Recorder(module, monitors_of(cell, recipe))
    tracker = OnsetTracker()
    seconds, last = 0.0, time.process_time()
    for step in train_steps(module, training_batch(cell, train), setting.max_steps):
        if step % EVERY:
            continue
        seconds += time.process_time() - last
        accuracies = {"train_acc": accuracy(module, train), "val_acc": accuracy(module, val)}
        tracker.update_train(step, accuracies["train_acc"])
        tracker.update_validation(step, accuracies["val_acc"])
        recorder.record(step, metrics={**accuracies, "seconds": seconds})
        if tracker.grokked_step is not None and step >= tracker.grokked_step + AFTERWARDS:
            break
        last = time.process_time()
    kept = [key for key in recorder.history if not key.startswith("grok/norm/")]
    curves = {key: [recorder.history[key].steps, recorder.history[key].values] for key in kept}
    events = {name: getattr(tracker, name) for name in ("memorized_step", "onset_step", "grokked_step")}
    return {**cell._asdict(), **events, "last_step": step, "curves": curves}


def run_all(output: Path, seeds: int, only: list[str] | None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for cell in cells(seeds, only):
        path = output / cell.file
        if path.exists():
            continue
        start = time.process_time()
        result = {**run(cell), "cpu_seconds": time.process_time() - start}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(path)  # a file that is there is whole
        events = {key: result[key] for key in ("memorized_step", "onset_step", "grokked_step", "cpu_seconds")}
        print(f"{cell.file}: {events}", flush=True)


def verify() -> None:
    """Thirty steps of each method by a Trainer and by the plain loop: the weights must be equal to the last bit."""
    for method in (name for name, make in METHODS.items() if make() is not None or name == "baseline"):
        modules = []
        for in_trainer in (True, False):
            recipe = prepare(Cell("mlp add", method, 0))
            if in_trainer:
                quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
                trainer = pl.Trainer(accelerator="cpu", max_epochs=-1, max_steps=30, limit_val_batches=0, **quiet)
                trainer.fit(recipe.module, train_dataloaders=recipe.data.train_dataloader())
            else:
                assert list(train_steps(recipe.module, recipe.data.train_set[:], 30))[-1] == 30
            modules.append(recipe.module)
        pairs = list(zip(*(module.parameters() for module in modules), strict=True))
        print(f"{method}: {'equal' if all(torch.equal(a, b) for a, b in pairs) else 'DIFFERENT'}, {len(pairs)} tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "grok_callbacks_robustness")
    parser.add_argument("--only", nargs="+", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write robustness.md and its figures into this folder and run nothing")
    parser.add_argument("--verify", action="store_true", help="compare the plain loop with a Trainer and run nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", ".*self.trainer. reference is not registered.*")
    if options.verify:
        verify()
    elif options.report:
        from robustness_report import write

        write(options.output, options.report)
    else:
        run_all(options.output, options.seeds, options.only)


if __name__ == "__main__":
    main()
