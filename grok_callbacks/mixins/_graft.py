"""Grafting: a LightningModule, class or instance, that trains with mixins and is otherwise what it was.

The graft is a subclass of the module's class, made at run time, that overrides a few hooks of Lightning and calls the
module's own inside. It adds no parameter, buffer, submodule nor hyperparameter, so that checkpoints interchange with those
of the plain class; the mixins live in the instance's ``__dict__``. An instance is grafted in place by changing its class.

Classes made at run time can't be imported by name, which is how classes are pickled. So they have a metaclass of their own,
for which :mod:`copyreg` knows the recipe: the plain class and the mixins. Instances then pickle as any do, whatever
``__getstate__`` or ``__reduce__`` the user wrote.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._sharding import reshard
from grok_callbacks.mixins._base import Mixin, explained

__all__ = ["mixins_of", "with_mixins"]

T = TypeVar("T")

_CHECKPOINT_KEY = "grok_callbacks_mixins"
_FLAT_STRATEGIES = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})

_known: weakref.WeakValueDictionary[Any, type[Any]] = weakref.WeakValueDictionary()


def with_mixins(module: T, *mixins: Mixin) -> T:
    """Graft mixins onto a LightningModule, of ``lightning`` or ``pytorch_lightning``, without changing its code.

    State-dict keys and hyperparameters stay those of the original, so checkpoints interchange in both directions (except
    for the optimizer state under :class:`MuonMixin`). The state of the mixins (how much noise was drawn) is kept in the
    checkpoint under a key of its own, which a plain module ignores. The original class is not touched. Pickling, deep
    copies, ``load_from_checkpoint``, ``torch.compile`` before or after grafting, and further subclassing work.

    Mixins compose in any order, several of one kind too; grafting onto a graft adds to it. Each mixin keeps its own
    settings: what is given is copied, and :func:`mixins_of` gives access to the copies. Mixins whose setting is zero leave
    training as it was, bit for bit.

    Mixins that add to the loss or perturb weights need automatic optimisation. ``training_step`` may return a tensor,
    a mapping with ``"loss"``, or ``None``; what is added is scaled with the loss under gradient accumulation, so that
    over an accumulated batch it counts once.

    Args:
        module: A LightningModule class, which stays as it is; or an instance (or what ``torch.compile`` made of it), which is
            changed in place.
        mixins: Configured mixins, such as ``WeightNoiseMixin(1e-2)``.

    Returns:
        For a class, a subclass of it with the same constructor, each instance of which has its own copies of the mixins. For
        an instance, that instance.

    Raises:
        MisconfigurationException: If ``module`` is no LightningModule, or a mixin is none or a class instead of an object.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from grok_callbacks.mixins import SpectralEntropyMixin, WeightNoiseMixin, with_mixins
        >>> class Net(LightningModule):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(width, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.fc(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> net = with_mixins(Net(8), SpectralEntropyMixin(beta=0.1), WeightNoiseMixin(delta=1e-2))
        >>> isinstance(net, Net), list(net.state_dict())
        (True, ['fc.weight', 'fc.bias'])
    """
    if not mixins:
        raise MisconfigurationException("`mixins`: give at least one mixin, such as `WeightNoiseMixin(delta=1e-2)`.")
    for mixin in cast("tuple[object, ...]", mixins):
        if not isinstance(mixin, Mixin):
            hint = f" Did you mean {mixin.__name__}(...)?" if isinstance(mixin, type) else ""
            raise MisconfigurationException(f"`mixins`: {mixin!r} is not a configured mixin.{hint}")
    copies = _copies(mixins)
    target: Any = getattr(module, "_orig_mod", module)
    if not isinstance(target, type):
        _lightning_base(type(target))
        _graft_instance(target, copies)
        return module
    _lightning_base(target)
    base = vars(target).get("_grok_base", target)
    return cast("T", _graft(base, (*_inherited(target), *copies), uuid.uuid4().hex))


def mixins_of(module: nn.Module) -> dict[str, Mixin]:
    """The mixins grafted onto an instance: live objects, under the keys that they log and save by.

    The key is the mixin's kind; the second of a kind has ``/1`` appended, and so on.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from grok_callbacks.mixins import NormPenaltyMixin, mixins_of, with_mixins
        >>> model = with_mixins(BoringModel(), NormPenaltyMixin(0.1), NormPenaltyMixin(-0.1, parameters="*.bias"))
        >>> list(mixins_of(model))
        ['norm', 'norm/1']
    """
    # Instances of a grafted class get theirs when first asked for: overriding ``__init__`` would hide its signature.
    if "_grok_mixins" not in module.__dict__:
        module.__dict__["_grok_mixins"] = _keyed(_copies(_inherited(type(module))))
    return cast("dict[str, Mixin]", module.__dict__["_grok_mixins"])


class _GraftType(type):
    """The class of grafted classes."""


def _graft_instance(module: nn.Module, mixins: Sequence[Mixin]) -> None:
    present = list(mixins_of(module).values())
    module.__dict__["_grok_mixins"] = _keyed((*present, *mixins))
    module.__dict__.pop("_grok_checked", None)
    cls = type(module)
    if "_grok_base" not in vars(cls):
        object.__setattr__(module, "__class__", _graft(cls, _inherited(cls), None))
        # A module compiled as a whole, and then grafted, has its compiled step on the instance, where it would hide ours.
        replaced = module.__dict__.pop("training_step", None)
        if replaced is not None:
            module.__dict__["_grok_training_step"] = replaced


def _inherited(cls: type[Any]) -> tuple[Mixin, ...]:
    return cast("tuple[Mixin, ...]", getattr(cls, "_grok_templates", ()))


def _copies(mixins: Sequence[Mixin]) -> tuple[Mixin, ...]:
    # Shallow: state is numbers, and a callable among the settings may be bound to something large.
    return tuple(copy.copy(mixin) for mixin in mixins)


def _keyed(mixins: Sequence[Mixin]) -> dict[str, Mixin]:
    """Mixins by key, sorted by kind so that sums of penalties do not depend on the order given, not even in the last bit."""
    seen: Counter[str] = Counter()
    for mixin in mixins:
        mixin.name = f"{mixin.kind}/{seen[mixin.kind]}" if seen[mixin.kind] else mixin.kind
        seen[mixin.kind] += 1
    return {mixin.name: mixin for mixin in sorted(mixins, key=lambda mixin: mixin.kind)}


def _lightning_base(cls: type[Any]) -> type[Any]:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        base = getattr(sys.modules.get(name), "LightningModule", None)
        if base is not None and issubclass(cls, base):
            return cast("type[Any]", base)
    raise MisconfigurationException(f"`module` must be a LightningModule, class or instance, got {cls.__name__}.")


def _graft(base: type[Any], templates: tuple[Mixin, ...], token: str | None) -> type[Any]:
    """The grafted subclass of ``base``: one for all grafted instances, or that of one call on a class, which has a token."""
    key = token or base
    if key in _known:
        return _known[key]
    quiet = _quiet()
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_grok_base": base,
        "_grok_templates": templates,
        "_grok_token": token,
    }
    grafted = _metaclass(cast("Hashable", type(base)))(base.__name__, (quiet, base), namespace)
    for name, hook in _hooks(grafted, base).items():
        setattr(grafted, name, hook)
    _known[key] = grafted
    return cast("type[Any]", grafted)


def _quiet() -> type[Any]:
    """A first base that keeps ``__init_subclass__`` of the user's class (a registry, say) from seeing the graft."""

    class Quiet:
        def __init_subclass__(cls, **kwargs: Any) -> None:
            if "_grok_base" not in vars(cls):
                super().__init_subclass__(**kwargs)

    return Quiet


@functools.cache
def _metaclass(meta: Any) -> Any:
    if issubclass(meta, _GraftType):
        return meta  # That of a user's subclass of a graft.
    own: Any = _GraftType if meta is type else type("_GraftType", (_GraftType, meta), {})
    copyreg.pickle(own, _reduce_class)
    return own


def _reduce_class(cls: type[Any]) -> Any:
    if "_grok_base" in vars(cls):
        return _graft, (cls._grok_base, cls._grok_templates, cls._grok_token)
    return cls.__qualname__  # A user's subclass of a graft is imported by name as any class.


def _hooks(grafted: type[Any], base: type[Any]) -> dict[str, Callable[..., Any]]:
    """The overridden hooks. Each acts only in the outermost graft, should the user's class inherit from another one."""
    lightning = _lightning_base(base)

    def outermost(module: nn.Module) -> bool:
        return next(cls for cls in type(module).__mro__ if "_grok_base" in vars(cls)) is grafted

    # Dynamo shall compile the module's own step and leave ours, whose work is not for graphs.
    @functools.wraps(base.training_step)
    @functools.partial(torch.compiler.disable, recursive=False)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self.__dict__.get("_grok_training_step") or super(grafted, self).training_step
        if not outermost(self):
            return inner(*args, **kwargs)
        step = _Step(self, args, kwargs)
        with step:
            step.output = inner(*step.args, **step.kwargs)
        return step.output

    @functools.wraps(base.configure_optimizers)
    def configure_optimizers(self: Any) -> Any:
        configured = super(grafted, self).configure_optimizers()
        for mixin in _active(self) if outermost(self) else ():
            configured = mixin.configure_optimizers(self, configured)
        return configured

    @functools.wraps(base.backward)
    def backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as stack:
            for mixin in _active(self) if outermost(self) else ():
                stack.enter_context(mixin.around_backward(self))
            super(grafted, self).backward(loss, *args, **kwargs)

    @functools.wraps(base.on_fit_start)
    def on_fit_start(self: Any) -> None:
        super(grafted, self).on_fit_start()
        if outermost(self):
            _check(self)

    @functools.wraps(base.on_save_checkpoint)
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        super(grafted, self).on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = {key: mixin.state_dict(self) for key, mixin in mixins_of(self).items()}

    @functools.wraps(base.on_load_checkpoint)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        super(grafted, self).on_load_checkpoint(checkpoint)
        _load(self, checkpoint.get(_CHECKPOINT_KEY, {}))

    hooks: dict[str, Callable[..., Any]] = {
        "backward": backward,
        "on_fit_start": on_fit_start,
        "on_save_checkpoint": on_save_checkpoint,
        "on_load_checkpoint": on_load_checkpoint,
    }
    # Overriding what the user has not written would hide from Lightning that it is missing.
    for hook in (training_step, configure_optimizers):
        if getattr(base, hook.__name__) is not getattr(lightning, hook.__name__):
            hooks[hook.__name__] = hook
    return hooks


def _active(module: nn.Module) -> list[Mixin]:
    return [mixin for mixin in mixins_of(module).values() if mixin.active]


def _load(module: nn.Module, states: Any) -> None:
    if not isinstance(states, Mapping):
        raise MisconfigurationException(f"The checkpoint's {_CHECKPOINT_KEY!r} is no mapping but {type(states).__name__}.")
    for key, mixin in mixins_of(module).items():
        if key not in states:
            continue
        try:
            mixin.load_state_dict(states[key])
        except (TypeError, KeyError, ValueError) as error:
            raise MisconfigurationException(f"The checkpoint's state of the mixin {key!r} is damaged: {error}.") from error


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check(module: Any) -> None:
    trainer = getattr(module, "_trainer", None)
    names = [cls.__name__ for cls in type(getattr(trainer, "strategy", None)).__mro__]
    for mixin in _active(module):
        name = type(mixin).__name__
        if mixin.automatic_only and not module.automatic_optimization:
            raise MisconfigurationException(
                f"{name} can't be used with manual optimisation: set `automatic_optimization = True`, or in your "
                "training step call `.penalty(self)` of a penalty mixin yourself and add it to your loss."
            )
        if mixin.touches_weights and not _FLAT_STRATEGIES.isdisjoint(names):
            raise MisconfigurationException(
                f"{name} can't be used with {names[0]}, which flattens and shards the weights: take DDP, or "
                "`ModelParallelStrategy` (FSDP2)."
            )
        with explained(mixin):
            mixin.check(module)
    module.__dict__["_grok_checked"] = True


class _Step:
    """One training step: what happens before and after the module's own."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._module = module
        self._outer_stack = ExitStack()
        self._inner_stack = ExitStack()
        self.args = tuple(args)
        self.kwargs = kwargs
        self.output: Any = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        self._mixins = _active(self._module)
        if not self._mixins:
            return
        if not self._module.__dict__.get("_grok_checked", False):
            _check(self._module)  # Outside a Trainer there is no start of a fit.
        # After a validation FSDP2 has gathered weights in sight, whose memory it frees during the step.
        reshard(self._module)
        self._penalties = {mixin: mixin.weight_penalty(self._module) for mixin in self._mixins}
        self._batch = batch = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        try:
            for mixin in self._mixins:
                self._outer_stack.enter_context(mixin.around_forward(self._module))
            for mixin in self._mixins:
                with explained(mixin):
                    batch = self._inner_stack.enter_context(mixin.around_step(self._module, batch))
            self._replace_batch(batch)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *error: Any) -> None:
        with self._outer_stack:
            self._inner_stack.__exit__(*error)
            loss = _loss_of(self.output)
            if not self._mixins or error[0] is not None or loss is None:
                return
            for mixin in self._mixins:
                with explained(mixin):
                    penalty = mixin.step_penalty(self._module, self._batch)
                if penalty is not None:
                    self._penalties[mixin] = penalty
        total = loss
        for mixin, penalty in self._penalties.items():
            if penalty is not None:
                mixin.log(self._module, f"penalty/{mixin.name}", penalty)
                total = total + penalty.to(total)
        for mixin in self._mixins:
            mixin.attach(total)
        if total is not loss:
            self.output = {**self.output, "loss": total} if isinstance(self.output, Mapping) else total

    def _replace_batch(self, batch: Any) -> None:
        if batch is self._batch:
            return
        if self.args:
            self.args = (batch, *self.args[1:])
        else:
            self.kwargs = {**self.kwargs, next(iter(self.kwargs)): batch}


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None
