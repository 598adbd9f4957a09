"""How much the outputs lean on the details of one layer: prune a little of it at random and look."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grok_callbacks.functional._common import to_double

DEFAULT_MEMORY_LIMIT = 256 * 2**20
"""Bytes that one batched pass over several masks may take."""

_DIVERGENCE_ELEMENTS = 2**17
"""Logits whose divergence is taken at a time."""


def circuit_complexity(logits: Tensor, pruned_logits: Tensor) -> Tensor:
    r"""Approximate local circuit complexity: how far pruning a little of one layer moves the predictions.

    .. math:: \frac{1}{D} \sum_{i=1}^{D} \mathrm{KL}\big(\mathrm{softmax}(y_i) \,\|\, \mathrm{softmax}(y'_i)\big)

    where :math:`y_i` are the logits of sample :math:`i` and :math:`y'_i` those after a random share of the layer's
    weights was set to zero. The paper's sum over samples is this mean times :math:`D`. Draw masks with
    :func:`pruning_masks` and evaluate them with :func:`pruned_logits`; report the mean and the standard deviation over
    the repeats, for one mask alone is noisy.

    Args:
        logits: ``(n, C)`` of the intact model. A logit of minus infinity is a class of probability zero.
        pruned_logits: ``(n, C)`` of the pruned model, or ``(R, n, C)`` for R masks.

    Returns:
        Nats, at least 0: a scalar, or ``(R,)`` if ``pruned_logits`` has a leading dimension. Infinite where the pruned
        model rules out a class that the intact one allows; NaN where a logit is NaN or plus infinity.

    Raises:
        ValueError: If ``logits`` is not a non-empty ``(n, C)``, ``pruned_logits`` does not match it, or one is complex.

    Cost: two softmaxes per mask, in float64, one mask at a time.

    Source: Golechha 2024, "Progress Measures for Grokking on Real-world Tasks", arXiv 2405.12755, approximate local
    circuit complexity. Bernoulli masks and their repetition are ours.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> circuit_complexity(logits, torch.stack([logits, logits.flip(1)]))
        tensor([0.0000, 0.9927], dtype=torch.float64)
    """
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits must have the shape (n, C) and not be empty, got {tuple(logits.shape)}.")
    if pruned_logits.ndim not in (2, 3) or pruned_logits.shape[-2:] != logits.shape or pruned_logits.numel() == 0:
        shape = tuple(logits.shape)
        raise ValueError(f"pruned_logits must have the shape {shape} or (R, *{shape}), got {tuple(pruned_logits.shape)}.")
    if logits.is_complex() or pruned_logits.is_complex():
        raise ValueError("logits and pruned_logits must be real, got complex ones.")
    log_p = torch.log_softmax(to_double(logits), -1)
    if pruned_logits.ndim == 2:
        return _divergence(log_p, pruned_logits)
    # Few masks at a time: float64 copies of all repeats at once would take several times the logits' own memory.
    at_once = max(1, _DIVERGENCE_ELEMENTS // logits.numel())
    return torch.cat([_divergence(log_p, few) for few in torch.split(pruned_logits, at_once)])


def pruning_masks(
    shape: Sequence[int], fraction: float = 0.1, repeats: int = 5, seed: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Random masks of the weights to prune, each weight on its own with probability ``fraction``.

    They depend on nothing but the arguments: not on the global random state (which they leave alone), nor on the
    device. With the same seed, the first masks do not change when ``repeats`` grows, and a weight pruned at one
    fraction is pruned at every larger one.

    Args:
        shape: Shape of the weight.
        fraction: Probability of pruning a weight, in [0, 1].
        repeats: Number of masks, R.
        seed: Seed of the masks.
        device: Where the masks are wanted; they are drawn on the CPU.

    Returns:
        Boolean ``(R, *shape)``, true where a weight is to be set to zero.

    Raises:
        ValueError: If ``fraction`` is outside [0, 1] or ``repeats`` is less than 1.

    Example:
        >>> masks = pruning_masks((200, 200), repeats=3)
        >>> masks.shape, round(masks.double().mean().item(), 2)
        (torch.Size([3, 200, 200]), 0.1)
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(tuple(shape), generator=generator) < fraction for _ in range(repeats)]
    return torch.stack(masks).to(device)


def pruned_logits(
    model_call: Callable[[dict[str, Tensor]], Tensor],
    name: str,
    weight: Tensor,
    masks: Tensor,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    *,
    needed: int | None = None,
) -> Tensor:
    """Logits of a model under each of several pruning masks, in as few passes as memory allows.

    Pruned copies of the weight are *substituted*: nothing is written to the model, whose weights stay bit-identical, tied
    ones too. The first mask runs alone and shows how much memory a pass takes; of the others, as many as fit the limit run
    together (:func:`torch.vmap`), so that what comes before the pruned layer is computed once for all of them. A model that
    cannot be batched so (recurrent layers, control flow that depends on data, writing into buffers) runs once per mask
    instead. Both ways give the same numbers up to rounding of the forward pass, and which one is taken depends on the
    model and the arguments alone.

    Args:
        model_call: Runs the model on fixed inputs with the given weights in place of its own, and returns its logits;
            for instance ``lambda weights: torch.func.functional_call(model, weights, (inputs,))``.
        name: Name of the weight to prune.
        weight: Its value.
        masks: Boolean ``(R, *weight.shape)``, true where the weight is set to zero.
        memory_limit: Bytes that a batched pass may take. Its needs are overestimated: as many times all that the first
            pass allocates, what it frees again included, as there are masks in it. One mask at a time is always run,
            whatever it needs.
        needed: What a pass over one mask allocates, where that is known. The first mask then runs with the others.

    Returns:
        ``(R, *logits.shape)`` in the dtype of the logits.

    Raises:
        ValueError: If ``masks`` is not boolean, is empty, or does not match ``weight``; or if ``memory_limit`` is not
            positive.

    Cost: two forward passes if memory allows, the second on R - 1 masks with everything before the pruned layer shared;
    else more, up to one per mask. One more for a model that keeps activations as attributes.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> inputs = torch.randn(4, 3)
        >>> call = lambda weights: torch.func.functional_call(model, weights, (inputs,))
        >>> masks = pruning_masks(model.weight.shape, repeats=5)
        >>> pruned_logits(call, "weight", model.weight.detach(), masks).shape
        torch.Size([5, 4, 2])
    """
    if masks.dtype != torch.bool or masks.ndim == 0 or masks.shape[1:] != weight.shape or len(masks) == 0:
        raise ValueError(
            f"masks must be boolean with the shape (R, *{tuple(weight.shape)}), got {masks.dtype} {tuple(masks.shape)}."
        )
    if memory_limit <= 0:
        raise ValueError(f"memory_limit must be positive, got {memory_limit}.")

    def prune(mask: Tensor) -> Tensor:
        return model_call({name: weight.masked_fill(mask, 0)})

    with torch.no_grad():
        results, rest = [], masks
        if needed is None:
            first, needed = _measured(prune, masks[0])
            results, rest = [first[None]], masks[1:]
        at_once = memory_limit // needed
        batched = _in_batches(prune, rest, at_once) if min(at_once, len(rest)) > 1 else None
        if batched is None:
            batched = [prune(mask)[None] for mask in rest]
        return torch.cat([*results, *batched])


def bytes_of_pass(model_call: Callable[[dict[str, Tensor]], Tensor], name: str, weight: Tensor) -> int:
    """Bytes that a pass with one weight put in place allocates, what it frees again included.

    Args:
        model_call: As in :func:`pruned_logits`.
        name: Name of the weight.
        weight: Its value.
    """
    nothing = weight.new_zeros((), dtype=torch.bool)
    with torch.no_grad():
        return _measured(lambda mask: model_call({name: weight.masked_fill(mask, 0)}), nothing)[1]


def _divergence(log_p: Tensor, pruned: Tensor) -> Tensor:
    """Mean KL of each mask, from the intact model's log-probabilities and the pruned one's logits."""
    p = log_p.exp()
    terms = p * (log_p - torch.log_softmax(to_double(pruned), -1))
    # 0 ln(0 / q) = 0 whatever q. Not `p > 0`: a NaN must stay one.
    terms = torch.where(p == 0, torch.zeros_like(p), terms)
    return terms.sum(-1).mean(-1).clamp(min=0)


def _measured(prune: Callable[[Tensor], Tensor], mask: Tensor) -> tuple[Tensor, int]:
    """Result of ``prune`` on one mask, and how many bytes it allocated."""
    try:
        with _AllocatedBytes() as allocated:
            return prune(mask), max(1, allocated.total)
    except Exception:
        # Some operations refuse to be watched, flex attention for one. An error of the model's own comes again here.
        return prune(mask), sys.maxsize


def _in_batches(prune: Callable[[Tensor], Tensor], masks: Tensor, at_once: int) -> list[Tensor] | None:
    """Results of ``prune`` on chunks of masks, or None if the model can't be batched over its weights."""
    chunks = [masks[start : start + at_once] for start in range(0, len(masks), at_once)]
    with warnings.catch_warnings(), _Made() as made:
        # Operations without a batching rule of their own are looped over inside vmap: no news for the user.
        warnings.filterwarnings("ignore", message=".*batching rule.*")
        try:
            results = [torch.vmap(prune)(chunk) for chunk in chunks]
        except Exception:
            # The model has just run on the first mask: this is about batching, or the memory that it takes.
            return None
    if made.alive():
        # The model keeps an activation, which can be neither copied nor pickled outside vmap: overwrite it.
        prune(masks[0])
    return results


class _AllocatedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that the operations in its context make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class _Made(TorchFunctionMode):
    """Remembers, without keeping them, the tensors that calls in its context return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def alive(self) -> bool:
        """Whether anything still holds one of them."""
        return any(tensor() is not None for tensor in self.tensors)
