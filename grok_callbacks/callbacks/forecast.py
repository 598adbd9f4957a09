"""Says that a run will generalise, when, and how sure that is, before it shows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks._forecast_figure import course
from grok_callbacks.callbacks._summary import escaped
from grok_callbacks.callbacks.activation_sparsity import ActivationSparsityMonitor
from grok_callbacks.callbacks.circuit_complexity import CircuitComplexityMonitor
from grok_callbacks.callbacks.detector import GrokkingDetector
from grok_callbacks.callbacks.gradient_coherence import GradientCoherenceMonitor
from grok_callbacks.callbacks.linear_mapping_number import LinearMappingNumberMonitor
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.callbacks.norm import NormMonitor
from grok_callbacks.callbacks.representation import RepresentationMonitor
from grok_callbacks.callbacks.robustness import RobustnessMonitor
from grok_callbacks.callbacks.spectral_entropy import SpectralEntropyMonitor
from grok_callbacks.callbacks.truncation import TruncationMonitor
from grok_callbacks.callbacks.weight_entropy import WeightEntropyMonitor
from grok_callbacks.forecast._numbers import is_number
from grok_callbacks.forecast.features import FEATURES, MODES, Mode, extract, phrase
from grok_callbacks.forecast.model import ForecastModel
from grok_callbacks.forecast.words import in_percent
from grok_callbacks.history import History
from grok_callbacks.snapshot import ModelView, Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grok_callbacks.recorder import Recorder

__all__ = ["Forecast", "GrokkingForecast"]

#: Who measures what a forecast reads, by the family in its keys. The training loss comes from the detector, or from ourselves.
_SOURCES: dict[str, type[Monitor]] = {
    "norm": NormMonitor,
    "lmn": LinearMappingNumberMonitor,
    "circuit_complexity": CircuitComplexityMonitor,
    "spectral_entropy": SpectralEntropyMonitor,
    "weight_entropy": WeightEntropyMonitor,
    "sparsity": ActivationSparsityMonitor,
    "representation": RepresentationMonitor,
    "robustness": RobustnessMonitor,
    "truncation": TruncationMonitor,
    "gradient_coherence": GradientCoherenceMonitor,
}

#: The mode that a measurement makes possible, the one that is right most often first.
_SIGNS: dict[Mode, str] = {"labels": "loss/validation", "inputs": "representation/prediction_entropy"}

# Present in every history, so no measurement that a forecast could rest on.
_CLOCK = "time"
_MOST_REASONS = 3


@dataclass(frozen=True)
class Forecast:
    """What was to be expected of a run at one step.

    Args:
        step: The optimiser step at which it was made.
        probability: That the run will generalise.
        median: The step by which it will have generalised with an even chance, if it does at all.
        lower: The same with a chance of 10%.
        upper: The same with a chance of 90%.
        reasons: What speaks for it, in words, the strongest first.
        doubts: What speaks against it.
    """

    step: int
    probability: float
    median: float
    lower: float
    upper: float
    reasons: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def when(self) -> str:
        """The step and its interval, as round as they are sure."""
        expected, first, last = (f"{max(_rounded(step), self.step):,}" for step in (self.median, self.lower, self.upper))
        return f"step {expected} ({first} to {last})"

    @property
    def text(self) -> str:
        """All of it in one sentence.

        Example:
            >>> Forecast(1230, 0.93, 3391.2, 2603.0, 4922.0, ("the weight norm has fallen 18% since memorising",)).text
            'Likely to generalise: 93%, around step 3,400 (2,600 to 4,900); the weight norm has fallen 18% since memorising.'
        """
        is_likely = self.probability >= 0.5
        words = "Likely to generalise" if is_likely else "May generalise"
        ground = _listed(self.reasons)
        return f"{words}: {in_percent(self.probability)}, around {self.when}{f'; {ground}' if ground else ''}."


class GrokkingForecast(Monitor):
    """Forecasts, from the time a run has memorised, whether and when it will generalise, and warns once if it will.

    It measures nothing itself: it reads what the other monitors of the run have measured since it memorised, such as norms,
    spectra, the linear mapping number, circuit complexity and the answers to validation inputs. It does with any of them; which
    are missing is said once. Memorising, the onset of generalisation and generalising are those of the run's
    :class:`~grok_callbacks.GrokkingDetector`; without one, it finds them as a detector with default settings would.

    | key | value |
    |---|---|
    | `grok/forecast/probability` | that the run will generalise, 0 to 1 |
    | `grok/forecast/eta_steps` | the optimiser step by which it will have generalised with an even chance, if it does at all |
    | `grok/forecast/{lower,upper}` | the ends of the 80% interval of that step |

    The last three are steps of the run, counted from its beginning, not steps still to go: while a forecast holds, they are
    flat lines. All are logged from 50 steps after memorising to the onset of generalisation. After it there is nothing left to
    forecast, and the model, which was made for the time before, would be wrong. A run that never memorises, or that generalises
    as it memorises, logs none of them.

    **The warning** comes when the probability reaches the threshold at two consecutive measurements: one sentence, such as
    "Likely to generalise: 93%, around step 3,400 (2,600 to 4,900); the linear mapping number has fallen 18% since memorising",
    and one call of ``on_warning``. The progress bar shows the forecast, and TensorBoard its course as a figure and in words.

    Cost: some arithmetic on the history, under a millisecond a measurement. What it reads is measured by monitors of the same
    schedule, whose cost is their own. Without a detector also one probe forward pass, shared with the other monitors.
    Source: our own; see :class:`~grok_callbacks.forecast.ForecastModel` for what it was calibrated on, and
    ``benchmarks/forecast.py`` for how often it is right.

    Args:
        mode: ``"train"`` goes by the training data alone; ``"inputs"`` also by the answers to validation inputs, whose labels
            it never reads; ``"labels"`` by these, too, and is right far more often. By default what has been measured decides:
            ``"labels"`` where there is a validation loss, else ``"inputs"`` where there are answers to validation inputs, else
            ``"train"``.
        threshold: The probability to warn at; by default the model's own, which 5% of the calibration runs that did not grok
            reached.
        on_warning: Called with the :class:`Forecast` when it warns, on every rank, so that it may save a checkpoint or end the
            run. What it raises costs a warning, and the run only with ``on_error="raise"``.
        stop_hopeless: End the fit once the model counts the run as hopeless: a probability below the model's ``hopeless`` at
            two consecutive measurements, and ``hopeless_after`` times the steps that memorising took; never a run that had
            memorised when it began, of which that is not known. In a loop of your own read :attr:`should_stop`, which stays
            as it is over a resume.
        stop_after_generalization: End the fit once the model has generalised.
        model: A model of your own calibration; by default the one that ships with the package for the mode.
        **kwargs: See :class:`~grok_callbacks.Monitor`. The schedule should be that of the monitors that it reads.

    Raises:
        MisconfigurationException: If a setting is not possible, or at fit start if no monitor measures anything to go by, or
            nothing tells when the run memorises.

    Example:
        >>> import torch
        >>> from grok_callbacks import GrokkingForecast, Probe, Recorder, default_callbacks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(50, 4), torch.randint(3, (50,))
        >>> callbacks = default_callbacks("standard")
        >>> recorder = Recorder(model, callbacks, Probe(train=data, validation=data))
        >>> for step in range(0, 200, 20):
        ...     values = recorder.record(step, metrics={"train_acc": 1.0, "val_acc": 0.1})
        >>> (forecast,) = [callback for callback in callbacks if isinstance(callback, GrokkingForecast)]
        >>> 0 < forecast.forecast.probability < 1
        True
    """

    question = "Is it about to generalise?"
    preset = "standard"

    def __init__(
        self,
        mode: Mode | None = None,
        *,
        threshold: float | None = None,
        on_warning: Callable[[Forecast], object] | None = None,
        stop_hopeless: bool = False,
        stop_after_generalization: bool = False,
        model: ForecastModel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mode is not None and mode not in MODES:
            raise MisconfigurationException(f"`mode` must be one of {list(MODES)}, got {mode!r}.")
        if model is not None and not isinstance(model, ForecastModel):
            raise MisconfigurationException(f"`model` must be a ForecastModel, got a {type(model).__name__}.")
        if model is not None and mode not in (None, model.mode):
            raise MisconfigurationException(f"`mode` is {mode!r}, but `model` was made for mode {model.mode!r}.")
        if threshold is not None and not (is_number(threshold) and 0 < threshold < 1):
            raise MisconfigurationException(f"`threshold` must be a probability between 0 and 1, got {threshold!r}.")
        if on_warning is not None and not callable(on_warning):
            raise MisconfigurationException(f"`on_warning` must be callable, got a {type(on_warning).__name__}.")
        self.mode: Mode | None = mode if model is None else model.mode
        self.threshold = threshold
        self.on_warning = on_warning
        self.stop_hopeless = stop_hopeless
        self.stop_after_generalization = stop_after_generalization
        self.model = model
        self._forget()

    def _forget(self) -> None:
        #: The last forecast, ``None`` before the first and once the run has generalised.
        self.forecast: Forecast | None = None
        #: The forecast that it warned of, ``None`` so far.
        self.warning: Forecast | None = None
        #: The forecast on which the run was ended as hopeless.
        self.hopeless: Forecast | None = None
        #: Whether the run was to end, as hopeless or for having generalised.
        self.should_stop = False
        # Consecutive measurements that speak for a warning, or for none ever.
        self._for_warning = self._for_hopeless = 0
        self._due: int | None = None
        # Judges the run where there is no detector.
        self._stand_in = GrokkingDetector(prefix=self.prefix)
        self._judged: tuple[Recorder | None, GrokkingDetector] | None = None
        self._stand_in_error: ValueError | None = None

    def bind(self, view: ModelView) -> None:
        """See whether the run's events can be found without a detector."""
        self._forget()
        try:
            self._stand_in.bind(view)
        except ValueError as error:
            self._stand_in_error = error  # A detector may know better.

    def __getstate__(self) -> dict[str, Any]:
        """As of every monitor; the judge is looked for anew."""
        return super().__getstate__() | {"_judged": None}

    def attach(self, recorder: Recorder) -> Mapping[str, Any] | None:
        """Look for a detector, and for something to go by."""
        restored = super().attach(recorder)
        if not self.optional:
            self._check_company()
        return restored

    def _check_company(self) -> None:
        if self._stand_in_error is not None and self._judge is self._stand_in:
            raise ValueError(
                f"{self.label} cannot tell when the run memorises: {self._stand_in_error} Or add a GrokkingDetector with the "
                "names of the metrics that the module logs."
            )
        sources = self._sources()
        missing = {
            source.__name__: is_deciding
            for source, is_deciding in sources.items()
            if not any(isinstance(peer, source) for peer in self._peers())
        }
        # Another person's monitor may log anything.
        is_known = all(_is_ours(peer) for peer in self._peers())
        if is_known and 0 < sum(sources.values()) == sum(missing.values()):
            names = ", ".join(name for name, is_deciding in missing.items() if is_deciding)
            raise ValueError(
                f"{self.label} reads what other monitors measure, and there are none of these with the prefix {self.prefix!r}. "
                f"Add {names}, as many of them as you like, or take default_callbacks()."
            )
        if missing and self._recorder is not None and self._recorder.is_first_rank:
            names = ", ".join(missing)
            warnings.warn(f"{self.label} goes without what {names} would measure, and is less sure for it.", stacklevel=2)

    def _sources(self) -> dict[type[Monitor], bool]:
        """Who measures what our models read, and whether it bears on the probability or only on the step."""
        modes: tuple[Mode, ...] = (self.mode,) if self.mode is not None else MODES
        models = [self.model] if self.model is not None else [ForecastModel.load(mode) for mode in modes]
        found: dict[type[Monitor], bool] = {}
        for name, term in (item for model in models for item in model.terms.items()):
            measure = FEATURES[name].measure
            source = None if measure is None else _SOURCES.get(measure.key.partition("/")[0])
            if source is not None:
                found[source] = found.get(source, False) or term.log_odds != 0
        return found

    def _peers(self) -> list[Monitor]:
        """The monitors with our prefix."""
        monitors = self._recorder.monitors if self._recorder is not None else []
        return [monitor for monitor in monitors if isinstance(monitor, Monitor) and monitor.prefix == self.prefix]

    @property
    def _judge(self) -> GrokkingDetector:
        """Who knows the run's events."""
        # The monitors of a Recorder stay the same.
        if self._judged is None or self._judged[0] is not self._recorder:
            monitors = self._recorder.monitors if self._recorder is not None else []
            detectors = [monitor for monitor in monitors if isinstance(monitor, GrokkingDetector)]
            judge = min(detectors, key=lambda detector: detector.prefix != self.prefix, default=self._stand_in)
            self._judged = self._recorder, judge
        return self._judged[1]

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Accuracy and loss on the probe if no detector measures them; the forecast follows once all monitors have measured."""
        self._due = snapshot.step
        return self._stand_in.measure(snapshot) if self._judge is self._stand_in else {}

    def logged_metrics_wanted(self, available: Mapping[str, Any]) -> Iterable[str]:
        """The accuracies that a detector would read, if there is none."""
        return self._stand_in.logged_metrics_wanted(available) if self._judge is self._stand_in else ()

    def analyse(self, history: History, step: int) -> Mapping[str, float | Tensor]:
        """Forecast from all that has been measured, whenever it is our turn to measure."""
        judge = self._judge
        if self._recorder is not None and judge.label in self._recorder.switched_off:
            raise RuntimeError(f"{judge.label}, which tells when the run memorises, is switched off")
        self._stand_in.session = self.session
        judge.follow(history, step)
        is_due, self._due = self._due == step, None
        if judge.onset_step is not None:
            self.forecast = None
        if self.stop_after_generalization and judge.grokked_step is not None:
            self._stop()
        return self._update(history, step, judge) if is_due else {}

    def _update(self, history: History, step: int, judge: GrokkingDetector) -> dict[str, float]:
        memorized = judge.memorized_step
        if memorized is None or judge.onset_step is not None:
            return {}
        model = self._model_for(history)
        if step < memorized + model.wait:
            return {}
        forecast = self._made_by(model, history, step, memorized)
        if forecast is None:
            return {}
        self.forecast = forecast
        self._consider(forecast, model, memorized)
        values = {"probability": forecast.probability, "eta_steps": forecast.median}
        values |= {"lower": forecast.lower, "upper": forecast.upper}
        return {f"forecast/{name}": value for name, value in values.items() if math.isfinite(value)}

    def _model_for(self, history: History) -> ForecastModel:
        if self.model is not None:
            return self.model
        if self.mode is not None:
            return ForecastModel.load(self.mode)
        return ForecastModel.load(next((mode for mode, key in _SIGNS.items() if f"{self.prefix}/{key}" in history), "train"))

    def _made_by(self, model: ForecastModel, history: History, step: int, memorized: int) -> Forecast | None:
        """The model's forecast, ``None`` if nothing has been measured that it could rest on."""
        features = extract(history, step, memorized, model.mode, self.prefix)
        prediction = model.predict(features, step)
        if not prediction.contributions.keys() - {_CLOCK}:
            return None
        chosen: dict[bool, dict[str, str]] = {True: {}, False: {}}
        for name, added in prediction.contributions.items():
            if name != _CLOCK and added != 0:
                # One reason a measure: several views of one curve say nearly the same.
                chosen[added > 0].setdefault(name.partition(".")[0], phrase(name, features[name]))
        reasons, doubts = (tuple(chosen[speaks_for].values())[:_MOST_REASONS] for speaks_for in (True, False))
        return Forecast(
            step, prediction.probability, prediction.median, prediction.lower, prediction.upper, reasons=reasons, doubts=doubts
        )

    def _consider(self, forecast: Forecast, model: ForecastModel, memorized: int) -> None:
        """Warn, or give the run up, if it has been this way for long enough."""
        threshold = model.threshold if self.threshold is None else self.threshold
        self._for_warning = self._for_warning + 1 if forecast.probability >= threshold else 0
        is_late = 0 < model.hopeless_after * memorized <= forecast.step
        self._for_hopeless = self._for_hopeless + 1 if is_late and forecast.probability < model.hopeless else 0
        if self.warning is None and self._for_warning >= model.patience:
            self.warning = forecast
            self.announce(forecast.text)
            self._call(forecast)
        if self.stop_hopeless and self.hopeless is None and self._for_hopeless >= model.patience:
            self.hopeless = forecast
            self.announce(self._farewell(forecast, memorized))
            self._stop()

    def _call(self, forecast: Forecast) -> None:
        if self.on_warning is None:
            return
        try:
            self.on_warning(forecast)
        except Exception as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"{self.label}: `on_warning` failed: {type(error).__name__}: {error}", stacklevel=2)

    @staticmethod
    def _farewell(forecast: Forecast, memorized: int) -> str:
        doubts = _listed(forecast.doubts)
        return (
            f"Stopped as hopeless at step {forecast.step:,}: memorised at step {memorized:,}, "
            f"{in_percent(forecast.probability)} likely to generalise{f'; {doubts}' if doubts else ''}."
        )

    def _stop(self) -> None:
        """End the run, once: whoever resumes it means to go on."""
        if not self.should_stop and self.session is not None:
            self.session.trainer.should_stop = True
        self.should_stop = True

    def status(self) -> Mapping[str, str]:
        """The forecast in brief."""
        if self.forecast is None:
            return {}
        return {"forecast": f"{in_percent(self.forecast.probability)} by ~{_rounded(self.forecast.median):,}"}

    def texts(self) -> Mapping[str, str]:
        """The verdict: the forecast with what speaks for and against it, and what it led to."""
        paragraphs = []
        if self.forecast is not None:
            now = self.forecast
            verdict = f"**{in_percent(now.probability)} likely to generalise, around {now.when}**"
            paragraphs.append(f"{verdict} as of step {now.step:,}.")
            for title, phrases in (("For it", now.reasons), ("Against it", now.doubts)):
                if phrases:
                    paragraphs.append("\n".join([f"{title}:", "", *(f"- {escaped(one)}" for one in phrases)]))
        if self.warning is not None:
            paragraphs.append(f"Warned at step {self.warning.step:,}: {escaped(self.warning.text)}")
        if self.hopeless is not None:
            paragraphs.append(f"Stopped as hopeless at step {self.hopeless.step:,}.")
        for event, step in (("Onset of generalisation", self._judge.onset_step), ("Generalised", self._judge.grokked_step)):
            if paragraphs and step is not None:
                paragraphs.append(f"{event} at step {step:,}.")
        return {"forecast": "\n\n".join(paragraphs)} if paragraphs else {}

    def figures(self) -> Mapping[str, Figure]:
        """The course of the forecast: probability, and the expected step with its interval."""
        names = ("probability", "eta_steps", "lower", "upper")
        curves = {name: self.history[key] for name in names if (key := f"{self.prefix}/forecast/{name}") in self.history}
        if len(curves) < len(names):
            return {}
        return {
            "forecast/course": course(
                curves,
                threshold=self.threshold if self.threshold is not None else self._model_for(self.history).threshold,
                warned=None if self.warning is None else self.warning.step,
                onset=self._judge.onset_step,
                generalized=self._judge.grokked_step,
            )
        }

    def own_state(self) -> dict[str, Any]:
        """The forecasts that led to something, the last one, and how far the run is on the way to another verdict."""
        forecasts = {"forecast": self.forecast, "warning": self.warning, "hopeless": self.hopeless}
        return {
            "forecasts": {name: None if one is None else asdict(one) for name, one in forecasts.items()},
            "counts": [self._for_warning, self._for_hopeless],
            "should_stop": self.should_stop,
            "stand_in": self._stand_in.own_state(),
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved run was; it does not warn twice."""
        made = {name: None if one is None else Forecast(**one) for name, one in state["forecasts"].items()}
        self.forecast, self.warning, self.hopeless = made["forecast"], made["warning"], made["hopeless"]
        self._for_warning, self._for_hopeless = state["counts"]
        self.should_stop = state["should_stop"]
        self._stand_in.load_own_state(state["stand_in"])


def _is_ours(monitor: Monitor) -> bool:
    return type(monitor).__module__.partition(".")[0] == __name__.partition(".")[0]


def _rounded(step: float) -> int:
    """Two significant digits are more than a forecast knows."""
    unit = int(10 ** max(math.floor(math.log10(max(step, 1.0))) - 1, 0))
    return round(step / unit) * unit


def _listed(phrases: Sequence[str]) -> str:
    """Phrases as one: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))
