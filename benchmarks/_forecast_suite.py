"""The runs that the forecast is calibrated and scored on: settings, one training run, a cache, workers."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from grok_callbacks import (
    ActivationSparsityMonitor,
    CircuitComplexityMonitor,
    GradientCoherenceMonitor,
    GrokkingDetector,
    History,
    LinearMappingNumberMonitor,
    NormMonitor,
    Probe,
    Recorder,
    RepresentationMonitor,
    RobustnessMonitor,
    SpectralEntropyMonitor,
    TruncationMonitor,
    WeightEntropyMonitor,
)
from grok_callbacks.callbacks import Monitor
from grok_callbacks.schedule import LogSpaced
from grok_callbacks.tasks.data import Group, Task, make_task
from grok_callbacks.tasks.datamodules import DigitsDataModule
from grok_callbacks.tasks.modules import Classifier, DecoderTransformer, EmbeddingMLP, MLPClassifier, OneHotMLP

Half = Literal["A", "B"]

#: What is one task up to a relabelling of tokens and answers, or nearly so, is one family.
FAMILIES = {
    "add": "cyclic", "sub": "cyclic", "mul": "cyclic", "div": "cyclic",
    "x2y2": "quadratic", "x2xyy2": "quadratic",
    "permutation": "permutation", "dihedral": "permutation", "frobenius": "permutation",
    "xor": "xor", "digits": "digits", "random": "random",
}  # fmt: skip

#: Quantiles of the training samples' log-probability, for the dynamic-mode residual.
QUANTILES = tuple(np.linspace(0.05, 0.95, 10).tolist())
QUANTILE_EVERY = 10

#: The prefix of measures of the representation that see training samples alone.
TRAIN_ONLY = "train_only"


@dataclass(frozen=True)
class Setting:
    """One run. Halves share neither seed nor size nor split, so either can judge what was calibrated on the other."""

    half: Half
    task: str
    size: int
    architecture: Literal["onehot", "embedding", "transformer", "pixels"]
    fraction: float
    lr: float
    weight_decay: float
    seed: int
    init_scale: float = 1.0
    width: int = 128
    #: Longest run, in optimiser steps; not part of the run's identity, since it changes nothing before.
    max_steps: int = field(default=6000, compare=False)

    @property
    def family(self) -> str:
        """The isomorphism class of the task."""
        return FAMILIES[self.task]

    @property
    def is_transformer(self) -> bool:
        """Whether it is a transformer; all else is a multilayer perceptron."""
        return self.architecture == "transformer"

    @property
    def key(self) -> str:
        """Name of the run's file."""
        identity = {name: value for name, value in asdict(self).items() if name != "max_steps"}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.task}{self.size}-{self.architecture}-f{self.fraction:g}-wd{self.weight_decay:g}-s{self.seed}-{digest}"


@dataclass(frozen=True)
class RunRecord:
    """What a run left: its setting, all that the monitors measured, and two curves that only rivals read."""

    setting: Setting
    history: History
    losses: np.ndarray
    quantiles: np.ndarray
    last_step: int
    seconds: float


def dihedral(n: int) -> Task:
    """The 2n symmetries of a regular n-gon, a permutation group: element ``i + n j`` is rotation i after j reflections."""
    rotation, reflected = torch.arange(2 * n) % n, torch.arange(2 * n) // n
    sign = 1 - 2 * reflected
    table = (rotation[:, None] + sign[:, None] * rotation) % n + n * ((reflected[:, None] + reflected) % 2)
    return _group_task(f"D_{n}", table)


def frobenius(prime: int) -> Task:
    """The maps x -> a x + b modulo ``prime`` with a a cube root of one: a group of 3 ``prime`` permutations."""
    root = next(a for a in range(2, prime) if a**3 % prime == 1)
    shift, power = torch.arange(3 * prime) % prime, torch.arange(3 * prime) // prime
    factor = torch.tensor([root**k % prime for k in range(3)])[power]
    table = (shift[:, None] + factor[:, None] * shift) % prime + prime * ((power[:, None] + power) % 3)
    return _group_task(f"F_{3 * prime}", table)


def _group_task(name: str, table: Tensor) -> Task:
    order = len(table)
    pairs = torch.cartesian_prod(torch.arange(order), torch.arange(order))
    return Task(name, pairs, table.flatten(), order, order, Group(table))


def build(setting: Setting) -> tuple[Classifier, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The network with its initial weights, and the training and the validation samples."""
    network: Classifier
    if setting.task == "digits":
        data = DigitsDataModule(train_size=setting.size, seed=setting.seed)
        train, validation = data.train_set, data.val_set
        torch.manual_seed(setting.seed)
        network = MLPClassifier(width=setting.width, init_scale=setting.init_scale, **_optimisation(setting))
        labels = (train.targets.argmax(-1), validation.targets.argmax(-1))
        return network, (train.inputs, labels[0]), (validation.inputs, labels[1])
    makers: dict[str, Callable[[int], Task]] = {"dihedral": dihedral, "frobenius": frobenius}
    maker = makers.get(setting.task)
    task = maker(setting.size) if maker else make_task(setting.task, setting.size, setting.seed)
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(setting.seed))
    count = round(setting.fraction * len(task))
    torch.manual_seed(setting.seed)
    tokens, classes = task.num_tokens, task.num_classes
    common = {"init_scale": setting.init_scale, **_optimisation(setting)}
    if setting.architecture == "onehot":
        network = OneHotMLP(tokens, classes, width=setting.width, **common)
    elif setting.architecture == "embedding":
        network = EmbeddingMLP(tokens, classes, embedding_dim=32, width=setting.width, **common)
    else:
        network = DecoderTransformer(tokens, classes, d_model=32, mlp_width=setting.width, **common)
    train, validation = order[:count], order[count:]
    return network, (task.inputs[train], task.targets[train]), (task.inputs[validation], task.targets[validation])


def _optimisation(setting: Setting) -> dict[str, Any]:
    loss = "mse" if setting.task == "digits" else "cross_entropy"
    return {"lr": setting.lr, "weight_decay": setting.weight_decay, "betas": (0.9, 0.98), "loss": loss}


def optimiser_of(network: Classifier) -> torch.optim.Optimizer:
    """The network's own AdamW, in its fused form, which is quicker."""
    return torch.optim.AdamW(
        network.parameters(), lr=network.lr, betas=network.betas, weight_decay=network.weight_decay, fused=True
    )


def monitors(setting: Setting, train: tuple[Tensor, Tensor]) -> list[Monitor]:
    """What a user of the standard preset has, on its schedule, and what is there without validation data.

    The robustness, which only rivals and the step forecast read, is measured less often, so that a run takes seconds. The
    linear mapping number takes all points of its segments, and twice as many samples of perceptrons as by default.
    """
    return [
        GrokkingDetector(),
        NormMonitor(),
        SpectralEntropyMonitor(),
        WeightEntropyMonitor(),
        LinearMappingNumberMonitor(num_samples=32 if setting.is_transformer else 64, quadrature=None),
        CircuitComplexityMonitor(),
        ActivationSparsityMonitor(),
        RepresentationMonitor(),
        RepresentationMonitor(probe=Probe(train=train), prefix=TRAIN_ONLY),
        TruncationMonitor(),
        GradientCoherenceMonitor(),
        RobustnessMonitor(num_draws=1, gradient_probes=1, probe=Probe(size=128, train=train), schedule=LogSpaced(8)),
    ]


def train(setting: Setting, measured: Sequence[Monitor] | None = None) -> RunRecord:
    """Train in full batches until it has memorised and generalised, or ``max_steps`` are over.

    The loop is a bare one, so that a run takes seconds; a Trainer gives the same history.
    """
    network, seen, unseen = build(setting)
    chosen = monitors(setting, seen) if measured is None else measured
    detector = next(monitor for monitor in chosen if isinstance(monitor, GrokkingDetector))
    recorder = Recorder(network, chosen, Probe(train=seen, validation=unseen))
    optimiser = optimiser_of(network)
    inputs, labels = seen
    quantiles = torch.tensor(QUANTILES)
    losses, curves = [], []
    step = 0
    started = _cpu_seconds()
    for step in range(setting.max_steps + 1):
        recorder.record(step)
        if detector.memorized_step is not None and detector.grokked_step is not None:
            break
        logits = network(inputs)
        loss = network.compute_loss(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        if step % QUANTILE_EVERY == 0:
            log_probability = -nn.functional.cross_entropy(logits.detach(), labels, reduction="none")
            curves.append(torch.quantile(log_probability, quantiles))
    if recorder.switched_off:
        raise RuntimeError(f"{recorder.switched_off} failed in {setting}.")
    return RunRecord(
        setting,
        recorder.history,
        torch.stack(losses).numpy().astype(np.float32),
        torch.stack(curves).numpy().astype(np.float32),
        step,
        _cpu_seconds() - started,
    )


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


# Files.


def save(record: RunRecord, folder: Path) -> None:
    """One compressed file; written aside and renamed, so that an interrupted run leaves none."""
    steps = sorted({step for series in record.history.values() for step in series.steps})
    index = {step: number for number, step in enumerate(steps)}
    values = np.full((len(record.history), len(steps)), np.nan)
    present = np.zeros(values.shape, dtype=bool)
    for row, series in enumerate(record.history.values()):
        columns = [index[step] for step in series.steps]
        values[row, columns], present[row, columns] = series.values, True
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.setting.key}.npz"
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez_compressed(
            file,
            setting=json.dumps(asdict(record.setting)),
            keys=np.array(list(record.history)),
            steps=np.array(steps),
            values=values,
            present=present,
            losses=record.losses,
            quantiles=record.quantiles,
            last=np.array([record.last_step, record.seconds]),
        )
    unfinished.replace(path)


def load(path: Path) -> RunRecord:
    """What :func:`save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    history = History()
    for key, values, present in zip(data["keys"], data["values"], data["present"], strict=True):
        for step, value in zip(data["steps"][present], values[present], strict=True):
            history.add(int(step), {str(key): float(value)})
    return RunRecord(
        Setting(**json.loads(str(data["setting"]))),
        history,
        data["losses"],
        data["quantiles"],
        int(data["last"][0]),
        float(data["last"][1]),
    )


def load_all(settings: Iterable[Setting], folder: Path) -> list[RunRecord]:
    """The cached runs among these."""
    paths = [folder / f"{setting.key}.npz" for setting in settings]
    return [load(path) for path in paths if path.exists()]


def is_done(setting: Setting, folder: Path) -> bool:
    """Whether the run is cached and as long as it is to be, or ended by itself."""
    path = folder / f"{setting.key}.npz"
    if not path.exists():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            reached, allowed = int(file["last"][0]), json.loads(str(file["setting"]))["max_steps"]
    except (OSError, ValueError, KeyError):
        return False  # A damaged file is made anew.
    return reached < allowed or allowed >= setting.max_steps


# Workers.


def run_and_save(setting: Setting, folder: Path) -> float:
    """One run in a worker; returns its CPU-seconds."""
    torch.set_num_threads(1)
    record = train(setting)
    save(record, folder)
    return record.seconds


def run_suite(settings: Sequence[Setting], folder: Path, *, workers: int = 2, ray: bool = False) -> None:
    """Make what is missing, the longest first to be announced last: in processes here, or over a Ray cluster.

    Raises:
        ModuleNotFoundError: If ``ray`` is asked for and not installed.
    """
    missing = [setting for setting in settings if not is_done(setting, folder)]
    if not missing:
        return
    results = _over_ray(missing, folder) if ray else _over_processes(missing, folder, workers)
    for _ in _with_progress(results, len(missing)):
        pass


def _over_processes(settings: Sequence[Setting], folder: Path, workers: int) -> Iterator[float]:
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(run_and_save, setting, folder) for setting in settings]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _over_ray(settings: Sequence[Setting], folder: Path) -> Iterator[float]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Ray is not installed: pip install ray, or leave out --ray.") from error
    ray.init(ignore_reinit_error=True)
    # The folder must be one that all nodes share.
    remote = ray.remote(num_cpus=1)(run_and_save)
    waiting = [remote.remote(setting, folder) for setting in settings]
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield from ray.get(ready)


def _with_progress(results: Iterator[float], total: int) -> Iterator[float]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return results
    return iter(tqdm(results, total=total, unit="run", smoothing=0.05))


# Which runs.


def _sized(tasks: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[Half, tuple[tuple[str, int], ...]]:
    """Every task in every size, by half."""
    names = tasks.split()
    return {"A": tuple(itertools.product(names, a)), "B": tuple(itertools.product(names, b))}


_GROUPS_MLP: dict[Half, tuple[tuple[str, int], ...]] = {
    "A": (("permutation", 4), ("dihedral", 10), ("dihedral", 13)),
    "B": (("frobenius", 7), ("dihedral", 11), ("dihedral", 12)),
}
_GROUPS_TRANSFORMER: dict[Half, tuple[tuple[str, int], ...]] = {
    "A": (("permutation", 4), ("dihedral", 8)),
    "B": (("frobenius", 7), ("dihedral", 9)),
}

# The smallest fraction of each is too little data, the largest ample; each plan's own, as tasks differ in what they need.
_MLP = {
    "cyclic": (_sized("add sub mul div", (19, 29), (23, 31)), (0.3, 0.55, 0.7), 36, 0.02),
    "permutation": (_GROUPS_MLP, (0.3, 0.6, 0.75), 36, 0.02),
    "xor": (_sized("xor", (4,), (5,)), (0.15, 0.3, 0.45), 28, 0.02),
    "quadratic": (_sized("x2y2 x2y2 x2xyy2", (19, 29), (23, 31)), (0.2, 0.42, 0.55), 20, 0.012),
    "random": (_sized("random", (19, 29), (23, 31)), (0.3, 0.5, 0.7), 20, 0.02),
}
_TRANSFORMER = {
    "cyclic": (_sized("add sub mul", (19,), (23,)), (0.25, 0.45, 0.6), 20, 0.005),
    "permutation": (_GROUPS_TRANSFORMER, (0.3, 0.7, 0.85), 20, 0.005),
    "xor": (_sized("xor", (4,), (5,)), (0.2, 0.4, 0.5), 20, 0.005),
    "quadratic": (_sized("x2y2 x2y2 x2xyy2", (19,), (23,)), (0.12, 0.25, 0.4), 14, 0.005),
    "random": (_sized("random", (19,), (23,)), (0.25, 0.45, 0.6), 8, 0.005),
}

#: Weight decays with the longest run that each is given, in steps.
_DECAYS = {
    False: {0.0: 6000, 0.3: 8000, 0.5: 6000, 1.0: 6000},
    True: {0.0: 6000, 0.7: 7500, 1.0: 6000, 2.0: 4500},
}
_SHARES_OF_DECAYS = (0.2, 0.27, 0.27, 0.26)
_SHARES_OF_FRACTIONS = (0.25, 0.4, 0.35)


def settings(scale: float = 1.0) -> list[Setting]:
    """All runs of the suite, in a shuffled order, so that what is done of it at any time is a fair sample.

    Args:
        scale: Share of the runs of each family and architecture to make.
    """
    chosen = [
        setting
        for half in ("A", "B")
        for is_transformer, plans in ((False, _MLP), (True, _TRANSFORMER))
        for family, (sizes, fractions, count, lr) in plans.items()
        for setting in _drawn(
            half, is_transformer, family, tasks=sizes[half], fractions=fractions, count=round(count * scale), lr=lr
        )
    ]
    for half in ("A", "B"):
        chosen += _digits(half)[: round(9 * scale)] + _confused(half)[: round(5 * scale)]
        chosen += _late_transformers(half)[: round(18 * scale)]
    order = np.random.default_rng(0).permutation(len(chosen))
    return [chosen[index] for index in order]


def _seed(half: Half, *names: object) -> int:
    """A seed that no run of the other half has."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return 2 * int.from_bytes(digest[:3], "big") + (half == "B")


def _drawn(
    half: Half,
    is_transformer: bool,
    family: str,
    *,
    tasks: tuple[tuple[str, int], ...],
    fractions: tuple[float, float, float],
    count: int,
    lr: float,
) -> Iterator[Setting]:
    draw = np.random.default_rng(_seed(half, is_transformer, family))
    decays = _DECAYS[is_transformer]
    for number in range(count):
        task, size = tasks[draw.integers(len(tasks))]
        decay = list(decays)[draw.choice(4, p=_SHARES_OF_DECAYS)]
        fraction = fractions[draw.choice(3, p=_SHARES_OF_FRACTIONS)]
        # Weight decay acts through its product with the learning rate.
        longest = min(round(decays[decay] * (1.0 if is_transformer else 0.02 / lr)), 9000)
        init_scale = ((2.0, 2.0, 3.0) if is_transformer else (1.0, 1.0, 2.0))[draw.integers(3)]
        architecture: Literal["onehot", "embedding", "transformer"]
        architecture = "transformer" if is_transformer else ("onehot", "embedding")[number % 2]  # type: ignore[assignment]
        yield Setting(
            half, task, size, architecture, fraction, lr, decay, _seed(half, is_transformer, family, number),
            init_scale, 128 if architecture == "onehot" else 64, longest,
        )  # fmt: skip


def _late_transformers(half: Half) -> list[Setting]:
    """Transformers that grok late, of which chance gives few: three times too large at first, with data enough."""
    cells = {
        "A": (
            ("add", 29, 0.5),
            ("dihedral", 8, 0.8),
            ("xor", 4, 0.45),
            ("mul", 29, 0.5),
            ("random", 19, 0.5),
            ("sub", 29, 0.5),
        ),
        "B": (
            ("add", 31, 0.45),
            ("dihedral", 9, 0.85),
            ("xor", 5, 0.35),
            ("mul", 31, 0.45),
            ("random", 23, 0.5),
            ("sub", 31, 0.45),
        ),
    }[half]
    return [
        Setting(
            half, task, size, "transformer", fraction, 0.005, decay, _seed(half, "late", task, decay),
            init_scale=3.0, width=64, max_steps=_DECAYS[True][decay],
        )
        for decay in (1.0, 0.7, 2.0)
        for task, size, fraction in cells
    ]  # fmt: skip


def _digits(half: Half) -> list[Setting]:
    """Real images with large initial weights, and two with ordinary ones."""
    sizes = (300, 250) if half == "A" else (350, 400)
    cells = [(8.0, 0.3), (8.0, 0.0), (8.0, 1.0), (1.0, 0.3), (8.0, 0.3), (8.0, 0.0), (8.0, 1.0), (8.0, 0.3), (1.0, 0.0)]
    return [
        Setting(
            half, "digits", sizes[number % 2], "pixels", round(sizes[number % 2] / 1797, 3), 1e-3, decay,
            _seed(half, "digits", number), init, 200, 9000,
        )
        for number, (init, decay) in enumerate(cells)
    ]  # fmt: skip


def _confused(half: Half) -> list[Setting]:
    """Networks too narrow to memorise."""
    size = 19 if half == "A" else 23
    return [
        Setting(half, "random", size, "onehot", 0.6, 0.02, 0.5, _seed(half, "narrow", number), 1.0, 6, 3000)
        for number in range(5)
    ]
