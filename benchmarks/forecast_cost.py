"""What the forecast costs: CPU time of whole runs with the monitors that it reads, over that of the same runs without any.

``python -m benchmarks.forecast_cost --output benchmarks/results/forecast_cost.md``

The smaller the network, the larger the share of a measurement, whose probe does not shrink with it: so the first network is the
demo's, and the last one the size that grokking was published with. On the default schedule ten times as many steps have 20
measurements more. *Ratio within one run* is its CPU time over what of it was not spent measuring, which other work on the
machine disturbs less than the comparison of two runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks._common import markdown, parser, publish
from grok_callbacks import (
    ActivationSparsityMonitor,
    CircuitComplexityMonitor,
    GradientCoherenceMonitor,
    GrokkingDetector,
    GrokkingForecast,
    LinearMappingNumberMonitor,
    LogSpaced,
    Monitor,
    NormMonitor,
    Probe,
    Recorder,
    RepresentationMonitor,
    RobustnessMonitor,
    SpectralEntropyMonitor,
    TruncationMonitor,
)
from grok_callbacks.tasks.datamodules import PairTaskDataModule
from grok_callbacks.tasks.modules import Classifier, DecoderTransformer, OneHotMLP

#: What the shipped models read, and the forecast.
READ = (
    GrokkingDetector, NormMonitor, SpectralEntropyMonitor, LinearMappingNumberMonitor,
    CircuitComplexityMonitor, ActivationSparsityMonitor, RepresentationMonitor, RobustnessMonitor, TruncationMonitor,
    GradientCoherenceMonitor, GrokkingForecast,
)  # fmt: skip

#: Modulus, network, and the lengths of its runs in steps.
NETWORKS: dict[str, tuple[int, Callable[..., Classifier], tuple[int, ...]]] = {
    "MLP of the demo": (31, partial(OneHotMLP, lr=0.03), (1000, 10_000)),
    "transformer": (31, DecoderTransformer, (300,)),
    "transformer, modulus 113": (113, partial(DecoderTransformer, d_model=128), (60,)),
}


def main() -> None:
    options = parser(__doc__)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    shares: dict[str, dict[str, float]] = {}
    for name, (_, _, lengths) in NETWORKS.items():
        run(name, min(50, *lengths), READ)  # Warms up what is loaded once a process.
        for steps in lengths:
            bare, seconds, measuring, recorder = 0.0, 0.0, 0.0, None
            for _ in range(arguments.repeats):
                bare += run(name, steps, ())[0] / arguments.repeats
                total, spent, recorder = run(name, steps, READ)
                seconds += total / arguments.repeats
                measuring += spent / arguments.repeats
            assert recorder is not None
            norms = recorder.history["grok/norm"]
            training = seconds - measuring
            forecasts = recorder.history.get("grok/forecast/probability", ())
            rows.append(
                [name, f"{steps:,}", f"{bare:.2f}", f"{seconds:.2f}", len(norms), len(forecasts),
                 f"{seconds / bare:.3f}", f"{seconds / training:.3f}", f"{1000 * measuring / len(norms):.0f}",
                 needed(training / steps, measuring / len(norms))]
            )  # fmt: skip
            # The monitors' own clocks tell how their CPU time divides among them.
            clock = sum(recorder.seconds.values())
            shares[f"{name}, {steps:,}"] = {
                label: value / clock * measuring / training for label, value in recorder.seconds.items()
            }
    header = [
        "network",
        "steps",
        "bare (s)",
        "with (s)",
        "measurements",
        "forecasts",
        "ratio",
        "ratio within one run",
        "ms a measurement",
        "5% from",
    ]
    publish(
        f"{markdown(header, rows)}\n\n{by_monitor(shares)}", arguments.output, "python -m benchmarks.forecast_cost --repeats 1"
    )


def run(name: str, steps: int, makers: Sequence[type[Monitor]]) -> tuple[float, float, Recorder | None]:
    """CPU-seconds of one run, and of its measurements; without weight decay, so that it stays memorised and forecasts."""
    size, make, _ = NETWORKS[name]
    data = PairTaskDataModule("add", size, train_fraction=0.7 if size < 100 else 0.3, seed=0)
    torch.manual_seed(0)
    network = make(data.task.num_tokens, data.task.num_classes, weight_decay=0.0)
    train, validation = data.train_set, data.val_set
    samples = Probe(train=(train.inputs, train.targets), validation=(validation.inputs, validation.targets))
    gc.collect()
    measuring, started = 0.0, time.process_time()
    recorder = Recorder(network, [monitor() for monitor in makers], samples) if makers else None
    optimizer = network.configure_optimizers()
    for step in range(steps + 1):
        if recorder is not None:
            before = time.process_time()
            recorder.record(step)
            measuring += time.process_time() - before
        loss = network.compute_loss(network(train.inputs), train.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.process_time() - started, measuring, recorder


def needed(step: float, measurement: float) -> str:
    """From how many steps on the ratio is at most 1.05, with the measurements that the default schedule has until then."""
    schedule, at, count = LogSpaced(), 0, 1
    while at is not None and at < 10**9:
        if count * measurement <= 0.05 * at * step:
            return f"{float(f'{at:.2g}'):,.0f}"
        at, count = schedule.next_step(at), count + 1
    return "never"


def by_monitor(shares: dict[str, dict[str, float]]) -> str:
    """Each monitor's time over that of the training, the most expensive first."""
    labels = sorted(next(iter(shares.values())), key=lambda label: -sum(share[label] for share in shares.values()))
    return markdown(
        ["share of the training", *shares],
        [[label, *(f"{share[label]:.1%}" for share in shares.values())] for label in labels],
    )


if __name__ == "__main__":
    main()
