"""Models whose weights are spread over ranks (FSDP2, DTensor): what is whole, what is a piece, what may be done with either.

A module to which ``torch.distributed.fsdp.fully_shard`` was applied holds a shard of each weight. Whoever calls it has FSDP
gather the weights, one module after the other, which takes all ranks. Some modules (the outermost, as a rule) keep them
until the next backward pass, and meanwhile have other parameters registered than the optimizer knows.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["is_sharded", "own_piece", "refuse_flat_shards", "reshard", "substituted", "unfinished_pass_forgotten"]


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold pieces of the weights, so that calling the model takes all of them."""
    return any(_is_dtensor(parameter) for parameter in model.parameters()) or bool(_fsdp_modules(model))


def reshard(model: nn.Module) -> None:
    """Have the model's parameters be the shards that the optimizer knows, wherever FSDP has left gathered ones."""
    for module in _fsdp_modules(model):
        module.reshard()


def own_piece(weight: Tensor) -> Tensor:
    """This rank's part of a weight: the parts of all ranks make up its entries, each of them once.

    Args:
        weight: A shard; or a whole weight, which is rank 0's.
    """
    if not _is_dtensor(weight):
        return weight if not dist.is_initialized() or dist.get_rank() == 0 else weight.flatten()[:0]
    sharded: Any = weight
    local: Tensor = sharded.to_local()
    mesh = sharded.device_mesh
    coordinate = mesh.get_coordinate()
    # Of several copies, that of the first rank counts; of several meshes side by side, that of rank 0.
    is_copy = (
        coordinate is None
        or 0 not in mesh.mesh.flatten().tolist()
        or any(placement.is_replicate() and place for placement, place in zip(sharded.placements, coordinate, strict=True))
    )
    return local.flatten()[:0] if is_copy else local


def refuse_flat_shards(model: nn.Module) -> None:
    """Refuse models whose parameters are pieces that can't be told from whole weights.

    Raises:
        ValueError: If the model is sharded by FSDP1 or by the third stage of DeepSpeed's ZeRO.
    """
    for parameter in model.parameters():
        if getattr(parameter, "_fsdp_flattened", False) or getattr(parameter, "_is_flat_param", False):
            raise ValueError(
                "The weights are sharded by FSDP1 (`FSDPStrategy`), which leaves flat pieces of them in sight. Use "
                "`ModelParallelStrategy` (FSDP2, `fully_shard`), or DDP."
            )
        if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status"):
            raise ValueError(
                "The weights are sharded by DeepSpeed's ZeRO stage 3, which empties them. Use stage 1 or 2, "
                "`ModelParallelStrategy` (FSDP2, `fully_shard`), or DDP."
            )


@contextmanager
def substituted(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have a sharded model compute with other weights, whole ones.

    They go in when FSDP has gathered a module's own, and those come back before it shards them again.

    Args:
        model: The model, its parameters sharded.
        weights: Substitutes by (raw) parameter name.
    """
    parameters = dict(model.named_parameters())
    wanted = {id(parameters[name]): weight for name, weight in weights.items()}
    aside: dict[tuple[nn.Module, str], Any] = {}

    def put_in(places: Sequence[_Place]) -> None:
        for owner, name, weight in places:
            gathered = owner._parameters[name]
            if gathered is None or _is_dtensor(gathered):
                raise ValueError("Weights that are split by tensor parallelism cannot be substituted.")
            aside[owner, name] = gathered
            owner._parameters[name] = weight.to(gathered.dtype)  # type: ignore[assignment]

    def put_back(places: Sequence[_Place]) -> None:
        for owner, name, _ in places:
            owner._parameters[name] = aside.pop((owner, name))

    with ExitStack() as stack:
        for manager, places in _places_by_manager(model, wanted).items():
            if manager is None:
                put_in(places)
                continue
            # After FSDP's own hook before the forward pass, and before its own after it.
            before = manager.register_forward_pre_hook(lambda *_, places=places: put_in(places))
            after = manager.register_forward_hook(lambda *_, places=places: put_back(places), prepend=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        try:
            yield
        finally:
            for (owner, name), parameter in aside.items():
                owner._parameters[name] = parameter


@contextmanager
def unfinished_pass_forgotten(model: nn.Module) -> Iterator[None]:
    """After a forward pass that failed half-way, FSDP would take the next one for its continuation."""
    try:
        yield
    except BaseException:
        for module in _fsdp_modules(model):
            state = module._get_fsdp_state()
            idle = type(state._training_state).IDLE
            state._training_state = idle
            state._state_ctx.iter_forward_root = None
            # One group until torch 2.9, or none.
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for group in groups:
                if group is not None:
                    group._training_state = idle
        raise
    finally:
        reshard(model)


#: A module, the name of a parameter of its own, and the weight to put there.
_Place = tuple[nn.Module, str, Tensor]


def _places_by_manager(model: nn.Module, wanted: Mapping[int, Tensor]) -> dict[nn.Module | None, list[_Place]]:
    """Where parameters are, by the module on whose call FSDP gathers them: the innermost around them."""
    places: dict[nn.Module | None, list[_Place]] = defaultdict(list)
    managers = set(_fsdp_modules(model))
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, manager: nn.Module | None) -> None:
        if module in seen:
            return
        seen.add(module)
        manager = module if module in managers else manager
        for name, parameter in module._parameters.items():
            if id(parameter) in wanted:
                places[manager].append((module, name, wanted[id(parameter)]))
        for child in module.children():
            visit(child, manager)

    visit(model, None)
    return places


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def _fsdp_modules(model: nn.Module) -> list[Any]:
    # Whoever shards a model has imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not dist.is_initialized():
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
