"""Muon for the hidden matrices of a model whose optimizer stays what it is for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins._base import Mixin, chosen_parameters, finite
from grok_callbacks.selection import clean_name

__all__ = ["MuonMixin", "MuonWithRest"]

_GROUP_KEY = "muon"


class MuonMixin(Mixin):
    """Trains hidden matrices with Muon, the rest with the optimizer that ``configure_optimizers`` made (AdamW, as a rule).

    What ``configure_optimizers`` returns may have any of the forms that Lightning takes. Its parameter groups stay, in number,
    order and settings; its learning-rate schedulers go on setting their learning rates, and Muon follows those of the
    groups that its matrices are in. To Lightning it is one optimizer, :class:`MuonWithRest`.

    Hidden matrices are by default the trainable two-dimensional parameters other than those of ``nn.Embedding`` and of the
    last ``nn.Linear``, in the order in which the modules were defined. Convolutions stay with the rest.

    The optimizer's state can't be exchanged with a run without this mixin (nor with another choice of matrices): such a
    checkpoint is refused, its weights can be loaded alone. Works with manual optimisation, and there with several optimizers.

    Args:
        lr: Muon's learning rate where the schedule has its base value (the group's ``initial_lr``: of ``OneCycleLR`` that is
            where it begins, a 25th of its highest); it follows the schedule's shape. By default the group's own, which suits
            ``adjust_lr_fn="match_rms_adamw"``.
        momentum: Momentum.
        weight_decay: Decoupled weight decay. By default the group's own, which Muon decouples even if the rest does not, or 0
            where it has none.
        nesterov: Whether momentum is Nesterov's.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: How updates are scaled with the matrix's shape: ``"match_rms_adamw"`` to the size of AdamW's updates, or
            ``"original"`` as in the reference implementation, with ``lr`` 0.02 or so.
        parameters: Globs on clean parameter names, ``!`` taking away, instead of the default choice; matrices all.

    Raises:
        MisconfigurationException: If torch has no ``torch.optim.Muon`` (it came with 2.9).

    Cost: ``ns_steps`` times three matrix products of each matrix at each step, and one momentum buffer instead of two.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; that it spreads features when units
    are few is from Tian 2025, "Provable Scaling Laws of Feature Emergence from Learning Dynamics of Grokking",
    arXiv 2509.21519.
    """

    kind = "muon"
    automatic_only = False

    def __init__(
        self,
        lr: float | None = None,
        *,
        momentum: float = 0.95,
        weight_decay: float | None = None,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise MisconfigurationException(
                f"MuonMixin needs torch.optim.Muon, from torch 2.9 on; this is {torch.__version__}."
            )
        self.lr = None if lr is None else finite("lr", lr, minimum=0)
        self.weight_decay = None if weight_decay is None else finite("weight_decay", weight_decay, minimum=0)
        if adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ValueError(f'`adjust_lr_fn` must be "match_rms_adamw" or "original", got {adjust_lr_fn!r}.')
        if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or not 1 <= ns_steps < 100:
            raise ValueError(f"`ns_steps` must be a whole number of at least 1 and below 100, got {ns_steps!r}.")
        self.momentum = finite("momentum", momentum, minimum=0)
        self.nesterov = nesterov
        self.ns_steps = ns_steps
        self.adjust_lr_fn = adjust_lr_fn
        self.parameters = parameters

    def configure_optimizers(self, module: nn.Module, configured: Any) -> Any:
        """The same with each optimizer that has hidden matrices replaced by one that gives those to Muon."""
        try:
            hidden = self.hidden_matrices(module)
        except ValueError as error:
            raise MisconfigurationException(f"MuonMixin: {error}") from error
        optimizers = [item for item in _flat(configured) if isinstance(item, Optimizer)]
        replaced = {id(optimizer): self._composite(optimizer, hidden) for optimizer in optimizers}
        if not any(
            isinstance(new, MuonWithRest) and new is not old for old, new in zip(optimizers, replaced.values(), strict=True)
        ):
            raise MisconfigurationException(f"MuonMixin: no optimizer holds any of the matrices {list(hidden)}.")
        for item in _flat(configured):
            for scheduler in _schedulers(item):
                scheduler.optimizer = replaced.get(id(scheduler.optimizer), scheduler.optimizer)
        return _replace(configured, replaced)

    def hidden_matrices(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters for Muon by clean name.

        Raises:
            ValueError: If there is none, or ``parameters`` names some that are no matrices.
        """
        if self.parameters is not None:
            chosen = chosen_parameters(module, self.parameters)
            others = [name for name, parameter in chosen.items() if parameter.ndim != 2]
            if others:
                raise ValueError(f"`parameters`: Muon takes two-dimensional parameters only, not {others}.")
        else:
            modules = list(module.modules())
            linear = [child.weight for child in modules if isinstance(child, nn.Linear)]
            embeddings = [child.weight for child in modules if isinstance(child, (nn.Embedding, nn.EmbeddingBag))]
            spared = {id(weight) for weight in (*embeddings, *linear[-1:])}
            chosen = {
                clean_name(name): parameter
                for name, parameter in module.named_parameters()
                if parameter.ndim == 2
                and parameter.requires_grad
                and parameter.is_floating_point()
                and id(parameter) not in spared
            }
        if not chosen:
            names = [clean_name(name) for name, _ in module.named_parameters()]
            raise ValueError(f"no hidden matrix for Muon; name some in `parameters`. There are: {', '.join(names)}.")
        if any(hasattr(parameter, "full_tensor") for parameter in chosen.values()):
            raise ValueError("Muon orthogonalises whole matrices, and these are sharded (FSDP2): use DDP.")
        return chosen

    def _composite(self, optimizer: Optimizer, hidden: dict[str, nn.Parameter]) -> Optimizer:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        matrices = [parameter for parameter in hidden.values() if id(parameter) in held]
        if not matrices:
            return optimizer
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException("MuonMixin can't be used with LBFGS, which evaluates the loss on its own.")
        return MuonWithRest(
            optimizer,
            matrices,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn=self.adjust_lr_fn,
        )


class MuonWithRest(Optimizer):
    """One optimizer out of two: Muon for some matrices, a given optimizer for all other parameters.

    Its ``param_groups`` are those of the given optimizer, with all parameters: so gradient clipping and scaling, schedulers and
    ``zero_grad`` see what they would see without Muon. At each step both optimizers get their share of the groups.

    Args:
        rest: The optimizer to take over; not to be stepped on its own any more.
        matrices: Those of its parameters that Muon gets.
        lr: Muon's learning rate where that of the group has its initial value; by default the group's.
        weight_decay: Muon's weight decay; by default the group's.
        muon: Further settings of :class:`torch.optim.Muon`.
    """

    def __init__(
        self,
        rest: Optimizer,
        matrices: Sequence[nn.Parameter],
        lr: float | None = None,
        weight_decay: float | None = None,
        **muon: Any,
    ) -> None:
        self._rest = rest
        self._matrices = set(matrices)
        self._lr = lr
        self._weight_decay = weight_decay
        self._muon = torch.optim.Muon(list(matrices), **muon)
        super().__init__(rest.param_groups, rest.defaults)
        self.state.update(rest.state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        # The schedulers were made for the other optimizer, and ask whether this one has stepped.
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_rest()
        for optimizer, groups in ((self._rest, self._groups_of_rest()), (self._muon, self._groups_of_muon())):
            optimizer.param_groups = groups
            optimizer.step()
        # Some optimizers keep counts and estimates in their groups.
        for group, stepped in zip(self.param_groups, self._rest.param_groups, strict=True):
            group.update(_settings(stepped))
        self._share()
        return loss

    vars(step)["_wrapped_by_lr_sched"] = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also while training; parameters that were not given to Muon go to the rest."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Saved with the state, so that a checkpoint of another run is recognised.
        group[_GROUP_KEY] = [index for index, parameter in enumerate(group["params"]) if parameter in self._matrices]
        group.setdefault("initial_lr", group["lr"])
        if hasattr(self, "_seen"):
            self._share()

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        self._follow_rest()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state saved by one with the same matrices.

        Raises:
            MisconfigurationException: If the state is of another kind.
        """
        saved = [group.get(_GROUP_KEY) for group in state_dict["param_groups"]]
        if saved != [group[_GROUP_KEY] for group in self.param_groups]:
            raise MisconfigurationException(
                "The checkpoint's optimizer state is of a run without MuonMixin, or with Muon on other matrices, and can't be "
                "taken up. Load the weights alone."
            )
        super().load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """All of it; the base class would leave out what it does not know."""
        own = ("_rest", "_muon", "_matrices", "_lr", "_weight_decay", "_seen")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def _share(self) -> None:
        # Their parameters are disjoint, so one dictionary serves all three, and saving and loading need know of one only.
        self._rest.state = self._muon.state = self.state
        self._rest.param_groups = self._groups_of_rest()
        self._seen = [_settings(group) for group in self._rest.param_groups]
        if isinstance(self._rest, MuonWithRest):
            self._rest._share()

    def _follow_rest(self) -> None:
        """Take up what was set in the given optimizer's groups, as by a scheduler that the module keeps to itself."""
        for group, rest, seen in zip(self.param_groups, self._rest.param_groups, self._seen, strict=True):
            group.update({key: value for key, value in _settings(rest).items() if key not in seen or value != seen[key]})
        self._seen = [_settings(group) for group in self._rest.param_groups]

    def _groups_of_rest(self) -> list[dict[str, Any]]:
        return [
            {**group, "params": [parameter for parameter in group["params"] if parameter not in self._matrices]}
            for group in self.param_groups
        ]

    def _groups_of_muon(self) -> list[dict[str, Any]]:
        groups = []
        for group in self.param_groups:
            lr = group["lr"] if self._lr is None else self._lr * _relative(group["lr"], group["initial_lr"])
            decay = group.get("weight_decay", 0.0) if self._weight_decay is None else self._weight_decay
            params = [parameter for parameter in group["params"] if parameter in self._matrices]
            groups.append({**self._muon.defaults, "params": params, "lr": lr, "weight_decay": decay})
        return groups


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _relative(value: float | Tensor, base: float | Tensor) -> float:
    if float(base) == 0:
        raise MisconfigurationException(
            "MuonMixin: `lr` is relative to the optimizer's learning rate, which is 0; leave it out."
        )
    return float(value) / float(base)


def _flat(configured: Any) -> Iterator[Any]:
    """The optimizers and schedulers in any of the forms that Lightning takes."""
    if isinstance(configured, dict):
        for value in configured.values():
            yield from _flat(value)
    elif isinstance(configured, (list, tuple)):
        for value in configured:
            yield from _flat(value)
    elif configured is not None:
        yield configured


def _schedulers(item: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    if not isinstance(item, Optimizer) and isinstance(getattr(item, "optimizer", None), Optimizer):
        yield item
        for inner in getattr(item, "_schedulers", ()):
            yield from _schedulers(inner)


def _replace(configured: Any, replaced: dict[int, Optimizer]) -> Any:
    if isinstance(configured, dict):
        return {key: _replace(value, replaced) for key, value in configured.items()}
    if isinstance(configured, (list, tuple)):
        items = [_replace(value, replaced) for value in configured]
        return items if isinstance(configured, list) else tuple(items)
    return replaced.get(id(configured), configured)
