"""Training at weights that are jittered anew for each batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grok_callbacks.mixins._base import Mixin, chosen_parameters, finite, whole_number
from grok_callbacks.mixins._random import generator

__all__ = ["WeightNoiseMixin"]


class WeightNoiseMixin(Mixin):
    r"""Takes forward and gradient at :math:`\theta + \delta\, \mathcal{N}(0, 1)` and applies the update to :math:`\theta`.

    Noise is drawn anew for every (micro-)batch. The noisy values stand in the parameters' own memory during ``training_step``
    and again during backward, and the clean ones, kept aside and put back bit for bit, at all other times: for the
    optimizer, gradient clipping, callbacks, checkpoints, and whoever catches an exception. So parameters stay the leaves that
    the optimizer, DDP, FSDP2, recurrent layers and compiled code hold on to, and activation checkpointing recomputes what
    the forward pass computed. (Substituting ``theta + noise`` for the parameters, as ``torch.func.functional_call``
    does, would recompute at clean weights, and have no effect on recurrent layers and under FSDP2.)

    The noise is the same on all ranks, so that k ranks give what one process gives on their joined batches; a sharded
    parameter (FSDP2) gets its shard of it. It comes from a generator of its own: the program's random numbers are as
    without. It depends on the seed and the number of draws before it, which checkpoints keep.

    Outside a Trainer call ``module.backward(loss)``, not ``loss.backward()``, which raises. What ``training_step``
    itself writes into the weights is not kept.

    Args:
        delta: Standard deviation of the noise; the paper's is 1e-2 for addition and multiplication, 1e-3 for subtraction
            and division. With 0 training is the plain one.
        parameters: Globs on clean parameter names, ``!`` taking away. All trainable parameters by default.
        seed: Seed of the noise.

    Cost: one normal number for each parameter, and a few copies of the parameters, at every (micro-)batch; memory for two
    more copies during a step.

    Source: eq. 10 of DeMoss et al. 2024, "The Complexity Dynamics of Grokking", arXiv 2412.09810.
    """

    kind = "weight_noise"

    def __init__(self, delta: float, parameters: str | Sequence[str] | None = None, seed: int = 0) -> None:
        self.delta = finite("delta", delta, minimum=0)
        self.parameters = parameters
        self.seed = seed
        self._draws = 0
        self._noisy: tuple[list[Tensor], list[Tensor]] | None = None
        self._in_place = False

    @property
    def active(self) -> bool:
        """False where ``delta`` is 0."""
        return self.delta != 0

    def check(self, module: nn.Module) -> None:
        """Raise ``ValueError`` if ``parameters`` matches nothing."""
        chosen_parameters(module, self.parameters)

    @contextmanager
    def around_forward(self, module: nn.Module) -> Iterator[None]:
        """Draw noise, and have the parameters hold the noisy weights."""
        self._noisy = self._draw(list(chosen_parameters(module, self.parameters).values()))
        with self._substituted():
            yield

    def attach(self, loss: Tensor) -> None:
        """Have a backward pass that would run at the clean weights fail, instead of giving a wrong gradient."""
        if loss.requires_grad:
            loss.register_hook(self._require_noisy)  # type: ignore[no-untyped-call]

    @contextmanager
    def around_backward(self, module: nn.Module) -> Iterator[None]:
        """Have the parameters hold the noisy weights of the last forward pass."""
        try:
            with self._substituted():
                yield
        finally:
            self._noisy = None

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The number of draws."""
        return {"draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the number of draws."""
        self._draws = whole_number(state, "draws")

    def __getstate__(self) -> dict[str, Any]:
        """Without the noise of a step that is under way."""
        return {**self.__dict__, "_noisy": None, "_in_place": False}

    @torch.no_grad()
    def _draw(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """The memory of the parameters on this rank, and the noisy values to put there."""
        generators: dict[torch.device, torch.Generator] = {}
        memory, values = [], []
        for parameter in parameters:
            device = parameter.device
            if device not in generators:
                generators[device] = generator(device, self.seed, self.name, self._draws)
            precision = torch.promote_types(parameter.dtype, torch.float32)
            noise = torch.randn(parameter.shape, generator=generators[device], device=device, dtype=precision)
            # ``.data``, because autograd shall not count our writes: the values are back when it needs them.
            local = _local(parameter.data)
            memory.append(local)
            values.append(torch.add(local, _shard_like(noise, parameter), alpha=self.delta).to(local.dtype))
        self._draws += 1
        return memory, values

    @contextmanager
    def _substituted(self) -> Iterator[None]:
        memory, values = self._noisy or ([], [])
        clean = [tensor.clone() for tensor in memory]
        before = self._in_place
        try:
            self._in_place = self._noisy is not None
            _write(memory, values)
            yield
        finally:
            _write(memory, clean)
            self._in_place = before

    def _require_noisy(self, gradient: Tensor) -> None:
        if not self._in_place:
            raise RuntimeError(
                "WeightNoiseMixin: the backward pass must run at the noisy weights. Call `module.backward(loss)` instead of "
                "`loss.backward()`, once for each training step."
            )


def _write(targets: list[Tensor], values: list[Tensor]) -> None:
    # One call: an interrupt does not come between.
    if targets:
        torch._foreach_copy_(targets, values)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _shard_like(noise: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a tensor that is the same on all ranks."""
    if not hasattr(parameter, "placements"):
        return noise
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(noise, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return _local(everywhere.redistribute(placements=parameter.placements))
