"""The representation before the last layer, and what the network answers where it has not been trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric, MetricCollection

from grok_callbacks.callbacks._last_layer import LastLayer, class_labels, subset
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional import prediction_confidence
from grok_callbacks.metrics import AnswerEntropy, ClassDistanceRatio, PredictionChurn, PredictionEntropy, RepresentationEntropy
from grok_callbacks.probe import Split
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["RepresentationMonitor"]


class RepresentationMonitor(Monitor):
    """Logs published early-warning signals of the last hidden representation, and of the answers to validation inputs.

    The representation is the input of the last linear layer, on validation samples where there are any when the first
    measurement is made, otherwise on training samples; the run stays with that choice, since the two don't compare. The
    predictions are always those of validation samples, whose labels are not looked at; without such samples they are left out,
    and for regression. They come as soon as there are samples, with data that can only be iterated after the first validation.

    | key | value |
    |---|---|
    | `grok/representation/entropy` | entropy of the spectrum of the features' covariance, 0 to 1 |
    | `grok/representation/class_distance_ratio` | distance of the classes over their scatter; where samples have class labels |
    | `grok/representation/prediction_entropy` | mean entropy of the predicted probabilities, in nats |
    | `grok/representation/answer_entropy` | entropy of the mean of these probabilities, as a share of its maximum, 0 to 1 |
    | `grok/representation/confidence` | mean probability of the predicted class |
    | `grok/representation/churn` | share of answers that changed since the last measurement; from the second on |

    None is a verdict. The entropy also collapses without grokking (in multilayer perceptrons), the ratio is noisy with few
    samples a class, and churn grows with the steps between measurements, which the default schedule spaces ever wider. All
    depend on the number of samples: compare values of one probe. Of more than 4,096 predictions (per-position logits), so many
    are used.

    Cost: the probe's forward pass, shared with other monitors, and the eigenvalues of one matrix of at most the smaller of
    samples and features.
    Source: Truong et al. 2026 (arXiv 2604.13123) for the entropy, arXiv 2604.20923 for the ratio; entropies,
    confidence and churn of predictions are customary.

    Args:
        layer: Name of the last linear layer; by default the last ``nn.Linear`` whose output the model returns, at all positions
            or at one.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Raises:
        MisconfigurationException: At fit start, if no last linear layer is found.

    Example:
        >>> import torch
        >>> from grok_callbacks import Probe, Recorder, RepresentationMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(50, 4), torch.randint(3, (50,))
        >>> recorder = Recorder(model, [RepresentationMonitor()], Probe(train=data, validation=data))
        >>> [key.removeprefix("grok/representation/") for key in recorder.record(step=0)]
        ['entropy', 'class_distance_ratio', 'prediction_entropy', 'answer_entropy', 'confidence']
        >>> recorder.record(step=1)["grok/representation/churn"]
        0.0
    """

    question = "Is it about to generalise?"
    preset = "standard"

    def __init__(self, layer: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer
        self._last: LastLayer | None = None
        self._split: Split | None = None
        self._previous: Tensor | None = None
        self._metrics: dict[str, Metric] = {}

    def bind(self, view: ModelView) -> None:
        """Find the last layer."""
        self._last = LastLayer.find(view, self.layer)
        view.request([self._last.site], "train")
        view.request([self._last.site], "validation")
        self._split = self._previous = None
        self._metrics = {
            "entropy": RepresentationEntropy(sync_on_compute=False),
            "class_distance_ratio": ClassDistanceRatio(sync_on_compute=False),
            "prediction_entropy": PredictionEntropy(sync_on_compute=False),
            "answer_entropy": AnswerEntropy(sync_on_compute=False),
            "churn": PredictionChurn(sync_on_compute=False),
        }
        self.metric = MetricCollection(dict(self._metrics), compute_groups=False)

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Signals of the features, and of the predictions where there are validation samples."""
        if self._split is None:
            self._split = "validation" if snapshot.has("validation") else "train"
        values = self._of_features(snapshot, self._split)
        if snapshot.has("validation") and _is_classifier(snapshot):
            values |= self._of_predictions(snapshot.logits("validation"))
        return {f"representation/{name}": value for name, value in values.items()}

    def _of_features(self, snapshot: Snapshot, split: Split) -> dict[str, Tensor]:
        assert self._last is not None
        features = self._last.features(snapshot, split)
        chosen = subset(len(features)).to(features.device)
        features, targets = features[chosen], snapshot.targets(split)
        values = {"entropy": self.evaluate(self._metrics["entropy"], features)}
        labels = class_labels(targets, snapshot.logits(split)) if isinstance(targets, Tensor) else None
        if labels is not None:
            values["class_distance_ratio"] = self.evaluate(self._metrics["class_distance_ratio"], features, labels[chosen])
        # Their state is all the features: too much to carry along, and into checkpoints.
        for name in values:
            self._metrics[name].reset()
        return values

    def _of_predictions(self, logits: Tensor) -> dict[str, Tensor]:
        logits = logits[subset(len(logits)).to(logits.device)]
        values = {
            "prediction_entropy": self.evaluate(self._metrics["prediction_entropy"], logits),
            "answer_entropy": self.evaluate(self._metrics["answer_entropy"], logits),
            "confidence": prediction_confidence(logits),
        }
        previous, count = self._previous, logits.shape[1]
        if previous is not None and len(previous) == len(logits):
            answered = one_hot(previous.to(logits.device), count)
            values["churn"] = self.evaluate(self._metrics["churn"], logits, answered)
        # There is no answer in what is not a number.
        self._previous = None if logits.isnan().any() else logits.argmax(-1).cpu()
        return values

    def own_state(self) -> dict[str, Any]:
        """Which samples the features are of, and the last answers."""
        return {"split": self._split, "previous": self._previous}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the same samples."""
        self._split, self._previous = state["split"], state["previous"]


def _is_classifier(snapshot: Snapshot) -> bool:
    """Whether outputs are logits of classes, as far as the training targets tell."""
    logits, targets = snapshot.logits("validation"), snapshot.batch("train").targets
    several = logits.ndim > 1 and logits.shape[-1] > 1
    return several and not (isinstance(targets, Tensor) and class_labels(targets, logits) is None)
