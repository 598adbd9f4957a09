"""The stages of feature learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks._last_layer import LastLayer, class_labels, subset
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional import Li2Stage, gradient_scale, relative_change, ridge_strength
from grok_callbacks.history import Series
from grok_callbacks.metrics import FeatureLearning
from grok_callbacks.snapshot import ModelView, Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FeatureLearningMonitor"]

# Entries of a matrix whose change is followed; of larger ones so many, chosen by a seed.
_MOST_ENTRIES = 2**18
# How far the slope of a squared error may be from a straight line, in the precision of a loss of the user's.
_STRAIGHT = 1e-2
_FITTED = 0.99
_ONSET = 0.2

_MEANINGS = {
    "lazy": "the last layer fits random features",
    "independent": "each unit learns a feature on its own",
    "interactive": "units learn what the others still miss",
}
_COLOURS = ("#d9d9d9", "#fdd49e", "#a6dba0")


class FeatureLearningMonitor(Monitor):
    r"""Logs in which stage of feature learning a network is, after Tian's Li2 theory of grokking.

    It looks at the last linear layer: its input is the features :math:`F`, its weight :math:`V`. The loss sends the residual
    :math:`R` back to its output and :math:`G = R V^\top` to the features; both come from autograd with the loss' reduction
    undone, so any mean or sum of a squared error or a cross-entropy gives the same. A tilde means centred over predictions.

    1. *lazy*: the last layer fits random features, and G is noise;
    2. *independent*: :math:`G \sim \tilde Y \tilde Y^\top \tilde F`, each unit climbs its own energy
       :math:`E_k = \frac12 \lVert \tilde Y^\top f_k \rVert^2`, whose maxima are features;
    3. *interactive*: :math:`G \sim \tilde R \tilde Y^\top \tilde F`, units turn to what is still missing.

    The stage is a soft label with hysteresis, see :class:`~grok_callbacks.functional.Li2Stage`, and each change is announced.
    Its thresholds come from small runs (two and three layers, up to 2,048 units): check them on yours. **A stage is not a
    verdict on generalisation.** A run with too little data reaches stage 3 as well and memorises; where validation is still at
    chance when the run has been in stage 3 as long as it took to get there, the monitor says so.

    | key | value |
    |---|---|
    | `grok/li2/stage` | 1, 2 or 3 |
    | `grok/li2/cos_lazy` | cosine of G with its direction in the independent stage |
    | `grok/li2/cos_residual` | the same for the interactive stage |
    | `grok/li2/gradient_norm` | norm of G |
    | `grok/li2/residual_ratio` | norm of R over that of Y: how much is not fitted |
    | `grok/li2/ridge_distance` | distance of V to the ridge regression on F, relative; only for a squared error |
    | `grok/li2/weight_change` | distance of the other matrices to their initial values, relative |
    | `grok/li2/participation_ratio` | number of directions that the features use |
    | `grok/li2/feature_cosine` | largest cosine of two units |
    | `grok/li2/energy_top`, `energy_median` | energy of units, the largest and the median |

    Everything is measured on the probe's training samples. The theory speaks of all of them: for small data give a probe as
    large as the training set (`Probe(size=len(data))`), without which the ridge distance says little, as V is fitted to more
    than it is compared on. Of more than 4,096 predictions (per-position logits), so many are used.

    The published step from stage 1 to 2 is put by `cos_lazy` alone. At the very start the residual *is* the target, so both
    cosines are high before anything is fitted; we ask for a fitted training set too (`residual_ratio` of at most
    `fit_threshold`). `fit_threshold=math.inf` gives the plain rule.

    Cost: one forward pass on the probe, a backward pass through the last layer, and a few n K (C + min(n, K)) multiplications.
    Memory: some twenty times that of the probe's logits; with a large vocabulary give it a smaller probe.
    Source: Tian 2025 (arXiv 2509.21519); cosines, thresholds and hysteresis are ours.

    Args:
        layer: Name of the last linear layer; by default the last ``nn.Linear`` whose output the model returns, at all positions
            or at one.
        parameters: Globs of the matrices whose change is followed, by default all but the last layer's weight (a tied embedding
            is that weight). Their initial values are kept, and saved in checkpoints: of each matrix at most 262,144 entries
            (1 MB in float32), chosen by a seed; the change of a larger matrix is estimated from them.
        weight_decay: Strength of the L2 penalty :math:`\frac\eta2 \lVert V \rVert^2` for the ridge distance, as of ``Adam`` and
            ``SGD``; 0 compares with the least-squares solution. The decoupled decay of ``AdamW`` has no exact ridge point.
        lazy_threshold: Cosine from which G counts as that of the independent stage.
        gap_threshold: Lead of `cos_residual` from which G counts as that of the interactive stage.
        fit_threshold: Residual ratio up to which the targets count as fitted.
        patience: Measurements in a row that a change of stage must last.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Raises:
        MisconfigurationException: At fit start, if no last linear layer is found or the samples have no targets.

    Example:
        >>> import torch
        >>> from grok_callbacks import FeatureLearningMonitor, Probe, Recorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> probe = Probe(train=(torch.randn(50, 4), torch.randint(3, (50,))))
        >>> values = Recorder(model, [FeatureLearningMonitor(probe=probe)]).record(step=0)
        >>> values["grok/li2/stage"], values["grok/li2/weight_change"]
        (1.0, 0.0)
    """

    question = "Is it about to generalise?"
    preset = "full"

    def __init__(
        self,
        layer: str | None = None,
        *,
        parameters: str | Sequence[str] | None = None,
        weight_decay: float = 0.0,
        lazy_threshold: float = 0.5,
        gap_threshold: float = 0.2,
        fit_threshold: float = 0.1,
        patience: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= weight_decay < math.inf:
            raise MisconfigurationException(f"`weight_decay` must be a finite number of at least 0, got {weight_decay!r}.")
        self.layer = layer
        self.parameters = parameters
        self.weight_decay = weight_decay
        self._start = Li2Stage(lazy_threshold, gap_threshold, fit_threshold, patience)
        self._stage = self._start
        self._stage_since = 0
        # Whether the stage has been compared with the outcome for good.
        self._compared = False
        self._initial: dict[str, Tensor] = {}
        self._last: LastLayer | None = None
        self._metric: FeatureLearning | None = None

    @property
    def stage(self) -> Li2Stage:
        """The stage as of the last measurement."""
        return self._stage

    def bind(self, view: ModelView) -> None:
        """Find the last layer, and keep the initial weights."""
        if not isinstance(view.require_samples("train").targets, Tensor):
            raise ValueError("Stages of feature learning need targets; set `unpack` of the Probe.")
        self._last = LastLayer.find(view, self.layer)
        view.request([self._last.site])
        self._metric = self.metrics_by_name(FeatureLearning, ["li2"])["li2"]
        self._stage, self._stage_since, self._compared = self._start, 0, False
        weights = Snapshot(view, step=0).weights
        self._initial = {name: _entries(weights[name]).cpu().clone() for name in self._followed(view)}

    def _followed(self, view: ModelView) -> list[str]:
        if self.parameters is not None:
            return view.select_matrices(self.parameters)
        assert self._last is not None
        return [name for name in view.matrices if name != self._last.parameter(view)]

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """All quantities, and the stage that follows from them."""
        assert self._last is not None
        assert self._metric is not None
        feedback = _Feedback.of(snapshot, self._last)
        if feedback.reduction.scale > 0:
            self._metric.ridge = ridge_strength(self.weight_decay, feedback.reduction.scale) / len(feedback.features)
        weight = self._last.weight(snapshot)
        # Other metrics have one value, this one several by name.
        measured: Any = self.evaluate(
            self._metric, feedback.features, feedback.targets, feedback.residual, weight, feedback.gradient
        )
        # Its state is all the features: too much to carry along, and into checkpoints.
        self._metric.reset()
        values = {f"li2/{name}": float(value) for name, value in measured.items()}
        if not feedback.reduction.is_squared_error:
            del values["li2/ridge_distance"]
        if self._initial:
            values["li2/weight_change"] = float(self._weight_change(snapshot))
        self._advance(values, snapshot)
        return {"li2/stage": float(self._stage.stage), **values}

    def _weight_change(self, snapshot: Snapshot) -> Tensor:
        # One matrix at a time: a sharded one is gathered for this alone.
        now, then = [], []
        for name, initial in self._initial.items():
            weight = snapshot.weights[name]
            share = math.sqrt(weight.numel() / initial.numel())
            entries = _entries(weight)
            now.append(entries.double() * share)
            then.append(initial.to(entries.device).double() * share)
        return relative_change(now, then)

    def _advance(self, values: Mapping[str, float], snapshot: Snapshot) -> None:
        before = self._stage.stage
        cosines = values["li2/cos_lazy"], values["li2/cos_residual"]
        self._stage = self._stage.update(*cosines, values["li2/residual_ratio"])
        if self._stage.stage != before:
            self._stage_since = snapshot.step
            numeral = "I" * self._stage.stage
            self.announce(
                f"Feature learning is in stage {numeral} at step {snapshot.step:,}, {self._stage.name}: "
                f"{_MEANINGS[self._stage.name]}."
            )
        elif self._stage.stage == 3 and not self._compared and snapshot.step >= 2 * self._stage_since:
            self._compare_with_outcome(snapshot)

    def _compare_with_outcome(self, snapshot: Snapshot) -> None:
        """Say once that features have been learned and nothing generalises, where it is so."""
        if not snapshot.has("validation"):
            return
        train, validation = (_accuracy(snapshot.logits(split), snapshot.targets(split)) for split in ("train", "validation"))
        if train is None or validation is None or train < _FITTED:
            return
        self._compared = True
        chance = 1 / snapshot.logits("validation").shape[-1]
        if validation < chance + _ONSET * (1 - chance):
            self.announce(
                f"Stage and outcome disagree at step {snapshot.step:,}: feature learning has been in stage III since step "
                f"{self._stage_since:,}, but validation accuracy is {validation:.1%} (chance {chance:.1%}). So far "
                "what was learned fits the training data alone. It may generalise yet, or the data may be too few for it: a "
                "stage is no verdict."
            )

    def figures(self) -> Mapping[str, Figure]:
        """The stages over the run so far."""
        names = ("stage", *(name for names, _ in _PANELS.values() for name in names))
        series = {name: self.history.get(f"{self.prefix}/li2/{name}") for name in names}
        stage = series["stage"]
        return {} if stage is None else {"li2/stages": _figure(stage, series)}

    def own_state(self) -> dict[str, Any]:
        """The stage, and the initial weights."""
        stage = {name: asdict(self._stage)[name] for name in ("stage", "streak")}
        return {"stage": stage, "since": self._stage_since, "compared": self._compared, "initial": dict(self._initial)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on in the saved run's stage; the thresholds are those given here."""
        self._stage = replace(self._start, **state["stage"])
        self._stage_since, self._compared = state["since"], state["compared"]
        initial = state["initial"]
        # Another choice of parameters has other initial values, of which the saved run knows nothing.
        self._initial |= {name: initial[name] for name in self._initial if name in initial}


@dataclass(frozen=True)
class _Feedback:
    """What the loss sends back, one row a prediction, its reduction undone."""

    features: Tensor
    targets: Tensor
    residual: Tensor
    # ``None``: as the residual and the weight say.
    gradient: Tensor | None
    reduction: _Reduction

    @classmethod
    def of(cls, snapshot: Snapshot, last: LastLayer) -> _Feedback:
        if len(snapshot.logits()) == 0:
            raise ValueError("No prediction of the probe has a target; all are ignored.")
        features, targets = snapshot.activations(last.site), snapshot.batch().targets
        rows = last.rows(features, targets, snapshot)
        chosen = subset(len(rows)).to(rows.device)
        rows = rows[chosen]
        logits, aligned = snapshot.logits(), snapshot.targets()
        outputs = _one_row_each(aligned, logits)
        with torch.enable_grad():
            reduction = _Reduction.of(snapshot, logits, aligned)
            residual = -_slope(snapshot, logits, aligned) / reduction.scale
            if snapshot.view.is_sharded:
                # FSDP acts in the backward pass, which is therefore done by hand.
                rest = residual.reshape(len(logits), -1)[chosen]
                return cls(features.flatten(0, -2)[rows], outputs[chosen], rest, None, reduction)
            at_output, at_features = _sent_back(snapshot, last, features, residual)
        return cls(
            features.flatten(0, -2)[rows],
            outputs[chosen],
            at_output.flatten(0, -2)[rows],
            at_features.flatten(0, -2)[rows],
            reduction,
        )


def _sent_back(snapshot: Snapshot, last: LastLayer, features: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """What arrives at the last layer's output and at its input of what is sent back from the logits."""
    # A leaf, so that autograd goes no further back, and gets there where what comes before is frozen.
    leaf = features.detach().clone().requires_grad_()
    run = snapshot.forward(replace={last.site: leaf}, capture=[last.output], grad=True)
    logits, _ = snapshot.view.probe.align(run.logits, snapshot.batch().targets)
    # At its own size a small residual would vanish in half precision on the way.
    peak = residual.abs().amax()
    size = torch.where(peak == 0, 1.0, peak)
    arrived = torch.autograd.grad(logits, [run.captured[last.output], leaf], (residual / size).to(logits.dtype))
    at_output, at_features = (tensor.double() * size for tensor in arrived)
    return at_output, at_features


@dataclass(frozen=True)
class _Reduction:
    """The factor that a loss puts before the residual, and whether the residual is that of a squared error."""

    scale: Tensor
    is_squared_error: bool

    @classmethod
    def of(cls, snapshot: Snapshot, logits: Tensor, targets: Tensor) -> _Reduction:
        """Measured at logits of our own, near which residuals are large, whatever the model has fitted."""
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        start, middle, end = (_slope(snapshot, noise * factor, targets) for factor in (0.0, 1.0, 2.0))
        way = middle - start
        # The slope of a squared error, and of nothing else here, is a straight line; how steep is the factor.
        if torch.linalg.norm(end - middle - way) <= _STRAIGHT * torch.linalg.norm(way):
            return cls((way * noise.double()).sum() / noise.double().square().sum(), is_squared_error=True)
        # At zero logits a cross-entropy predicts equal shares, or one half if each output stands for itself.
        start = start.reshape(len(logits), -1)
        outputs = _one_row_each(targets, logits)
        residuals = [outputs - 1 / outputs.shape[1], outputs - 0.5]
        alike = [-float((start * residual).sum() / torch.linalg.norm(residual)) for residual in residuals]
        own = alike[1] > alike[0] or math.isnan(alike[0])
        return cls(gradient_scale(start, residuals[own]), is_squared_error=False)


def _slope(snapshot: Snapshot, logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the probe's loss with respect to logits."""
    # The default loss computes in float64; a loss of the user's expects the model's precision.
    point = (logits.double() if snapshot.view.probe.loss is None else logits.clone()).detach().requires_grad_()
    (slope,) = torch.autograd.grad(snapshot.loss_of(point, targets), point)
    return slope.double()


def _one_row_each(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets as what the outputs should be: (m, C)."""
    if targets.is_floating_point() or logits.ndim < 2 or logits.shape[1] < 2:
        return targets.double().reshape(len(targets), -1)
    return one_hot(targets, logits.shape[1]).double()


def _accuracy(logits: Tensor, targets: Tensor | None) -> float | None:
    labels = None if targets is None else class_labels(targets, logits)
    return None if labels is None else float((logits.argmax(-1) == labels).double().mean())


def _entries(weight: Tensor) -> Tensor:
    """All entries of a matrix, or as many as are followed, always the same."""
    flat = weight.flatten()
    if len(flat) <= _MOST_ENTRIES:
        return flat
    places = torch.randint(len(flat), (_MOST_ENTRIES,), generator=torch.Generator().manual_seed(0))
    return flat[places.to(flat.device)]


_PANELS: dict[str, tuple[tuple[str, ...], str]] = {
    "alignment of G": (("cos_lazy", "cos_residual"), "linear"),
    "size": (("residual_ratio", "weight_change", "ridge_distance"), "log"),
    "features": (("participation_ratio", "energy_top", "energy_median"), "log"),
}


def _figure(stage: Series, history: Mapping[str, Series | None]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # Margins by hand: a layout engine draws everything twice, and drawing is what a figure costs.
    figure = Figure(figsize=(7, 7.5))
    margins = {"left": 0.14, "right": 0.97, "bottom": 0.07, "top": 0.93, "hspace": 0.08}
    panels = figure.subplots(len(_PANELS), 1, sharex=True, gridspec_kw=margins)
    for axes, (title, (names, scale)) in zip(panels, _PANELS.items(), strict=True):
        for first, end, number in _spans(stage):
            axes.axvspan(first, end, color=_COLOURS[number - 1], alpha=0.6, linewidth=0)
        for name in names:
            series = history[name]
            if series is not None:
                axes.plot(series.steps, series.values, marker=".", linewidth=1, label=name)
        axes.set(ylabel=title, yscale=scale)
        axes.legend(frameon=False, fontsize=8, loc="best")
        # Without titles, whose room would be looked for.
        axes.set_title("", y=1.0)
    reached = sorted({number for _, _, number in _spans(stage)})
    handles = [Patch(color=_COLOURS[n - 1], label=f"{'I' * n} {Li2Stage.NAMES[n - 1]}") for n in reached]
    figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False)
    # Steps are log-spaced, and 0 is one of them.
    panels[-1].set_xscale("symlog", linthresh=1)
    panels[-1].set(xlabel="step", xlim=(0, max(stage.steps[-1], 1)))
    return figure


def _spans(stage: Series) -> list[tuple[int, int, int]]:
    """First step, last step and number of each stage."""
    starts = [
        (step, int(value))
        for index, (step, value) in enumerate(zip(stage.steps, stage.values, strict=True))
        if index == 0 or value != stage.values[index - 1]
    ]
    ends = [step for step, _ in starts[1:]] + [stage.steps[-1]]
    return [(step, end, number) for (step, number), end in zip(starts, ends, strict=True)]
