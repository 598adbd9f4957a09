"""Rate-distortion complexity, description length and generalisation bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional._coarse import ENCODINGS
from grok_callbacks.functional.complexity import RateDistortion, naive_size, rate_distortion
from grok_callbacks.metrics import DescriptionLength
from grok_callbacks.probe import Split
from grok_callbacks.schedule import LogSpaced, Schedule
from grok_callbacks.snapshot import ModelView, Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ComplexityMonitor"]


class ComplexityMonitor(Monitor):
    r"""Logs how short a description of the weights can be that keeps the loss within epsilon.

    Weights are coarse-grained (rounded to a multiple of a bin size, matrices of low rank stored as factors) as far as the
    training loss allows, and the result is compressed for real: its length in bits is the rate-distortion complexity. It rises
    while a network memorises and falls when it finds a simpler solution. Added to it, the code length of the training targets
    under the coarse model gives the total description length, and the length bounds the error rate on unseen samples.

    Losses are taken over the probe, so that description length and bound are *estimates*, named so. They hold, and the names
    lose the word, where the probe is the whole training set (give it a ``size`` that is larger than that) and all that a
    decoder needs is counted: every parameter is chosen, and no layer keeps running statistics. Those are buffers, and
    buffers are not described. Of several targets a sample, such as the tokens of a sequence, the bound stays an estimate:
    it takes each for a sample of its own, and they are not independent.

    | key | value |
    |---|---|
    | `grok/complexity/bits` | length of the description at the (largest) epsilon: all that a decoder needs |
    | `grok/complexity/bits_{epsilon}` | the same for each further epsilon |
    | `grok/complexity/naive_bits` | length of the raw float32 weights after bzip2 |
    | `grok/complexity/train_loss`, `validation_loss` | loss of the coarse model on the probe |
    | `grok/complexity/bin_size`, `threshold` | what was chosen for the (largest) epsilon |
    | `grok/complexity/total_bits` or `total_bits_estimate` | description of weights and training targets together |
    | `grok/complexity/bound` or `bound_estimate` | with probability 1 - delta the error rate stays below it; vacuous above 1 |

    Total length and bound are logged for classification only. As a figure: the rate-distortion curve of the epsilons.

    Cost: one float64 singular-value decomposition of each matrix, some 20 to 40 probe passes and a few compressions: a second
    for a small network. Losses are split over ranks. By default it therefore measures at five steps a decade. Source: DeMoss et
    al. 2024 (arXiv 2412.09810), Algorithm 1; the bound is eq. 4 with the bits' natural logarithm (our choice).

    Args:
        epsilon: How much the training loss may rise, in its own unit, or several; one search serves all.
        encoding: ``"paper"`` (float32 arrays, bzip2) or ``"tight"`` (whole numbers, the best of several coders).
        parameters: Globs of parameter names; all by default, since a decoder needs all.
        num_train_samples: Size of the training set, in samples as the probe holds them, to scale the probe's code length to
            it where the probe is a part. Where given, it says whether the probe is the whole set.
        two_sided: Require that the loss changes by less than epsilon in either direction, as the paper's text has it.
        delta: Probability that the bound fails.
        schedule: When to measure; five log-spaced steps a decade by default.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import ComplexityMonitor, Probe, Recorder
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = (torch.randn(8, 4), torch.randint(3, (8,)))
        >>> values = Recorder(model, [ComplexityMonitor()], Probe(train=batch, size=8)).record(step=0)
        >>> values["grok/complexity/bits"] < values["grok/complexity/naive_bits"]
        True
    """

    question = "Is it compressing?"
    preset = "full"

    def __init__(
        self,
        epsilon: float | Sequence[float] = (1.0, 0.1),
        encoding: Literal["paper", "tight"] = "paper",
        *,
        parameters: str | Sequence[str] | None = None,
        num_train_samples: int | None = None,
        two_sided: bool = False,
        delta: float = 0.05,
        schedule: Schedule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(schedule=schedule if schedule is not None else LogSpaced(5), **kwargs)
        self.epsilons = [float(epsilon)] if isinstance(epsilon, (int, float)) else sorted(map(float, epsilon), reverse=True)
        self.encoding: Literal["paper", "tight"] = encoding
        self.parameters = parameters
        self.num_train_samples = num_train_samples
        self.two_sided = two_sided
        self.delta = delta
        self._names: list[str] = []
        self._results: tuple[RateDistortion, ...] = ()
        self._length = DescriptionLength(sync_on_compute=False)
        self._warned_vacuous = False

    def bind(self, view: ModelView) -> None:
        """Choose the parameters and see that there is a loss."""
        if not self.epsilons or not all(0 < epsilon < math.inf for epsilon in self.epsilons):
            raise ValueError(f"`epsilon` must be positive and finite, got {self.epsilons}.")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"`encoding` must be one of {ENCODINGS}, got {self.encoding!r}.")
        view.require_loss("train")
        self._names = view.select_parameters(self.parameters)
        if self.num_train_samples is not None and self.num_train_samples < 1:
            raise ValueError(f"`num_train_samples` must be positive, got {self.num_train_samples}.")
        self._length = DescriptionLength(delta=self.delta, sync_on_compute=False)
        self.metric = self._length

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Search the shortest descriptions, and see what the coarse model is worth."""
        weights = {name: snapshot.weights[name] for name in self._names}
        ranks = snapshot.ranks
        shared: dict[str, Any] = {}
        if ranks.world_size > 1:
            shared = {"rank": ranks.rank, "world_size": ranks.world_size, "reduce": ranks.all_reduce}
        self._results = rate_distortion(
            weights,
            lambda coarse: self._loss(snapshot, coarse, "train"),
            self.epsilons,
            self.encoding,
            two_sided=self.two_sided,
            **shared,
        )
        best = self._results[0]
        values: dict[str, float | Tensor] = {
            "complexity/bits": best.bits,
            "complexity/naive_bits": naive_size(weights),
            "complexity/train_loss": best.loss,
            "complexity/bin_size": best.bin_size,
            "complexity/threshold": best.threshold,
        }
        values |= {f"complexity/bits_{result.epsilon:g}": result.bits for result in self._results[1:]}
        if best.payload:
            values |= self._of_coarse_model(snapshot, best)
        return values

    def _of_coarse_model(self, snapshot: Snapshot, best: RateDistortion) -> dict[str, float | Tensor]:
        coarse = {name: tensor.to(snapshot.view.device) for name, tensor in best.coarse_weights().items()}
        values: dict[str, float | Tensor] = {}
        if snapshot.has("validation") and snapshot.targets("validation") is not None:
            values["complexity/validation_loss"] = self._loss(snapshot, coarse, "validation")
        logits, targets = self._answers(snapshot, coarse, "train")
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != logits.shape[:-1]:
            return values
        if logits.shape[-1] == 1:
            # One logit that says yes or no is that of yes, beside a no of zero.
            logits = torch.cat([torch.zeros_like(logits), logits], -1)
        if not bool(((targets >= 0) & (targets < logits.shape[-1])).all()):
            return values  # Whole numbers that are no classes, for a loss of the user's.
        self._length.reset()
        self._length.update(logits, targets, best.bits)
        length = self._length.compute()
        held = len(snapshot.view.require_samples("train"))
        times = 1.0 if self.num_train_samples is None else self.num_train_samples / held
        holds = self._is_whole(snapshot) and self._counts_everything(snapshot.view)
        # Targets of one sample, the tokens of a sequence say, are not independent, and the bound is about such as are.
        independent = len(targets) <= held
        values["complexity/total_bits" + ("" if holds else "_estimate")] = length["bits"] + times * length["data_bits"]
        values["complexity/bound" + ("" if holds and independent else "_estimate")] = length["bound"]
        if length["bound"] > 1 and not self._warned_vacuous:
            self._warned_vacuous = True
            self.announce(
                f"The generalisation bound is vacuous ({float(length['bound']):.2f} > 1) at step {snapshot.step:,}; said once."
            )
        return values

    def _is_whole(self, snapshot: Snapshot) -> bool:
        """Whether the probe is the whole training set: as many samples as it is told, or fewer than it was to hold."""
        samples = snapshot.view.require_samples("train")
        held = len(samples)
        if self.num_train_samples is not None:
            return held == self.num_train_samples
        return samples.asked is not None and held < samples.asked

    def _counts_everything(self, view: ModelView) -> bool:
        """Whether the description is all that a decoder needs who knows the code of the network."""
        statistics = any(getattr(module, "running_mean", None) is not None for module in view.model.modules())
        return len(self._names) == len(view.parameters) and not statistics

    def _answers(self, snapshot: Snapshot, weights: Mapping[str, Tensor], split: Split) -> tuple[Tensor, Any]:
        run = snapshot.forward(split, weights=weights)
        return snapshot.view.probe.align(run.logits, snapshot.batch(split).targets)

    def _loss(self, snapshot: Snapshot, weights: Mapping[str, Tensor], split: Split) -> Tensor:
        return snapshot.loss_of(*self._answers(snapshot, weights, split))

    def figures(self) -> Mapping[str, Figure]:
        """Bits against the loss that is allowed, if there are several epsilons."""
        from matplotlib.figure import Figure

        finite = [result for result in self._results if torch.tensor(result.bits).isfinite()]
        if len(finite) < 2:
            return {}
        figure = Figure(figsize=(4.5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([result.epsilon for result in finite], [result.bits / 8000 for result in finite], marker="o")
        axes.set(xscale="log", xlabel="allowed rise of the loss (epsilon)", ylabel="description (kB)", ylim=(0, None))
        axes.set_title("Rate-distortion curve")
        axes.grid(alpha=0.25)
        return {"complexity/rate_distortion": figure}
