"""Leaving no trace: random-number states, train/eval mode and buffers are put back as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["isolated_rng", "observing"]


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Give every random-number generator (torch on all devices, numpy, python) its state back on leaving."""
    python_state = random.getstate()
    # A program that has not imported numpy has no state of it to keep.
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def observing(model: nn.Module, *, grad: bool = False) -> Iterator[None]:
    """Run ``model`` in eval mode, eagerly and in its own precision, and leave it exactly as it was.

    Args:
        model: The module to look at; its modes and buffers come back bit for bit, whatever its forward does to them.
        grad: Whether autograd records. Parameters get no gradients as long as ``torch.autograd.grad`` is used.
    """
    with ExitStack() as stack:
        # Lightning validates in inference mode, whose tensors could not be used for gradients, nor saved by a metric.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad() if grad else torch.no_grad())
        stack.enter_context(torch.autocast(_device_type(model), enabled=False))
        stack.enter_context(_eager())
        stack.enter_context(isolated_rng())
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(_eval_mode(model))
        yield


def _device_type(model: nn.Module) -> str:
    tensor = next(model.parameters(), None)
    device_type = tensor.device.type if tensor is not None else "cpu"
    return device_type if torch.amp.is_autocast_available(device_type) else "cpu"


def _eager() -> AbstractContextManager[object]:
    # Hooks may not run in compiled code. Where nothing has been compiled, dynamo isn't even imported; leave it so.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return cast("AbstractContextManager[object]", torch.compiler.set_stance("force_eager"))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Set the flag directly: ``train()`` and ``eval()`` may be overridden to do more, and freezing recipes set modules apart.
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    saved: list[tuple[nn.Module, str, Tensor, Tensor]] = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in saved:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            # Write only what has changed, so that a buffer's version tells of real writes.
            if not torch.equal(buffer, copy):
                buffer.copy_(copy)
