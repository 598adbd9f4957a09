"""Linear mapping number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grok_callbacks._isolation import observing
from grok_callbacks.callbacks._clusters import order_by_cluster
from grok_callbacks.callbacks._tail import is_affine_after, is_cut, substituted, tail_after
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional.lmn import linear_mapping_number
from grok_callbacks.metrics import LinearMappingNumber
from grok_callbacks.snapshot import ModelView, Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LinearMappingNumberMonitor"]


class LinearMappingNumberMonitor(Monitor):
    r"""Logs how many linear maps the network amounts to between a layer and its output.

    With :math:`f` the network from the layer's output on, :math:`L_{ij}` says how linear :math:`f` is between the activations
    of the samples i and j (mean over outputs of :math:`r^2` along the segment), and :math:`\text{LMN} = 2^S` with :math:`S` the
    entropy in bits of the normalised absolute eigenvalues of :math:`L`. It is 1 for a linear network and at most the number of
    samples. It rises while a network memorises, and falls while it compresses.

    So that it can be left on, the default takes 32 samples and looks at 3 inner points of each segment instead of 19, as a
    Gauss-Lobatto rule for the sums over all of them. On two multilayer perceptrons and a transformer in training that moved the
    number by up to 5.1% (5 inner points: 1.7%), where numbers of other 32 samples deviate by 1 to 6%
    (benchmarks/results/precision.md). For the paper's number set ``quadrature=None`` and more samples.

    The meaningful layer is the first hidden one, after its activation. From the last post-activation layer on a network is
    linear, and the number is 1. The number depends on how many samples it is taken over: compare values at one ``num_samples``.
    Late in a run, with the loss at float noise, it can collapse below 2, which is an instability and not compression.

    Where every path to the output passes through the layer, only what comes after it is run. A layer inside a residual branch
    does not determine the output: the other paths are then held at the first sample's (our choice).

    | key | value |
    |---|---|
    | `grok/lmn/{layer}` | linear mapping number from this layer on |
    | `grok/lmn_standard_error/{layer}` | with ``repeats`` above 1: standard error over disjoint subsets of samples |

    As a figure: the connectivity matrix, samples ordered by spectral clustering, beside its eigenvalues.

    Cost: 3 n (n - 1) / 2 samples through what comes after the layer, 1,488 by default, 2 to 3 ms for a small multilayer
    perceptron and 13 ms for a small transformer (benchmarks/results/overhead.md); split over ranks.
    Source: Liu, Zhong, Tegmark 2023 (arXiv 2310.05918).

    Args:
        layers: Globs of sites. By default the first hidden activation if all paths pass through it and what follows is not
            linear, otherwise the first place of which that is true, such as an embedding's output.
        num_samples: Training samples of the probe that are taken, at most its size.
        repeats: Average over this many disjoint subsets of ``num_samples`` and log the standard error.
        position: Which position's output to look at where the network answers per position; all of them by default.
        num_interpolation: Points on each segment, both ends among them.
        quadrature: Inner points that are looked at to stand for all of those; ``None`` for all.
        memory_limit: Bytes that the segments in work may take.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import LinearMappingNumberMonitor, Probe, Recorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> monitor = LinearMappingNumberMonitor("1", num_samples=16)
        >>> values = Recorder(model, [monitor], Probe(train=torch.randn(16, 3))).record(step=0)
        >>> {key: round(value, 4) for key, value in values.items()}
        {'grok/lmn/1': 1.0}
    """

    question = "Is it compressing?"
    preset = "standard"

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        num_samples: int = 32,
        repeats: int = 1,
        position: int | None = None,
        num_interpolation: int = 21,
        quadrature: int | None = 3,
        memory_limit: int = 256 * 2**20,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = layers
        self.num_samples = num_samples
        self.repeats = repeats
        self.position = position
        self.num_interpolation = num_interpolation
        self.quadrature = quadrature
        self.memory_limit = memory_limit
        self._tails: dict[str, nn.Sequential | None] = {}
        self._metrics: dict[str, LinearMappingNumber] = {}

    def bind(self, view: ModelView) -> None:
        """Choose the sites and find what comes after each."""
        for name in ("num_samples", "repeats", "memory_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_interpolation < 3:
            raise ValueError(f"`num_interpolation` must be at least 3, got {self.num_interpolation}.")
        if self.quadrature is not None and self.quadrature < 1:
            raise ValueError(f"`quadrature` must be at least 1, or None, got {self.quadrature}.")
        self._check_position(view)
        sites = self._default_sites(view) if self.layers is None else view.select_sites(self.layers)
        if self.layers is None:
            # What a layer turns out to be depends on the weights, which are others in a run that is resumed.
            sites = [site for site in self.resumed_own_state.get("sites", ()) if site in view.sites] or sites
        available = len(view.require_samples("train"))
        if self.repeats > 1 and self.repeats * self.num_samples > available:
            raise ValueError(
                f"`repeats` x `num_samples` is {self.repeats * self.num_samples}, more than the probe's {available} samples."
            )
        view.request(sites)
        self._tails = {site: tail_after(view, site) for site in sites}
        settings = {
            "num_interpolation": self.num_interpolation,
            "quadrature": self.quadrature,
            "memory_limit": self.memory_limit,
        }
        self._metrics = self.metrics_by_name(LinearMappingNumber, sites, **settings)

    def _check_position(self, view: ModelView) -> None:
        if self.position is None:
            return
        snapshot = Snapshot(view, step=-1)
        shape = snapshot.forward(inputs=snapshot.batch("train").first(2).inputs).logits.shape
        if len(shape) < 3 or not -shape[1] <= self.position < shape[1]:
            raise ValueError(
                f"`position` {self.position} is none of those that outputs of shape {tuple(shape)} have, (n, T, C)."
            )

    def _default_sites(self, view: ModelView) -> list[str]:
        candidates = dict.fromkeys([*view.hidden_activations[:1], *view.sites])
        first_cut: str | None = None
        for site in candidates:
            # One at a time: each look costs forward passes, and the first usually does.
            if is_cut(view, site):
                first_cut = first_cut or site
                if not is_affine_after(view, site):
                    return [site]
        if first_cut is None:
            raise ValueError("`layers`: no place was found through which all paths to the output pass; name one.")
        return [first_cut]

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """The number of each layer; pairs are split over ranks."""
        values: dict[str, float | Tensor] = {}
        for site in self._metrics:
            numbers = torch.stack([self._number(snapshot, site, subset) for subset in range(self.repeats)])
            values[f"lmn/{site}"] = numbers.mean()
            if self.repeats > 1:
                values[f"lmn_standard_error/{site}"] = numbers.std() / self.repeats**0.5
        return values

    def _number(self, snapshot: Snapshot, site: str, subset: int) -> Tensor:
        points = snapshot.activations(site)[subset * self.num_samples : (subset + 1) * self.num_samples]
        tail = self._tails[site]
        # A tail is run by itself, so that it must be kept from leaving traces; a whole pass of the snapshot does that anyway.
        context = observing(snapshot.view.model) if tail is not None else nullcontext()
        metric, ranks = self._metrics[site], snapshot.ranks
        with context, metric.measuring(self._at_position(tail or substituted(snapshot, site))):
            metric.reset()
            metric.update(points)
            return metric.compute_share(ranks.rank, ranks.world_size, ranks.all_reduce)

    def _at_position(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        position = self.position
        return function if position is None else lambda rows: function(rows)[:, position]

    def own_state(self) -> dict[str, Any]:
        """The chosen sites."""
        return {"sites": list(self._metrics)}

    def figures(self) -> Mapping[str, Figure]:
        """The last connectivity matrix of each layer."""
        return {
            f"lmn_connectivity/{site}": _connectivity_figure(metric.connectivity, site)
            for site, metric in self._metrics.items()
            if metric.connectivity is not None
        }


# The smallest share of the eigenvalues' sum that the figure shows.
_SMALLEST = 1e-6


def _connectivity_figure(connectivity: Tensor, site: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    matrix = connectivity.cpu()
    order = order_by_cluster(matrix)
    # Margins by hand: a layout engine draws everything twice, and drawing is what a figure costs.
    figure = Figure(figsize=(8, 3.6))
    margins = {"left": 0.08, "right": 0.98, "bottom": 0.14, "top": 0.9, "wspace": 0.36}
    image_axes, spectrum_axes = figure.subplots(1, 2, width_ratios=[1, 1.1], gridspec_kw=margins)
    image = image_axes.imshow(matrix[order][:, order].numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    image_axes.set(xlabel="sample", ylabel="sample, by cluster")
    # A height of its own, or the title is moved about until it fits, and all ticks are measured for that.
    image_axes.set_title(f"Linear connectivity from {site}", y=1.02)
    # Plain text, as formulas take long to set.
    figure.colorbar(image, ax=image_axes, label="r² along the segment", shrink=0.85)
    if matrix.isfinite().all():
        eigenvalues = torch.linalg.eigvalsh(matrix).abs().sort(descending=True).values
        shares = eigenvalues / eigenvalues.sum()
        spectrum_axes.plot(range(1, len(shares) + 1), shares.clamp(min=_SMALLEST).numpy(), marker=".", linewidth=1)
        number = float(linear_mapping_number(matrix))
        spectrum_axes.axvline(number, color="#D55E00", linestyle="--", label=f"linear mapping number {number:.2f}")
        spectrum_axes.legend(frameon=False, fontsize=8, loc="lower left")
    spectrum_axes.set(xlabel="rank", ylabel="share of the sum", xscale="log", yscale="log")
    spectrum_axes.set_title(f"Eigenvalues, {len(matrix)} samples", y=1.02)
    ranks = [10**k for k in range(len(str(len(matrix))))]
    spectrum_axes.xaxis.set_major_locator(FixedLocator(ranks))
    spectrum_axes.yaxis.set_major_locator(FixedLocator([10.0**-k for k in range(7)]))
    for axis in (spectrum_axes.xaxis, spectrum_axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    return figure
