"""Does complexity rise and fall, and what does each regulariser leave, after DeMoss et al. (arXiv 2412.09810).

Four tasks (+, -, x, / modulo a prime) and random labels as a control; three regularisers (none, weight decay, weight decay
with the spectral-entropy penalty and weight noise) and the two parts of the last; three seeds. Every run's result is one
JSON file, so that what was cut off goes on where it stopped:

    python examples/reproduce_complexity.py --output runs/complexity            # an MLP, p = 43: some 25 CPU-minutes
    python examples/reproduce_complexity.py --output runs/complexity --report docs/reproductions
    python examples/reproduce_complexity.py --size paper                        # p = 113: an hour or more a run

The mixins are the package's own, grafted by ``with_mixins``; the monitors are its own, driven by a ``Recorder`` in a plain
loop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grok_callbacks import ComplexityMonitor, EverySteps, LogSpaced, Probe, Recorder, SpectralEntropyMonitor
from grok_callbacks.mixins import Mixin, SpectralEntropyMixin, WeightNoiseMixin, with_mixins
from grok_callbacks.schedule import Schedule
from grok_callbacks.tasks import DecoderTransformer, EmbeddingMLP, PairTaskDataModule

TASKS = ("add", "sub", "mul", "div")
CONTROL = "random"  # labels without a rule
REGULARISERS = ("none", "weight decay", "spectral")
PARTS = ("entropy", "noise")  # of "spectral", each alone with weight decay
EPSILONS = (1.0, 0.1)
BETA = 0.1
NOISE = {"add": 1e-2, "mul": 1e-2, "sub": 1e-3, "div": 1e-3, CONTROL: 1e-2}  # the paper's
HARD = ("sub", "div")  # what the paper gives more layers and more data
LOOKS = 10  # steps between accuracies


@dataclass(frozen=True)
class Size:
    """A network, its data and how long it trains; pairs are for (+, x) and (-, /)."""

    network: type[EmbeddingMLP | DecoderTransformer]
    modulus: int
    width: int  # of the embedding
    hidden: int
    layers: tuple[int, int]
    fractions: tuple[float, float]
    learning_rate: float
    batch_size: int | None  # None: full batches
    steps: int
    every: int  # steps between measurements, at most


SIZES = {
    "small": Size(EmbeddingMLP, 43, 32, 128, (1, 1), (0.5, 0.5), 1e-2, None, 3000, 100),
    "large": Size(EmbeddingMLP, 113, 64, 128, (1, 1), (0.5, 0.5), 1e-2, None, 3000, 100),
    "transformer": Size(DecoderTransformer, 31, 32, 128, (1, 1), (0.5, 0.6), 5e-3, None, 3000, 100),
    "paper": Size(DecoderTransformer, 113, 128, 512, (1, 2), (0.2, 0.3), 1e-3, 512, 100_000, 2000),
}


class Run(NamedTuple):
    """One training run."""

    size: str
    task: str
    regulariser: str
    seed: int

    @property
    def file(self) -> str:
        """Name of the file with its result."""
        return f"{self.size}-{self.task}-{self.regulariser}-{self.seed}.json".replace(" ", "_")


@dataclass(frozen=True)
class Often(Schedule):
    """Four log-spaced steps a decade, and every n."""

    n: int

    def next_step(self, after: int) -> int:
        """The earlier of the two."""
        return min(LogSpaced(4).next_step(after), EverySteps(self.n).next_step(after))


def prepare(run: Run) -> tuple[Any, PairTaskDataModule]:
    """The module, grafted where the regulariser asks for it, and the data."""
    size, hard = SIZES[run.size], run.task in HARD
    data = PairTaskDataModule(run.task, size.modulus, train_fraction=size.fractions[hard], seed=run.seed)
    torch.manual_seed(run.seed)
    shape: dict[str, Any] = {"embedding_dim": size.width, "width": size.hidden, "depth": size.layers[hard]}
    if size.network is DecoderTransformer:
        shape = {"d_model": size.width, "mlp_width": size.hidden, "num_layers": size.layers[hard]}
    settings = {"lr": size.learning_rate, "weight_decay": 0.0 if run.regulariser == "none" else 1.0}
    module: Any = size.network(data.task.num_tokens, data.task.num_classes, **shape, **settings)
    mixins: list[Mixin] = [SpectralEntropyMixin(BETA)] if run.regulariser in ("spectral", "entropy") else []
    if run.regulariser in ("spectral", "noise"):
        mixins.append(WeightNoiseMixin(NOISE[run.task], seed=run.seed))
    return with_mixins(module, *mixins) if mixins else module, data


def monitors_of(size: Size, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> list[Any]:
    """Complexity over the whole training set, so that total length and bound hold; in ``tight`` less often."""
    whole = Probe(size=len(train[0]) + len(val[0]), train=train, validation=val)
    often = Often(size.every)
    return [
        ComplexityMonitor(EPSILONS, probe=whole, schedule=often),
        ComplexityMonitor(EPSILONS, "tight", probe=whole, schedule=EverySteps(size.steps // 20), prefix="tight"),
        SpectralEntropyMonitor(probe=whole, schedule=often),
    ]


def batches(samples: tuple[Tensor, Tensor], batch_size: int | None, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches, or shuffled ones, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if batch_size is None:
            yield samples
            continue
        for part in torch.randperm(len(samples[0]), generator=generator).split(batch_size):
            yield samples[0][part], samples[1][part]


@torch.no_grad()
def evaluate(module: nn.Module, samples: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss and accuracy."""
    module.eval()
    logits = module(samples[0])
    module.train()
    return nn.functional.cross_entropy(logits, samples[1]).item(), (logits.argmax(1) == samples[1]).float().mean().item()


def train(run: Run) -> dict[str, Any]:
    """The run's curves."""
    size = SIZES[run.size]
    module, data = prepare(run)
    train_set, val_set = data.train_set[:], data.val_set[:]
    recorder = Recorder(module, monitors_of(size, train_set, val_set))
    optimizer = module.configure_optimizers()
    stream = batches(train_set, size.batch_size, run.seed)
    for step in range(size.steps + 1):
        metrics: dict[str, float] = {}
        if step % LOOKS == 0:
            for split, samples in (("train", train_set), ("val", val_set)):
                metrics[f"{split}_loss"], metrics[f"{split}_acc"] = evaluate(module, samples)
        recorder.record(step, metrics=metrics)
        if step == size.steps:
            break
        loss = module.training_step(next(stream), step)
        optimizer.zero_grad()
        module.backward(loss)
        optimizer.step()
    kept = [key for key in recorder.history if "effective_rank" not in key]
    curves = {key: [recorder.history[key].steps, recorder.history[key].values] for key in kept}
    return {**run._asdict(), "samples": len(train_set[0]), "classes": data.task.num_classes, "curves": curves}


def train_all(output: Path, size: str, tasks: list[str], regularisers: list[str], seeds: list[int]) -> None:
    """All runs that are not there yet, seed by seed, so that what was cut off has whole seeds."""
    output.mkdir(parents=True, exist_ok=True)
    for run in (Run(size, task, name, seed) for seed in seeds for task in tasks for name in regularisers):
        path = output / run.file
        if path.exists():
            continue
        start = time.process_time()
        result = {**train(run), "cpu_seconds": time.process_time() - start}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(path)  # a file that is there is whole
        end = {key: result["curves"][key][1][-1] for key in ("train_acc", "val_acc", "grok/complexity/bits")}
        print(f"{run.file}: {end}, {result['cpu_seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "grok_callbacks_complexity")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, CONTROL), default=[*TASKS, CONTROL])
    parser.add_argument("--regularisers", nargs="+", choices=REGULARISERS + PARTS, default=list(REGULARISERS + PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write complexity.md and its figures into this folder and train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", ".*self.trainer. reference is not registered.*")
    if options.report is not None:
        from complexity_report import write

        write(options.output, options.size, options.report)
        return
    train_all(options.output, options.size, options.tasks, options.regularisers, options.seeds)


if __name__ == "__main__":
    main()
