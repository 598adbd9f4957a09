"""A penalty for answers that change when the operands are swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grok_callbacks._isolation import isolated_rng
from grok_callbacks.mixins._base import Mixin, finite, no_autocast
from grok_callbacks.probe import Probe

__all__ = ["CommutativityMixin", "swap_operands"]


def swap_operands(inputs: Any) -> Any:
    """Swap the first two input positions.

    Args:
        inputs: Tokens ``(n, T)`` or ``(n, 2)`` numbers, vectors ``(n, T, d)``, or a tuple or list of operands.

    Returns:
        The same with positions 0 and 1 exchanged.

    Raises:
        ValueError: For anything else, in which positions can't be told.

    Example:
        >>> import torch
        >>> swap_operands(torch.tensor([[1, 2, 9]]))
        tensor([[2, 1, 9]])
    """
    if isinstance(inputs, (tuple, list)) and len(inputs) >= 2:
        return type(inputs)((inputs[1], inputs[0], *inputs[2:]))
    if isinstance(inputs, Tensor) and inputs.ndim in (2, 3) and inputs.shape[1] >= 2:
        # Numbers in a row may be an encoding of anything, one-hot operands side by side for instance.
        encoded = inputs.ndim == 2 and inputs.shape[1] > 2 and (inputs.is_floating_point() or inputs.dtype == torch.bool)
        if not encoded:
            return torch.cat([inputs[:, 1:2], inputs[:, 0:1], inputs[:, 2:]], dim=1)
    found = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(f"Can't tell which positions to swap in inputs that are {found}; set `swap`: inputs -> mirrored inputs.")


class CommutativityMixin(Mixin):
    r"""Adds :math:`w \cdot \operatorname{mean} (f(a, b) - f(b, a))^2` to the loss, over samples and logits.

    Any symmetry that the answers should have will do: ``swap`` says how an input is mirrored. For a task without that symmetry
    the penalty is an obstacle.

    The penalty comes from two forward passes of its own on the batch as it came (without input noise, at the weights of the
    step, noisy or not), with the dropout masks of the training step in both, so that dropout is no asymmetry. They leave
    the program's random numbers and the model's buffers (batch-norm statistics) as they were.

    Args:
        weight: Factor; the paper's is 100. With 0 training is the plain one.
        swap: ``swap(inputs) -> mirrored inputs``; by default the first two input positions are swapped, see
            :func:`swap_operands`.
        unpack: ``unpack(batch) -> (inputs, targets)``, for batches other than those a
            :class:`~grok_callbacks.probe.Probe` understands.
        forward: ``forward(module, inputs) -> logits`` if the module is not called as ``module(inputs)``.

    Logged: ``grok/penalty/commutativity``, the penalty with its factor.

    Cost: two more forward passes and their part of the backward pass at every (micro-)batch.

    Source: Tan & Huang 2023, "Understanding Grokking Through A Robustness Viewpoint", arXiv 2311.06597.
    """

    kind = "commutativity"
    touches_weights = False

    def __init__(
        self,
        weight: float = 100.0,
        swap: Callable[[Any], Any] | None = None,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.weight = finite("weight", weight)
        self.swap = swap
        self.unpack = unpack
        self.forward = forward
        self._rng: list[Tensor] = []

    @property
    def active(self) -> bool:
        """False where ``weight`` is 0."""
        return self.weight != 0

    @contextmanager
    def around_step(self, module: nn.Module, batch: Any) -> Iterator[Any]:
        """Note the random state that the step starts from."""
        self._rng = _rng_states(module)
        yield batch

    def step_penalty(self, module: nn.Module, batch: Any) -> Tensor:
        """The penalty of one batch."""
        probe = Probe(unpack=self.unpack, forward=self.forward)
        samples = probe.unpack_batch(batch)
        mirrored = (self.swap or swap_operands)(samples.inputs)
        logits = []
        with isolated_rng(), _copied_buffers(module):
            for inputs in (samples.inputs, mirrored):
                _set_rng_states(module, self._rng)
                logits.append(probe.align(probe.call(module, inputs), samples.targets)[0])
        with no_autocast(logits[0]):
            first, second = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in logits)
            return self.weight * (first - second).square().mean()


def _rng_states(module: nn.Module) -> list[Tensor]:
    states = [torch.get_rng_state()]
    device = _device(module)
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_rng_states(module: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    device = _device(module)
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


def _device(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """Have forward passes write into copies of the buffers.

    Putting the values back afterwards would be a write into what autograd may have saved.
    """
    saved = [
        (owner, name, buffer) for owner in module.modules() for name, buffer in owner._buffers.items() if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in saved}
    try:
        for owner, name, buffer in saved:
            owner._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for owner, name, buffer in saved:
            owner._buffers[name] = buffer
