"""Training on jittered inputs, the more so the worse the training accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from grok_callbacks.mixins._base import Mixin, explained, finite, whole_number
from grok_callbacks.mixins._random import generator
from grok_callbacks.probe import Probe
from grok_callbacks.selection import clean_name, select

__all__ = ["InputNoiseMixin"]


class InputNoiseMixin(Mixin):
    r"""Adds Gaussian noise of standard deviation :math:`\sigma = \max(l_1 (1 - a), l_2)` to what ``training_step`` sees.

    The noise is on the inputs of the batch, or for tokens on the output of the embeddings. :math:`a` is the training accuracy
    so far: 0 before the first step, then by default that of the last batch, measured on the logits that ``training_step``
    itself computed (under the noise of that step), averaged over ranks. Those are the output of the module if ``training_step``
    calls ``self(...)``, otherwise of the last of its children that returned something that fits the targets. Or name a
    metric that the module logs, such as an epoch's ``train_acc``.

    Noise comes from a generator of its own, different on each rank; the program's random numbers are as without. It
    depends on the seed, the rank, and the number of steps before it, which checkpoints keep with the accuracy.

    Works with manual optimisation too.

    Args:
        l1: Scale of the adaptive part. The paper has 0.06 on MNIST and 0.5 on modular addition.
        l2: Least noise. The paper has 0.03 on MNIST and 0.4 on modular addition. With both 0 training is the plain one.
        on: ``"input"`` or ``"embedding"``.
        key: Where the inputs are in a batch that is a mapping (a key) or a sequence (a position). By default the first of a
            sequence, and in a mapping what is neither a target nor made of integers.
        layers: Globs on clean module names for ``on="embedding"``: modules whose output is jittered. By default every
            ``nn.Embedding`` and ``nn.EmbeddingBag``, those of positions too.
        accuracy: Name of a logged metric between 0 and 1 to use as :math:`a` (0 until it is first logged).
        unpack: ``unpack(batch) -> (inputs, targets)`` for measuring the accuracy on batches other than those a
            :class:`~grok_callbacks.probe.Probe` understands.
        seed: Seed of the noise.

    Logged: ``grok/input_noise/sigma``, and ``grok/input_noise/accuracy``, the one it was computed from.

    Cost: one normal number for each input or embedding value; an argmax over the logits; one all-reduce of two numbers under
    distributed training.

    Source: Tan & Huang 2023, "Understanding Grokking Through A Robustness Viewpoint", arXiv 2311.06597. (The scales are as
    others report them; that the accuracy lags by a step is ours.)
    """

    kind = "input_noise"
    automatic_only = False
    touches_weights = False

    def __init__(
        self,
        l1: float,
        l2: float,
        *,
        on: Literal["input", "embedding"] = "input",
        key: str | int | None = None,
        layers: str | Sequence[str] | None = None,
        accuracy: str | None = None,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self.l1 = finite("l1", l1, minimum=0)
        self.l2 = finite("l2", l2, minimum=0)
        if on not in ("input", "embedding"):
            raise ValueError(f'`on` must be "input" or "embedding", got {on!r}.')
        self.on = on
        self.key = key
        self.layers = layers
        self.accuracy = accuracy
        self.unpack = unpack
        self.seed = seed
        self._draws = 0
        self._accuracy: Tensor | float = 0.0
        self._epochs_without: set[int] = set()
        # What each embedding was jittered by in this step, for recomputation under activation checkpointing.
        self._given: dict[nn.Module, list[Tensor]] = {}

    @property
    def active(self) -> bool:
        """False where ``l1`` and ``l2`` are 0."""
        return self.l1 != 0 or self.l2 != 0

    def check(self, module: nn.Module) -> None:
        """Raise ``ValueError`` if there is no embedding to jitter, or it is compiled."""
        if self.on == "embedding":
            self._embeddings(module)

    @contextmanager
    def around_step(self, module: nn.Module, batch: Any) -> Iterator[Any]:
        """Jitter the batch or the embeddings, and watch the logits."""
        sigma = self._sigma(module)
        self.log(module, f"{self.name}/sigma", torch.as_tensor(sigma))
        noise = _Noise(sigma, self.seed, self.name, self._draws, int(getattr(module, "global_rank", 0)))
        self._draws += 1
        measured = self.l1 != 0 and self.accuracy is None
        targets = Probe(unpack=self.unpack).unpack_batch(batch).targets if measured else None
        with ExitStack() as stack:
            logits = stack.enter_context(_watched(module, targets)) if measured else []
            if self.on == "embedding":
                self._given = stack.enter_context(_jittered(self._embeddings(module), noise))
                yield batch
            else:
                yield _with_noise(batch, self.key, noise)
        if measured:
            with explained(self):
                self._measure(module, logits)

    @contextmanager
    def around_backward(self, module: nn.Module) -> Iterator[None]:
        """Give recomputed embeddings the noise that they had."""
        with _replayed(self._given):
            yield
        self._given = {}

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The number of draws and the accuracy so far."""
        if self.active:
            self._read_metric(module)  # An epoch's metric comes after its last step.
        return {"draws": self._draws, "accuracy": float(self._accuracy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the number of draws and the accuracy."""
        self._draws = whole_number(state, "draws")
        self._accuracy = finite("accuracy", state["accuracy"])

    def __getstate__(self) -> dict[str, Any]:
        """Without the noise of a step that is under way."""
        return {**self.__dict__, "_given": {}, "_accuracy": float(self._accuracy)}

    def _sigma(self, module: nn.Module) -> Tensor | float:
        if self.l1 == 0:
            return self.l2
        trainer = getattr(module, "_trainer", None)
        if self.accuracy is not None and trainer is not None and not self._read_metric(module):
            epochs = self._epochs_without
            epochs.add(trainer.current_epoch)
            if len(epochs) > 1:
                logged = sorted(trainer.callback_metrics)
                raise ValueError(f"`accuracy`: {self.accuracy!r} was not logged during an epoch. Logged are {logged}.")
        # A tensor stays on its device: reading it would wait for the step before.
        accuracy = torch.as_tensor(self._accuracy)
        self.log(module, f"{self.name}/accuracy", accuracy)
        return (self.l1 * (1 - accuracy)).clamp(min=self.l2)

    def _read_metric(self, module: nn.Module) -> bool:
        """Take up the named metric, if it has been logged."""
        trainer = getattr(module, "_trainer", None)
        if self.accuracy is None or trainer is None or self.accuracy not in trainer.callback_metrics:
            return False
        value = float(trainer.callback_metrics[self.accuracy])
        if not 0 <= value <= 1:
            raise ValueError(f"`accuracy`: {self.accuracy!r} is {value}, and must be between 0 and 1.")
        self._accuracy = value
        self._epochs_without.clear()
        return True

    def _embeddings(self, module: nn.Module) -> list[nn.Module]:
        names = {
            clean_name(name): child
            for name, child in module.named_modules()
            if self.layers is not None or isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        }
        if not names:
            raise ValueError(
                'there is no nn.Embedding for `on="embedding"`; name the modules whose output is to be jittered in `layers`. '
                f"There are: {', '.join(name for name, _ in module.named_modules() if name)}."
            )
        chosen = [names[name] for name in select(names, "*" if self.layers is None else self.layers, "layers")]
        _refuse_compiled(module, chosen)
        return chosen

    @torch.no_grad()
    def _measure(self, module: nn.Module, logits: list[tuple[Tensor, Tensor]]) -> None:
        if not logits:
            raise ValueError(
                "no logits to measure the accuracy from were seen: `training_step` called neither `self(...)` nor a child "
                "whose output fits the targets. Log a training accuracy and name it in `accuracy`, or set `unpack`."
            )
        outputs, targets = logits[-1]
        correct = (outputs.argmax(-1) == targets).float()
        counts = torch.stack([correct.sum(), torch.full_like(correct.sum(), correct.numel())])
        trainer = getattr(module, "_trainer", None)
        if trainer is not None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        before = torch.as_tensor(self._accuracy, device=counts.device)
        self._accuracy = torch.where(counts[1] > 0, counts[0] / counts[1].clamp(min=1), before)


class _Noise:
    """The noise of one step, drawn from one generator a device in the order of the calls."""

    def __init__(self, sigma: Tensor | float, seed: int, key: str, count: int, rank: int) -> None:
        self._sigma = sigma
        self._source = (seed, key, count, rank)
        self._generators: dict[torch.device, torch.Generator] = {}

    def like(self, tensor: Tensor) -> Tensor:
        if tensor.device not in self._generators:
            self._generators[tensor.device] = generator(tensor.device, *self._source)
        precision = torch.promote_types(tensor.dtype, torch.float32)
        source = self._generators[tensor.device]
        normal = torch.randn(tensor.shape, generator=source, device=tensor.device, dtype=precision)
        sigma = self._sigma.to(normal) if isinstance(self._sigma, Tensor) else self._sigma
        return (sigma * normal).to(tensor.dtype)


def _with_noise(batch: Any, key: str | int | None, noise: _Noise) -> Any:
    """A copy of the batch, of the same type, with noise on its inputs."""

    def jitter(value: Any) -> Any:
        return value + noise.like(value) if _is_floating(value) else value

    if isinstance(batch, Tensor):
        _require_floating(batch, "the batch")
        return jitter(batch)
    key = _input_key(batch) if key is None else key
    try:
        inputs = batch[key]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"`key`: the batch, a {type(batch).__name__}, has no {key!r}.") from error
    _require_floating(inputs, f"the batch's {key!r}")
    jittered = tree_map(jitter, inputs)
    if isinstance(batch, tuple):
        items = [*batch[: int(key)], jittered, *batch[int(key) + 1 :]] if key != -1 else [*batch[:-1], jittered]
        return batch._make(items) if hasattr(batch, "_make") else type(batch)(items)
    changed = batch.copy() if hasattr(batch, "copy") else {**batch}
    changed[key] = jittered
    return changed


def _input_key(batch: Any) -> str | int:
    if isinstance(batch, (tuple, list)) and batch:
        return 0
    if isinstance(batch, Mapping):
        targets = Probe().unpack_batch(batch).targets
        inputs = [key for key, value in batch.items() if value is not targets]
        floating = [key for key in inputs if _is_floating(batch[key])]
        if len(floating) == 1:
            return str(floating[0])
        if not floating:
            _require_floating(tuple(batch[key] for key in inputs), f"the batch's {inputs}")
        raise ValueError(f"several entries of the batch, {floating}, may be the inputs; name one in `key`.")
    raise ValueError(f"can't tell the inputs in a batch that is a {type(batch).__name__}; set `key`.")


def _require_floating(inputs: Any, what: str) -> None:
    leaves = tree_leaves(inputs)
    if not any(_is_floating(leaf) for leaf in leaves):
        found = ", ".join(sorted({str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves}))
        raise ValueError(
            f"{what} holds no floating-point tensor but {found}, which can't be jittered: for tokens set "
            '`on="embedding"`, or convert the inputs to floats.'
        )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _watched(module: nn.Module, targets: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects, during a step, logits that fit the targets, with them: the best last."""
    own: list[tuple[Tensor, Tensor]] = []
    of_children: list[tuple[Tensor, Tensor]] = []
    best: list[tuple[Tensor, Tensor]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hook(caller: nn.Module, _: Any, output: Any) -> None:
        pair = _aligned(output, targets)
        if pair is not None:
            (own if caller is module else of_children).append(pair)

    with ExitStack() as stack:
        for watched in (module, *module.children()):
            stack.callback(watched.register_forward_hook(hook).remove)
        yield best
    best.extend(own or of_children)


def _aligned(output: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Logits and class indices, one row a prediction, if the output fits the targets."""
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not (_is_floating(output) and isinstance(targets, Tensor) and output.ndim > 1):
        return None
    try:
        logits, aligned = Probe().align(output.detach(), targets)
    except ValueError:
        return None
    if logits.ndim < 2 or logits.shape[-1] < 2:
        return None
    return logits, aligned.argmax(-1) if aligned.is_floating_point() else aligned


@contextmanager
def _jittered(modules: list[nn.Module], noise: _Noise) -> Iterator[dict[nn.Module, list[Tensor]]]:
    given: dict[nn.Module, list[Tensor]] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hook(module: nn.Module, _: Any, output: Any) -> Tensor:
        if not _is_floating(output):
            raise ValueError(f"`layers`: the output of a {type(module).__name__} is no floating-point tensor.")
        given.setdefault(module, []).append(noise.like(output))
        jittered: Tensor = output + given[module][-1]
        return jittered

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield given


@contextmanager
def _replayed(given: dict[nn.Module, list[Tensor]]) -> Iterator[None]:
    """Have modules that run again, as activation checkpointing has them in the backward pass, get the same noise."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        if len(given[module]) > 1:
            raise RuntimeError(
                "InputNoiseMixin: an embedding that is called more than once in a step can't be inside an "
                "activation-checkpointed block; take it out of the block."
            )
        return output + given[module][0]

    with ExitStack() as stack:
        for module in given:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _refuse_compiled(module: nn.Module, chosen: list[nn.Module]) -> None:
    """Hooks may not run in compiled code, and noise that is silently missing is worse than none."""
    for name, child in module.named_modules():
        compiled = "_orig_mod" in child._modules or getattr(child, "_compiled_call_impl", None) is not None
        if compiled and any(inner is one for one in chosen for inner in child.modules()):
            raise ValueError(
                f"the embedding is in {clean_name(name) or 'a module'!r}, which is compiled; leave it out of the compiled part."
            )
