"""Which samples are looked at, how a batch splits into inputs and targets, how the model is called, what its loss is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from grok_callbacks._drawing import EMPTY, Drawing, default_size, draw
from grok_callbacks._isolation import isolated_rng

__all__ = ["IGNORE_INDEX", "SPLITS", "Batch", "Probe", "Split"]

#: The data that a probe is drawn from.
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

#: Targets with this value are left out, as ``torch.nn.functional.cross_entropy`` does.
IGNORE_INDEX = -100

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Batch:
    """Samples as the model takes them, and what it should answer (``None`` if unlabelled)."""

    inputs: Any
    targets: Any = None
    #: How many samples were asked for when these were taken, if anybody did; there are fewer if the data hold no more.
    asked: int | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """A copy on ``device``, floating inputs in ``dtype``; integers keep theirs."""

        def move(value: Any) -> Any:
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        def convert(value: Any) -> Any:
            value = move(value)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating and dtype is not None else value

        return Batch(tree_map(convert, self.inputs), tree_map(move, self.targets), self.asked)

    def __len__(self) -> int:
        leaves = [leaf for leaf in tree_flatten(self.inputs)[0] if isinstance(leaf, Tensor) and leaf.ndim > 0]
        if not leaves:
            raise ValueError("The probe's inputs hold no tensor with a sample dimension; set `unpack` of the Probe.")
        return len(leaves[0])

    def first(self, size: int) -> Batch:
        """The first ``size`` samples."""
        total = len(self)

        def head(value: Any) -> Any:
            sized = isinstance(value, Tensor) and value.ndim > 0 and len(value) == total
            return value[:size] if sized else value

        return Batch(tree_map(head, self.inputs), tree_map(head, self.targets), self.asked)


# A pure dataclass could not be named by ``class_path`` in a LightningCLI's YAML, so it has a base.
@dataclass(frozen=True, eq=False, repr=False)
class Probe(Hashable):
    """A fixed set of samples that a run is watched through.

    Inside a Trainer the samples come from its own loaders. Iterating one would disturb its workers and its shuffling, so a
    shallow copy of its map-style dataset is indexed instead, at the indices that its sampler comes to; where the same batches
    come each time and a limit, such as ``overfit_batches``, leaves some out, at theirs alone. Of iterable datasets, and of
    loaders other than torch's, which may change batches on their way, the first batches are kept as they pass by. Rank 0's
    samples are used on all ranks.

    A batch is understood if it is ``(inputs, targets)``, ``(inputs,)``, a tensor of inputs, or a mapping with the targets under
    ``labels``, ``label``, ``targets``, ``target`` or ``y`` and the inputs under the other keys; one other key is passed to the
    model by position, several by the names that its ``forward`` takes. Labels that repeat ``input_ids`` wherever they are not
    ``-100`` are those of a causal language model and are moved one position to the left. Logits are ``(n, C)``, or per position
    ``(n, T, C)`` or ``(n, C, ...)``, flattened to one row a position; positions whose target is ``-100`` are dropped.

    Args:
        size: Samples of each split; all there are if the data are fewer. By default 256, and no more than 16 of the loader's
            batches hold: the probe goes through the model in one pass.
        seed: Chooses the samples.
        train: Samples to use instead of the Trainer's training data: a map-style dataset, a ``DataLoader`` over one, or one
            batch. Required outside a Trainer by monitors that look at data.
        validation: The same for validation.
        unpack: ``unpack(batch) -> (inputs, targets)`` for batches of another form.
        forward: ``forward(model, inputs) -> logits`` if the model is not called as ``model(inputs)``.
        loss: ``loss(logits, targets) -> scalar``, averaged over samples. By default cross-entropy for integer targets
            (of a single logit: binary) and mean squared error otherwise.

    Raises:
        ValueError: If ``size`` is not a whole number of at least 1, ``seed`` no whole number, or one of the others no function.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(100, 4), torch.randint(3, (100,)))
        >>> batch = Probe(size=10, train=data).sample("train")
        >>> batch.inputs.shape, batch.targets.shape
        (torch.Size([10, 4]), torch.Size([10]))
    """

    size: int | None = None
    seed: int = 0
    train: Any = None
    validation: Any = None
    unpack: Callable[[Any], tuple[Any, Any]] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"`size` must be a whole number of at least 1, got {self.size!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"`seed` must be a whole number, got {self.seed!r}.")
        for name in ("unpack", "forward", "loss"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"`{name}` must be a function, got {getattr(self, name)!r}.")

    def __repr__(self) -> str:
        size = [] if self.size is None else [f"size={self.size}"]
        given = [
            f"{name}=..." for name in ("train", "validation", "unpack", "forward", "loss") if getattr(self, name) is not None
        ]
        return f"Probe({', '.join([*size, f'seed={self.seed}', *given])})"

    def _key(self) -> tuple[Any, ...]:
        return (self.size, self.seed, id(self.train), id(self.validation), self.unpack, self.forward, self.loss)

    def __eq__(self, other: object) -> bool:
        """Probes with the same settings are one probe: their monitors share a forward pass."""
        return isinstance(other, Probe) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def sample(self, split: Split, source: Any = None) -> Batch | None:
        """The probe's samples of one split.

        Args:
            split: Which of the probe's own sources to draw from if it has one.
            source: The Trainer's loader of that split, drawn from otherwise.

        Returns:
            The samples, or ``None`` where there is no source or it can't be indexed (an iterable dataset).

        Raises:
            ValueError: If the data are empty or a batch is of no form that the probe understands.
        """
        own = getattr(self, split)
        source = own if own is not None else source
        if source is None:
            return None
        drawing = self.draw(source)
        if drawing is None and own is not None:
            raise ValueError(f"`{split}` of the Probe can only be iterated; give a map-style dataset, a DataLoader or a batch.")
        return None if drawing is None else self.join(*drawing)

    def draw(self, source: Any, most_batches: float = math.inf) -> Drawing | None:
        """Raw batches with at least as many samples as are asked for, and that number.

        Args:
            source: A dataset, a loader or a batch.
            most_batches: How many batches of the loader are used before it begins again.

        Returns:
            The batches, or ``None`` if the source can only be iterated.
        """
        # Augmentations draw random numbers. The run must not notice, and a resumed run must get the same samples.
        with torch.inference_mode(False), torch.no_grad():
            return draw(source, self.size, self.seed, most_batches)

    def size_by(self, batch_size: float) -> int:
        """How many samples are asked for of a loader that makes batches of this size."""
        return default_size(batch_size) if self.size is None else self.size

    def join(self, batches: Sequence[Any], size: int | None = None, samples: Batch | None = None) -> Batch:
        """One detached batch of at most ``size`` samples on the CPU.

        Args:
            batches: Raw batches.
            size: How many samples are asked for; by default the probe's own size, or 256.
            samples: Samples to put before theirs.

        Raises:
            ValueError: If a batch is of no form that the probe understands, or the batches don't fit together.
        """
        size = self.size_by(math.inf) if size is None else size
        # Tensors made in inference mode could not be used for gradients later.
        with isolated_rng(seed=self.seed), torch.inference_mode(False), torch.no_grad():
            unpacked = [self.unpack_batch(batch) for batch in batches]
            joined = _concatenated([*([samples] if samples is not None else []), *unpacked])
            if len(joined) == 0:
                raise ValueError(EMPTY)
            first = joined.first(size)
            # Not a piece of a larger tensor, all of which would be kept in memory and in checkpoints.
            return Batch(_compact(first.inputs), _compact(first.targets), asked=size)

    def unpack_batch(self, batch: Any) -> Batch:
        """Split a raw batch into inputs and targets."""
        if self.unpack is not None:
            inputs, targets = self.unpack(batch)
            return Batch(inputs, targets)
        if isinstance(batch, Tensor):
            return Batch(batch)
        if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
            return Batch(*batch)
        if isinstance(batch, Mapping):
            return _unpack_mapping(batch)
        description = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f"Can't tell inputs from targets in a batch that is a {description}. "
            "Set `unpack` of the Probe: a function (batch) -> (inputs, targets)."
        )

    def call(self, model: nn.Module, inputs: Any) -> Tensor:
        """The model's logits as it returns them."""
        if self.forward is not None:
            output = self.forward(model, inputs)
        elif isinstance(inputs, Mapping):
            output = model(**_accepted(model, inputs))
        else:
            output = model(inputs)
        return _logits_of(output)

    def align(self, logits: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """Logits with one row a prediction, and their targets: positions flattened, ignored ones dropped.

        Args:
            logits: ``(n, C)``, ``(n, T, C)``, ``(n, C, ...)``, or of the targets' own shape.
            targets: Class indices without the class dimension, floating targets of the logits' shape, or ``None``.

        Returns:
            Logits ``(m, C)`` and targets ``(m,)`` or ``(m, C)``.
        """
        if not isinstance(targets, Tensor):
            return (logits.flatten(0, -2) if logits.ndim > 1 else logits), targets
        if targets.is_floating_point():
            if targets.shape == logits.shape:
                return (logits, targets) if logits.ndim < 3 else (logits.flatten(0, -2), targets.flatten(0, -2))
            if targets.numel() == logits.numel():
                return logits.reshape(targets.shape), targets
        elif targets.shape == logits.shape[:-1]:
            logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
            kept = targets != IGNORE_INDEX
            return (logits, targets) if bool(kept.all()) else (logits[kept], targets[kept])
        elif logits.ndim > 2 and targets.shape == (logits.shape[0], *logits.shape[2:]):
            return self.align(logits.movedim(1, -1), targets)
        raise ValueError(
            f"Outputs of shape {tuple(logits.shape)} don't fit {targets.dtype} targets of shape {tuple(targets.shape)}. "
            "Set `forward` (model, inputs) -> logits or `unpack` (batch) -> (inputs, targets) of the Probe."
        )

    def check_classes(self, targets: Tensor, width: int) -> None:
        """Refuse targets that can't be classes of a model that returns ``width`` numbers, unless there is a loss for them.

        Raises:
            ValueError: If one is negative, other than ``-100``, or too large.
        """
        if self.loss is not None or targets.is_floating_point() or width < 2:
            return
        classes = targets[targets != IGNORE_INDEX]
        if classes.numel() and not bool(((classes >= 0) & (classes < width)).all()):
            raise ValueError(
                f"Targets from {classes.min()} to {classes.max()} can't be classes where the model returns {width} numbers, "
                "which may be no logits, but an embedding. Set `forward` of the Probe, (model, inputs) -> logits, or `loss`, "
                "(logits, targets) -> scalar."
            )

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of aligned logits as a float64 scalar."""
        if targets is None:
            raise ValueError("The probe's samples have no targets; set `unpack` of the Probe.")
        if self.loss is not None:
            return self.loss(logits, targets)
        if targets.is_floating_point():
            return F.mse_loss(logits.double(), targets.double())
        if logits.ndim < 2 or logits.shape[-1] < 2:
            return _binary_loss(logits, targets)
        return F.cross_entropy(logits.double(), targets.long())


def _binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of one logit that says yes or no."""
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(
            "One output and integer targets other than 0 and 1: set `loss` of the Probe, (logits, targets) -> scalar."
        )
    return F.binary_cross_entropy_with_logits(logits.double().reshape(targets.shape), targets.double())


def _concatenated(parts: Sequence[Batch]) -> Batch:
    def concatenate(*values: Any) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        # A clone: the run may go on to write into the tensors that it was given.
        return torch.cat([value.detach().cpu() for value in values]) if values[0].ndim else values[0].detach().cpu().clone()

    try:
        return Batch(
            tree_map(concatenate, parts[0].inputs, *(part.inputs for part in parts[1:])),
            tree_map(concatenate, parts[0].targets, *(part.targets for part in parts[1:])),
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"Batches of different shapes don't make one probe: {error} Set `train` or `validation` of the Probe to one batch, "
            "or `unpack`, a function (batch) -> (inputs, targets), to pad them."
        ) from error


def _compact(values: Any) -> Any:
    def compact(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value

    return tree_map(compact, values)


def _unpack_mapping(batch: Mapping[str, Any]) -> Batch:
    named = [key for key in _TARGET_KEYS if key in batch]
    if len(named) != 1:
        raise ValueError(
            f"A batch with the keys {sorted(map(str, batch))} has {len(named)} of the target keys {_TARGET_KEYS}. "
            "Set `unpack` of the Probe: a function (batch) -> (inputs, targets)."
        )
    targets = batch[named[0]]
    inputs = {key: value for key, value in batch.items() if key != named[0]}
    if not inputs:
        raise ValueError(f"A batch with the key {named[0]!r} alone has no inputs; set `unpack` of the Probe.")
    if "input_ids" in inputs and _repeats(inputs["input_ids"], targets):
        targets = F.pad(targets[..., 1:], (0, 1), value=IGNORE_INDEX)
    return Batch(next(iter(inputs.values())) if len(inputs) == 1 else inputs, targets)


def _repeats(tokens: Any, labels: Any) -> bool:
    """Whether labels are the tokens themselves, as for models that shift them on their own."""
    if not (isinstance(tokens, Tensor) and isinstance(labels, Tensor) and tokens.shape == labels.shape and tokens.ndim > 1):
        return False
    return bool(((tokens == labels) | (labels == IGNORE_INDEX)).all())


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    accepted = {key: value for key, value in inputs.items() if key in parameters}
    if not accepted:
        raise ValueError(
            f"The model's forward takes {list(parameters)}, none of the batch's {list(inputs)}. "
            "Set `forward` of the Probe: a function (model, inputs) -> logits."
        )
    return accepted


def _logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, or ``logits`` as an attribute or a key."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    if not isinstance(output, Tensor):
        raise ValueError(
            f"The model returned a {type(output).__name__}, not a tensor nor anything with `logits`. "
            "Set `forward` of the Probe: a function (model, inputs) -> logits."
        )
    return output
