"""What a mixin is: an object with settings, and the moments of a training step at which it may act."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.selection import clean_name, select

__all__ = ["Mixin", "chosen_parameters", "explained", "finite", "no_autocast", "whole", "whole_number"]


class Mixin:
    """A regulariser or perturbation of training, with its settings; :func:`with_mixins` grafts it onto a module.

    One training step goes through the moments below, each for all mixins before the next. So the order in which mixins were
    given does not matter, and each sees the same whatever the others do:

    1. :meth:`weight_penalty`: penalties of the weights themselves, at the clean weights;
    2. :meth:`around_forward`: what holds during all forward passes of the step (noisy weights);
    3. :meth:`around_step`: what holds during the module's own ``training_step`` alone (noisy inputs);
    4. :meth:`step_penalty`: penalties that take forward passes of their own, inside 2 but outside 3;
    5. :meth:`around_backward`: what holds during the backward pass.

    Subclasses set :attr:`kind`, and override what they need.
    """

    #: Name in logged keys and checkpoints.
    kind: ClassVar[str]
    #: Whether it needs Lightning to call backward and step: under manual optimisation it is refused.
    automatic_only: ClassVar[bool] = True
    #: Whether it reads or writes weights, which FSDP1 and DeepSpeed hide in flat shards.
    touches_weights: ClassVar[bool] = True
    #: ``kind``, numbered from the second of a kind on; set by the graft.
    name: str = ""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_" and name != "name")
        return f"{type(self).__name__}({settings})"

    @property
    def active(self) -> bool:
        """Whether it does anything: false where its setting is zero, and training is then the plain one bit for bit."""
        return True

    def check(self, module: nn.Module) -> None:
        """Raise ``ValueError`` if the settings don't fit the module. Called when fitting starts."""

    def weight_penalty(self, module: nn.Module) -> Tensor | None:
        """A differentiable scalar of the clean weights to be added to the loss, or ``None``."""
        return None

    @contextmanager
    def around_forward(self, module: nn.Module) -> Iterator[None]:
        """Held during all forward passes of a step."""
        yield

    @contextmanager
    def around_step(self, module: nn.Module, batch: Any) -> Iterator[Any]:
        """Held during the module's ``training_step``, which is given the batch yielded."""
        yield batch

    def step_penalty(self, module: nn.Module, batch: Any) -> Tensor | None:
        """A differentiable scalar of the unperturbed batch to be added to the loss, or ``None``."""
        return None

    def attach(self, loss: Tensor) -> None:
        """Look at the loss before it is handed to Lightning."""

    @contextmanager
    def around_backward(self, module: nn.Module) -> Iterator[None]:
        """Held during the backward pass."""
        yield

    def configure_optimizers(self, module: nn.Module, configured: Any) -> Any:
        """What the module's ``configure_optimizers`` returned, or something else in its place."""
        return configured

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What a resumed run needs, as plain Python values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""

    def log(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Log a scalar of this step as ``grok/{name}`` where the module is in a position to log."""
        trainer = getattr(module, "_trainer", None)
        in_loop = trainer is not None and not trainer.barebones and getattr(module, "_current_fx_name", None) is not None
        if in_loop or getattr(module, "_fabric", None) is not None:
            # A step's value is not averaged, but a `training_step` that takes an iterator must give a batch size.
            module.log(f"grok/{name}", value.detach(), batch_size=1)  # type: ignore[operator]


@contextmanager
def explained(mixin: Mixin) -> Iterator[None]:
    """Make a ``ValueError`` of the mixin's own one that names the mixin, of the class that both Lightnings know."""
    try:
        yield
    except ValueError as error:
        # What a probe would have as a setting, a mixin has itself.
        message = str(error).replace(" of the Probe", "")
        raise MisconfigurationException(f"{type(mixin).__name__}: {message}") from error


def finite(name: str, value: float, *, minimum: float = -math.inf) -> float:
    """``value`` if it is a finite number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < minimum:
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"`{name}` must be a finite number{bound}, got {value!r}.")
    return value


def whole_number(state: Mapping[str, Any], name: str) -> int:
    """A saved count."""
    value = state[name]
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name!r} is {value!r}")
    return value


def chosen_parameters(
    module: nn.Module, patterns: str | Sequence[str] | None, *, matrices: bool = False, frozen: bool = False
) -> dict[str, nn.Parameter]:
    """The floating-point parameters that match ``patterns``, by clean name; tied ones once.

    Args:
        module: Where to look.
        patterns: Globs, ``!`` taking away; ``None`` means all.
        matrices: Only those of two dimensions and more.
        frozen: Those that don't require gradients too. (What is frozen may change during a run.)

    Raises:
        ValueError: If a pattern matches nothing, or nothing is left.
    """
    parameters = {
        clean_name(name): parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and (parameter.ndim > 1 or not matrices)
    }
    globs = "*" if patterns is None else patterns if isinstance(patterns, str) else tuple(patterns)
    names = _select(tuple(parameters), globs)
    return {name: parameters[name] for name in names if frozen or parameters[name].requires_grad}


@functools.lru_cache(maxsize=256)
def _select(names: tuple[str, ...], globs: str | tuple[str, ...]) -> list[str]:
    return select(names, globs, "parameters")


def whole(parameter: Tensor) -> Tensor:
    """A parameter itself, or gathered from all ranks, differentiably, if it is sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Penalties are computed in float32 at least, whatever the precision of the run."""
    device_type = tensor.device.type
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type if available else "cpu", enabled=False)
