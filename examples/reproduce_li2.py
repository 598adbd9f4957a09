"""How features emerge in a two-layer network on addition modulo M, after Tian's Li2 (arXiv 2509.21519).

The network is ``softmax``-free: one-hot tokens (a, b), K units with the activation x^2, a linear layer on top, no biases,
squared error averaged over samples (outputs and targets centred over classes), full batch, Adam with an L2 penalty.
Every cell of every table is one small run whose result is one JSON file, so that a run that was cut off goes on where it
stopped:

    python examples/reproduce_li2.py --output runs/li2            # about 25 minutes on one core
    python examples/reproduce_li2.py --output runs/li2 --report docs/reproductions

``--only scaling`` runs one group of cells, ``--tiny`` tries everything at toy sizes in seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grok_callbacks.functional import (
    Li2Stage,
    center,
    feature_energy,
    feature_gradient,
    largest_feature_cosine,
    lazy_alignment,
    participation_ratio,
    relative_change,
    residual_alignment,
    residual_ratio,
    ridge_distance,
    ridge_strength,
)

MODULI = (17, 23, 31, 43, 59, 79, 101)
GRID = 1.05  # ratio of neighbouring train fractions in the search for the critical one
SEARCH_STEPS = 3000


# --- the task and the network --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addition:
    """All pairs of residues, split by a seed."""

    tokens: Tensor  # (M^2, 2): a, and b + M
    labels: Tensor
    train: Tensor
    test: Tensor
    modulus: int

    @classmethod
    def split(cls, modulus: int, fraction: float, seed: int) -> Addition:
        """All pairs, ``fraction`` of them to train on."""
        pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
        order = torch.randperm(modulus**2, generator=torch.Generator().manual_seed(seed))
        cut = round(fraction * modulus**2)
        tokens = pairs + torch.tensor([0, modulus])
        return cls(tokens, pairs.sum(1) % modulus, order[:cut], order[cut:], modulus)

    def targets(self, index: Tensor) -> Tensor:
        """One-hot labels, centred over classes."""
        return one_hot(self.labels[index], self.modulus).float() - 1 / self.modulus


class Network:
    """Weights W (2M, K), then K x K layers with a skip connection if any, then V (K, M); PyTorch's default initial scale."""

    def __init__(self, modulus: int, units: int, seed: int, hidden_layers: int = 0) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)

        def uniform(fan_in: int, fan_out: int) -> Tensor:
            weight = (2 * torch.rand(fan_in, fan_out, generator=generator) - 1) / math.sqrt(fan_in)
            return weight.requires_grad_()

        self.W = uniform(2 * modulus, units)
        self.V = uniform(units, modulus)
        self.middle = [uniform(units, units) for _ in range(hidden_layers)]

    @property
    def parameters(self) -> list[Tensor]:
        """All weights, from the inputs to the outputs."""
        return [self.W, *self.middle, self.V]

    def features(self, tokens: Tensor) -> Tensor:
        """Input of the last layer: the sum of the two tokens' rows of W is what one-hot inputs times W is."""
        x = (self.W[tokens[:, 0]] + self.W[tokens[:, 1]]).square()
        for weight in self.middle:
            x = (x + x @ weight).square()
        return x

    def outputs(self, tokens: Tensor) -> Tensor:
        """(n, M), centred over classes."""
        outputs = self.features(tokens) @ self.V
        return outputs - outputs.mean(1, keepdim=True)


def optimizers(network: Network, optimizer: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Adam on everything, or Muon on W (its own rate and decoupled decay, the best of a small search) and Adam on the rest."""
    if optimizer == "adam":
        return [torch.optim.Adam(network.parameters, lr=lr, weight_decay=weight_decay, fused=True)]
    rest = torch.optim.Adam([*network.middle, network.V], lr=lr, weight_decay=weight_decay, fused=True)
    return [rest, torch.optim.Muon([network.W], lr=5e-3, weight_decay=0.1)]


# --- what is measured ----------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(network: Network, task: Addition, index: Tensor) -> float:
    return (network.outputs(task.tokens[index]).argmax(1) == task.labels[index]).float().mean().item()


def fourier_power(weight: Tensor) -> Tensor:
    """Share of each frequency but 0 in each unit's power over both tokens: (M // 2, K), columns sum to 1."""
    halves = center(weight.detach()).reshape(2, -1, weight.shape[1])
    power = torch.fft.rfft(halves, dim=1)[:, 1:].abs().square().sum(0)
    return power / power.sum(0)


def fourier_summary(network: Network) -> dict[str, float]:
    """How far units hold one frequency each, and how many frequencies the units that do cover.

    Units are weighted by what they give to the output, |w|^2 |v|: dead units have a spectrum, too.
    """
    power = fourier_power(network.W)
    share, frequency = power.max(0)
    weight = network.W.detach().square().sum(0) * network.V.detach().norm(dim=1)
    alive = weight > 0.01 * weight.max()
    pure = alive & (share >= 0.5)
    return {
        "fourier_share": float((share * weight).sum() / weight.sum()),
        "frequencies": int(frequency[pure].unique().numel()),
        "alive_units": int(alive.sum()),
    }


@torch.no_grad()
def li2_quantities(network: Network, start: Network, task: Addition, weight_decay: float) -> dict[str, float]:
    features, targets = network.features(task.tokens[task.train]), task.targets(task.train)
    weight = network.V - network.V.mean(1, keepdim=True)  # what the centred outputs see of V
    residual = targets - features @ weight
    gradient = feature_gradient(residual, weight)
    energy = feature_energy(features, targets)
    strength = ridge_strength(weight_decay, 2 / len(task.train))
    return {
        "cos_lazy": float(lazy_alignment(gradient, features, targets)),
        "cos_residual": float(residual_alignment(gradient, features, targets, residual)),
        "gradient_norm": float(gradient.norm()),
        "residual_ratio": float(residual_ratio(residual, targets)),
        "ridge_distance": float(ridge_distance(weight, features, targets, strength)),
        "change_V": float(relative_change(network.V, start.V)),
        "change_W": float(relative_change(network.W, start.W)),
        "participation_ratio": float(participation_ratio(features)),
        "feature_cosine": float(largest_feature_cosine(features)),
        "energy_top": float(energy.amax()),
        "energy_median": float(energy.median()),
        **fourier_summary(network),
    }


def log_spaced(steps: int, count: int) -> set[int]:
    return {0} | {round(math.exp(math.log(steps) * k / (count - 1))) for k in range(count)}


# --- the kinds of cells --------------------------------------------------------------------------------------------


def train(
    *,
    modulus: int,
    units: int,
    fraction: float,
    seed: int,
    lr: float,
    weight_decay: float,
    steps: int,
    optimizer: str = "adam",
    hidden_layers: int = 0,
    measurements: int = 40,
    quantities: bool = True,
    stop: bool = False,
) -> dict[str, Any]:
    """One run; ``stop``: once test accuracy is 99% twice in a row."""
    task = Addition.split(modulus, fraction, seed)
    network, start = (Network(modulus, units, seed, hidden_layers) for _ in range(2))
    steppers = optimizers(network, optimizer, lr, weight_decay)
    tokens, targets = task.tokens[task.train], task.targets(task.train)
    due = log_spaced(steps, measurements) if quantities else set(range(0, steps + 1, 50))
    stage, history = Li2Stage(), []
    for step in range(steps + 1):
        if step in due:
            row: dict[str, Any] = {"step": step}
            row |= {part: accuracy(network, task, getattr(task, part)) for part in ("train", "test")}
            if quantities:
                row |= li2_quantities(network, start, task, weight_decay)
                stage = stage.update(row["cos_lazy"], row["cos_residual"], row["residual_ratio"])
                row["stage"] = stage.stage
            history.append(row)
            if stop and len(history) > 1 and min(history[-1]["test"], history[-2]["test"]) >= 0.99:
                break
        for stepper in steppers:
            stepper.zero_grad()
        (network.outputs(tokens) - targets).square().sum(1).mean().backward()
        for stepper in steppers:
            stepper.step()
    return {"history": history, "samples": len(task.train), **fourier_summary(network)}


def search(*, modulus: int, seed: int, start: float, units: int, steps: int, weight_decay: float) -> dict[str, Any]:
    """Smallest train fraction on a grid of ratio 1.05 from which the network generalises (test accuracy at least one half).

    ``start`` is where to begin, in units of ln M / M; the search walks down from what generalises or up from what doesn't.
    """
    unit = math.log(modulus) / modulus
    index = round(math.log(start) / math.log(GRID))
    tried: dict[int, dict[str, float]] = {}

    def generalises(i: int) -> bool:
        result = train(
            modulus=modulus,
            units=units,
            fraction=min(unit * GRID**i, 0.95),
            seed=seed,
            lr=5e-3,
            weight_decay=weight_decay,
            steps=steps,
            quantities=False,
            stop=True,
        )
        last = result["history"][-1]
        tried[i] = {"fraction": result["samples"] / modulus**2, **last, "fourier_share": result["fourier_share"]}
        return last["test"] >= 0.5

    way = -1 if generalises(index) else 1
    while generalises(index + way) == (way == -1):
        index += way
        if unit * GRID ** (index + 1) > 0.95:
            raise RuntimeError(f"modulus {modulus} doesn't generalise from any train fraction")
    lower = index + way if way == -1 else index
    return {
        "lower": tried[lower]["fraction"],
        "upper": tried[lower + 1]["fraction"],
        "multiplier": GRID ** (lower + 0.5),
        "tried": list(tried.values()),
    }


def climb(*, modulus: int, fraction: float, seed: int, begin: str, units: int = 64, steps: int = 400) -> dict[str, float]:
    """Gradient ascent of the energy of single units on the unit sphere: what its maxima look like with few samples.

    ``begin``: at random weights, or at Fourier features (one frequency, random phases, which full data makes maxima).
    """
    task = Addition.split(modulus, fraction, seed)
    generator = torch.Generator().manual_seed(seed)
    if begin == "random":
        w = torch.randn(2 * modulus, units, generator=generator, dtype=torch.float64)
    else:
        frequency = torch.randint(1, (modulus + 1) // 2, (units,), generator=generator)
        phases = 2 * math.pi * torch.rand(2, 1, units, generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * frequency * torch.arange(modulus, dtype=torch.float64)[:, None] / modulus
        w = torch.cos(angle + phases).reshape(2 * modulus, units)
    inputs = one_hot(task.tokens[task.train], 2 * modulus).sum(1).double()
    targets = center(task.targets(task.train))
    w = w / w.norm(dim=0)
    for _ in range(steps):
        w.requires_grad_()
        energy = feature_energy((inputs @ w).square(), targets)
        (slope,) = torch.autograd.grad(energy.sum(), w)
        # The energy has degree 4, so its slope is long: this step length climbs without a line search.
        w = (w + slope / slope.norm(dim=0)).detach()
        w = w / w.norm(dim=0)
    power = fourier_power(w)
    return {
        "fourier_share": float(power.max(0).values.mean()),
        "fourier_units": float((power.max(0).values >= 0.5).double().mean()),
        "energy_per_modulus": float(energy.detach().median() / modulus),
        "largest_entry": float(w.abs().amax(0).median()),
    }


# --- the cells -----------------------------------------------------------------------------------------------------

Cell = tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]
"""Name, function, arguments."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    modulus: int = 31
    units: int = 512
    steps: int = 2000
    small_modulus: int = 23
    seeds: int = 3
    many_seeds: int = 5
    few_units: tuple[tuple[int, float], ...] = ((23, 0.5), (47, 0.4))
    moduli: tuple[int, ...] = MODULI
    wide: tuple[int, int] = (127, 256)
    paper: tuple[int, int] = (71, 2048)


TINY = Size(11, 32, 60, 11, 1, 1, ((11, 0.6),), (11, 12, 13), (13, 32), (11, 32))


def stages(size: Size) -> Iterator[Cell]:
    """Figure 3: all quantities over training, with and without weight decay."""
    for seed in range(size.seeds):
        for decay in (2e-4, 0.0):
            arguments = {"modulus": size.modulus, "units": size.units, "fraction": 0.4, "seed": seed}
            yield f"wd{decay}-seed{seed}", train, {**arguments, "lr": 1e-3, "weight_decay": decay, "steps": size.steps}


def data(size: Size) -> Iterator[Cell]:
    """What the network learns from less data."""
    for seed in range(size.seeds):
        for fraction in (0.15, 0.2, 0.25, 0.28, 0.32, 0.5):
            arguments = {"modulus": size.modulus, "units": size.units, "fraction": fraction, "seed": seed}
            arguments |= {"lr": 5e-3, "weight_decay": 2e-4, "steps": size.steps, "measurements": 25}
            yield f"{fraction}-seed{seed}", train, arguments


def energy(size: Size) -> Iterator[Cell]:
    """Maxima of the energy itself with less data, no network."""
    for modulus, _ in size.few_units:
        for seed in range(size.seeds):
            for fraction in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0):
                for begin in ("random", "fourier"):
                    arguments = {"modulus": modulus, "fraction": fraction, "seed": seed, "begin": begin}
                    yield f"{modulus}-{fraction}-{begin}-seed{seed}", climb, {**arguments, "steps": min(size.steps, 300)}


def muon(size: Size) -> Iterator[Cell]:
    """Muon on W against Adam when units are few."""
    for modulus, fraction in size.few_units:
        for units in (16, 24, 32, 64):
            for seed in range(size.many_seeds):
                for optimizer in ("adam", "muon"):
                    arguments = {"modulus": modulus, "fraction": fraction, "units": units, "seed": seed, "lr": 5e-3}
                    arguments |= {"weight_decay": 2e-4, "steps": size.steps, "measurements": 20, "optimizer": optimizer}
                    yield f"{modulus}-{units}-{optimizer}-seed{seed}", train, arguments


def settings(size: Size) -> Iterator[Cell]:
    """At which learning rate and weight decay does the same data memorise?"""
    for seed in range(size.seeds):
        for lr in (1e-3, 5e-3, 2e-2, 1e-1):
            for decay in (0.0, 5e-5, 2e-4, 1e-3, 5e-3):
                arguments = {"modulus": size.small_modulus, "units": size.units // 2, "fraction": 0.42, "seed": seed}
                arguments |= {"lr": lr, "weight_decay": decay, "steps": size.steps, "quantities": False, "stop": True}
                yield f"lr{lr}-wd{decay}-seed{seed}", train, arguments


def three_layers(size: Size) -> Iterator[Cell]:
    """The same quantities where the theory is only sketched: one more K x K layer with a skip connection."""
    for decay, fraction in ((2e-4, 0.6), (0.0, 0.6), (2e-4, 0.25)):
        for seed in range(size.seeds):
            arguments = {"modulus": size.small_modulus, "units": size.units // 4, "fraction": fraction, "seed": seed}
            arguments |= {"lr": 5e-3, "weight_decay": decay, "steps": size.steps, "hidden_layers": 1}
            yield f"wd{decay}-{fraction}-seed{seed}", train, arguments


def scaling(size: Size) -> Iterator[Cell]:
    """Critical train fraction of each modulus."""
    for seed in range(size.seeds):
        for modulus in size.moduli:
            # A guess from pilot runs; the search moves away from it as far as it must.
            arguments = {"modulus": modulus, "seed": seed, "start": 2.35 + 0.36 * math.log(modulus / 17)}
            yield (
                f"{modulus}-seed{seed}",
                search,
                {**arguments, "units": size.units, "steps": SEARCH_STEPS, "weight_decay": 5e-4},
            )


def patience(size: Size) -> Iterator[Cell]:
    """The same with three times the steps: how much of the critical fraction is the budget's?"""
    for modulus in size.moduli[-2:-4:-1]:
        arguments = {"modulus": modulus, "seed": 0, "start": 2.6, "units": size.units, "weight_decay": 5e-4}
        yield f"{modulus}-seed0", search, {**arguments, "steps": 3 * SEARCH_STEPS}


def wide(size: Size) -> Iterator[Cell]:
    """The paper's example of a learning rate that memorises: M = 127, 3,225 samples."""
    modulus, units = size.wide
    for lr in (1e-3, 2e-3, 5e-3, 2e-2, 5e-2):
        arguments = {"modulus": modulus, "units": units, "fraction": 3225 / 127**2, "seed": 0, "lr": lr}
        yield f"lr{lr}", train, {**arguments, "weight_decay": 2e-4, "steps": size.steps // 2, "quantities": False, "stop": True}


def paper(size: Size) -> Iterator[Cell]:
    """Figure 3 at the paper's size."""
    modulus, units = size.paper
    for decay in (2e-4, 0.0):
        arguments = {"modulus": modulus, "units": units, "fraction": 0.4, "seed": 0, "lr": 1e-3, "weight_decay": decay}
        yield f"wd{decay}", train, {**arguments, "steps": size.steps // 2, "measurements": 16}


GROUPS = {
    group.__name__: group for group in (stages, data, energy, muon, settings, three_layers, scaling, patience, wide, paper)
}


def run(output: Path, only: list[str], tiny: bool) -> None:
    cells = ((group, *cell) for group in only for cell in GROUPS[group](TINY if tiny else Size()))
    for group, name, function, arguments in cells:
        path = output / group / f"{name}.json"
        if path.exists():
            continue
        start = time.process_time()
        result = function(**arguments)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"arguments": arguments, "cpu_seconds": time.process_time() - start, **result}))
        part.replace(path)  # a file that is there is whole
        print(f"{group}/{name}: {time.process_time() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "grok_callbacks_li2")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of cells")
    parser.add_argument("--report", type=Path, help="train nothing; write tables and figures of the cells there are here")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.report:
        from li2_report import report

        report(options.output, options.report)
        return
    if "muon" in options.only and not hasattr(torch.optim, "Muon"):
        others = " ".join(name for name in options.only if name != "muon")
        parser.error(
            f"the group muon needs torch.optim.Muon, from torch 2.9 on; this is {torch.__version__}. "
            + (f"Without it: --only {others}" if others else "")
        )
    run(options.output, options.only, options.tiny)


if __name__ == "__main__":
    main()
