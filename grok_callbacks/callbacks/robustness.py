"""Matrix information and robustness: what noise on the inputs does to representations and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional import feature_entropy, mean_squared_input_gradient
from grok_callbacks.functional.information import check_alpha
from grok_callbacks.metrics import MatrixMutualInformation
from grok_callbacks.probe import Batch
from grok_callbacks.selection import clean_name, select
from grok_callbacks.snapshot import ModelView, Run, Snapshot

__all__ = ["RobustnessMonitor"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_FIRST_LAYERS = (*_EMBEDDINGS, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SCALES = {"input": 0.1, "embedding": 0.4}
_FIRST = ""
_INPUT = ":input"


class RobustnessMonitor(Monitor):
    r"""Logs matrix information under noise: PMI, PE, MID and ED, and how steeply the outputs depend on the inputs.

    With the Gram matrices :math:`G_1` of a layer's output and :math:`G_2` of the logits, over the probe's training samples and
    under Gaussian noise on their inputs, the perturbed mutual information is
    :math:`\mathrm{PMI} = H(G_1) + H(G_2) - H(G_1 \circ G_2)` and the perturbed entropy :math:`\mathrm{PE} = H(G_2)`, in nats
    (:math:`H` is :func:`~grok_callbacks.functional.matrix_entropy`). MID and ED are what the noise changes: PMI and PE under
    noise less the same without, with their sign (ours). All are means over draws of noise. The draws are the same at every
    step, so that curves show the network change and not the noise.

    The mean squared gradient of the logits with respect to inputs, or to embeddings, is what Lemma 3.1 of the paper bounds by
    squared weight norm times sharpness. It is taken without noise and estimated by random signs (Hutchinson).

    | key | value |
    |---|---|
    | `grok/robustness/pmi` | perturbed mutual information; `grok/robustness/pmi/{layer}` for each if `layers` chooses several |
    | `grok/robustness/mid` | its difference to that without noise; named like `pmi` |
    | `grok/robustness/pe`, `ed` | perturbed entropy of the logits, and its difference |
    | `grok/robustness/pmi_se`, `pe_se` | standard errors over draws, of `mid` and `ed` too; not with one draw |
    | `grok/robustness/input_gradient` | mean squared gradient of a logit with respect to a sample |

    Rows of the Gram matrices are samples; what a sample has of positions is flattened. Under FSDP2, which acts in the backward
    pass, the gradient is left out.

    Cost: with the forward pass that all monitors share, `num_draws` + 1 more of `num_samples` samples and `gradient_probes`
    backward passes; for each draw, and without, the eigenvalues of two matrices of at most `num_samples` rows, whose
    cost grows with the cube of that number.
    Source: Tan and Huang 2023 (arXiv 2311.06597). The noise scales are as others report them.

    Args:
        layers: Globs of sites whose output is set against the logits. By default the first layer: the embedding, or the first
            linear or convolutional layer.
        alpha: Order of the entropies, at least 0.
        on: Where the noise goes: ``"input"``, or for tokens ``"embedding"``: the output of the embeddings. By default on the
            inputs where they are floating-point numbers. Without an embedding in the model it goes on the first layer's input,
            where a model that makes one-hot vectors itself has them.
        noise_sites: Globs of sites to put the noise at instead, for ``on="embedding"``; none may feed another.
        noise_scale: Standard deviation of the noise; by default the paper's, 0.1 on inputs and 0.4 on embeddings.
        num_samples: Training samples of the probe that are looked at, at most its size. Entropies grow with their number, and
            the cost with its cube: compare values at one ``num_samples``.
        num_draws: Number of draws of noise. On three networks in training means of two were within 0.012 nats of those of 32.
        gradient_probes: Number of random probes of the gradient. One, the same at every step, gave it to 4.5% there.
        seed: Seed of noise and probes.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import Probe, Recorder, RobustnessMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> probe = Probe(train=(torch.randn(50, 4), torch.randint(3, (50,))))
        >>> values = Recorder(model, [RobustnessMonitor(probe=probe)]).record(step=0)
        >>> sorted(key.removeprefix("grok/robustness/") for key in values)
        ['ed', 'input_gradient', 'mid', 'pe', 'pe_se', 'pmi', 'pmi_se']
    """

    question = "Is it about to generalise?"
    preset = "standard"

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        alpha: float = 1.0,
        on: Literal["input", "embedding"] | None = None,
        noise_sites: str | Sequence[str] | None = None,
        noise_scale: float | None = None,
        num_samples: int = 128,
        num_draws: int = 2,
        gradient_probes: int = 1,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_alpha(alpha)
        if on not in ("input", "embedding", None):
            raise ValueError(f'`on` must be "input" or "embedding", got {on!r}.')
        if on == "input" and noise_sites is not None:
            raise ValueError('`noise_sites` are for `on="embedding"`.')
        if noise_scale is not None and not 0 <= noise_scale < math.inf:
            raise ValueError(f"`noise_scale` must be a finite number of at least 0, got {noise_scale!r}.")
        for name, value in (("num_samples", num_samples), ("num_draws", num_draws), ("gradient_probes", gradient_probes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        self.layers = layers
        self.alpha = alpha
        self.on = on
        self.noise_sites = noise_sites
        self.noise_scale = noise_scale
        self.num_samples = num_samples
        self.num_draws = num_draws
        self.gradient_probes = gradient_probes
        self.seed = seed
        self._metrics: dict[str, MatrixMutualInformation] = {}
        # The sites of each layer: one that is called several times, such as an embedding once for each operand, has several.
        self._layers: dict[str, list[str]] = {}
        # None: on the inputs.
        self._noise_sites: list[str] | None = None
        self._has_gradient = True

    def bind(self, view: ModelView) -> None:
        """Choose the layers, and where the noise goes."""
        inputs = view.require_samples("train").inputs
        view.require_logits("train")
        if self.layers is None:
            self._layers = {_FIRST: _first_layer(view)}
        else:
            chosen = view.select_sites(self.layers)
            self._layers = {_FIRST if len(chosen) == 1 else f"/{site}": [site] for site in chosen}
        self._noise_sites = self._choose_noise_sites(view, inputs)
        view.request([site for sites in self._layers.values() for site in sites])
        view.request(self._noise_sites or [])
        self._has_gradient = not view.is_sharded
        self._metrics = self.metrics_by_name(MatrixMutualInformation, self._layers, alpha=self.alpha)

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Information without noise and under each draw, and the gradient."""
        sites = [site for sites in self._layers.values() for site in sites]
        run = snapshot.run()
        samples = snapshot.batch().first(self.num_samples)
        place = _Place(snapshot, self._noise_sites, samples, run)
        clean = self._information(run, len(snapshot.batch()))
        draws = [self._information(place.run(noisy, sites), place.size) for noisy in self._jittered(place)]
        values: dict[str, float | Tensor] = {}
        for key, without_noise in clean.items():
            kind, _, layer = key.partition("/")
            under_noise = torch.stack([draw[key] for draw in draws])
            layer = layer and f"/{layer}"
            values[f"robustness/p{kind}{layer}"] = under_noise.mean()
            values[f"robustness/{_DIFFERENCES[kind]}{layer}"] = (under_noise - without_noise).mean()
            if len(draws) > 1:
                values[f"robustness/p{kind}_se{layer}"] = under_noise.std() / math.sqrt(len(draws))
        if self._has_gradient:
            values["robustness/input_gradient"] = self._gradient(place)
        return values

    def _choose_noise_sites(self, view: ModelView, inputs: Any) -> list[str] | None:
        leaves = tree_flatten(inputs)[0]
        floating = [leaf for leaf in leaves if _is_floating(leaf)]
        if self.on == "input" and not floating:
            found = ", ".join(sorted({str(leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)}))
            raise ValueError(f'`on`: inputs of {found or "no tensor"} can\'t be jittered; for tokens set `on="embedding"`.')
        if self.noise_sites is not None:
            return select(view.sites, self.noise_sites, "noise_sites")
        if self.on == "input" or (self.on is None and floating):
            return None
        return _where_noise_goes(view)

    def _jittered(self, place: _Place) -> list[Tensor]:
        """What passes at the place, under each draw of noise."""
        scale = self.noise_scale if self.noise_scale is not None else _SCALES[place.kind]
        # On the CPU, so that the noise is the same on every device.
        generator = torch.Generator().manual_seed(self.seed)
        clean = place.values
        return [clean + scale * torch.randn(clean.shape, generator=generator).to(clean) for _ in range(self.num_draws)]

    def _information(self, run: Run, size: int) -> dict[str, Tensor]:
        """Mutual information of each layer with the logits, and the entropy of the logits."""
        logits = run.logits
        if len(logits) != size:
            raise ValueError(f"Logits of shape {tuple(logits.shape)} are not one row for each of {size} samples.")
        logits = logits.reshape(size, -1)  # A lone logit may come without a dimension of its own.
        values = {}
        for layer, sites in self._layers.items():
            features = [run.captured[site] for site in sites]
            if any(len(feature) != size for feature in features):
                raise ValueError(f"`layers`: {sites} do not give one row for each of {size} samples.")
            metric = self._metrics[layer]
            rows = torch.cat([feature[: self.num_samples].flatten(1) for feature in features], 1)
            values[f"mi{layer}"] = self.evaluate(metric, rows, logits[: self.num_samples])
            # Its state is all features and logits: too much to carry along, and into checkpoints.
            metric.reset()
        return {**values, "e": feature_entropy(logits[: self.num_samples], self.alpha)}

    def _gradient(self, place: _Place) -> Tensor:
        with torch.enable_grad():
            values = place.values.detach().clone().requires_grad_()
            logits = place.run(values, [], grad=True).logits
        if not logits.requires_grad:
            return torch.tensor(torch.nan, dtype=torch.float64)
        return mean_squared_input_gradient(logits, values, self.gradient_probes, self.seed).mean


_DIFFERENCES = {"mi": "mid", "e": "ed"}


class _Place:
    """Where the noise goes, as one matrix with a row for each sample: the floating inputs, or the activations at sites.

    Args:
        snapshot: The model.
        sites: Sites of activations; ``None`` for the inputs.
        samples: The first samples of the probe, so many as rows are wanted.
        clean: A run without noise that captured the sites on all samples.
    """

    def __init__(self, snapshot: Snapshot, sites: Sequence[str] | None, samples: Batch, clean: Run) -> None:
        self._snapshot = snapshot
        total = len(snapshot.batch())
        self.size = len(samples)
        self.kind = "input" if sites is None else "embedding"
        self._build: Callable[[list[Tensor]], dict[str, Any]]
        if sites is None:
            leaves, structure = tree_flatten(samples.inputs)
            places = [index for index, leaf in enumerate(leaves) if self._fits(leaf)]
            tensors = [leaves[index] for index in places]

            def build(values: list[Tensor]) -> dict[str, Any]:
                substitutes = dict(zip(places, values, strict=True))
                # Copies, or a model that writes into its inputs would spoil the probe.
                filled = [substitutes.get(i, _copied(leaf)) for i, leaf in enumerate(leaves)]
                return {"inputs": tree_unflatten(filled, structure)}

        else:
            chosen = list(sites)
            tensors = [clean.captured[site] for site in chosen]
            unfit = [site for site, tensor in zip(chosen, tensors, strict=True) if len(tensor) != total]
            if unfit:
                raise ValueError(f"`noise_sites`: {unfit} do not give one row for each of {total} samples.")
            tensors = [tensor[: self.size] for tensor in tensors]

            def build(values: list[Tensor]) -> dict[str, Any]:
                return {"inputs": tree_map(_copied, samples.inputs), "replace": dict(zip(chosen, values, strict=True))}

        if not tensors:
            raise ValueError(f"`on`: no input has one row for each of {self.size} samples.")
        self._build = build
        self._shapes = [tensor.shape for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self.values = torch.cat([tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors], 1)

    def run(self, values: Tensor, capture: Sequence[str], *, grad: bool = False) -> Run:
        """A forward pass with other values at this place."""
        parts = torch.split(values, [shape[1:].numel() for shape in self._shapes], 1)
        tensors = [part.reshape(shape).to(dtype) for part, shape, dtype in zip(parts, self._shapes, self._dtypes, strict=True)]
        return self._snapshot.forward(capture=capture, grad=grad, **self._build(tensors))

    def _fits(self, value: Any) -> bool:
        return _is_floating(value) and len(value) == self.size


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _sites_of(view: ModelView, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Outputs of modules of these kinds that have a row for each sample, in the order of the forward pass.

    An embedding of positions, say, may be one for all samples.
    """
    names = {clean_name(name) for name, module in view.model.named_modules() if isinstance(module, kinds)}
    sites = [site for site in view.sites if site.partition("@")[0] in names and not site.endswith(_INPUT)]
    snapshot = Snapshot(view, step=0)
    captured = snapshot.forward(capture=sites).captured
    return [site for site in sites if len(captured[site]) == len(snapshot.batch())]


def _first_layer(view: ModelView) -> list[str]:
    """The outputs of the first layer, one for each time that it is called."""
    sites = _sites_of(view, _FIRST_LAYERS)
    if not sites:
        raise ValueError("`layers`: there is no embedding, linear or convolutional layer; name sites.")
    first = sites[0].partition("@")[0]
    return [site for site in sites if site.partition("@")[0] == first]


def _where_noise_goes(view: ModelView) -> list[str]:
    """The outputs of the embeddings, or what goes into the first layer."""
    sites = _sites_of(view, _EMBEDDINGS) or [site for site in view.sites if site == f"{_first_layer(view)[0]}{_INPUT}"]
    if not sites:
        raise ValueError(f'`noise_sites`: no embedding for `on="embedding"`; name sites: {", ".join(view.sites[:60])}.')
    return sites
