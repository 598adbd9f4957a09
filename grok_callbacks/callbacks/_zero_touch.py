"""The callback that attaches others to a Trainer whose script knows nothing of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from grok_callbacks._auto import VARIABLE
from grok_callbacks._compat import Callback
from grok_callbacks.callbacks._configuration import read
from grok_callbacks.mixins import mixins_of, with_mixins

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ZeroTouch"]


class ZeroTouch(Callback):
    """Attaches what ``GROK_CALLBACKS`` names, once the callbacks of the script and of its module are known.

    Lightning asks for callbacks like this one before it can say which others there are. At ``setup`` they are all known, and no
    checkpoint has been read yet, so the states of those that are attached then are restored with the rest.

    Args:
        setting: The name of a preset, or the path of a configuration.

    Raises:
        MisconfigurationException: If it is neither.
    """

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._callbacks, self._mixins = read(setting)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach what is missing, also where a Trainer is used again."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # A script that gives one list to several Trainers has those of the earlier ones in it: Lightning appends to that list.
        if [callback for callback in callbacks if isinstance(callback, ZeroTouch)][-1] is not self:
            return
        attached = [callback for callback in self._callbacks if self._is_missing(callback, callbacks)]
        for callback in attached:
            callback.log, callback.log_dict = pl_module.log, pl_module.log_dict
        # Lightning is walking through the list, and comes to those that are behind this one next. Checkpoints stay the last.
        place = callbacks.index(self) + 1
        callbacks[place:place] = attached
        grafted = self._graft(pl_module) if stage == "fit" else []
        if attached or grafted:
            rank_zero_info(f"{VARIABLE}={self._setting}: {_sentence(attached, grafted)}.")

    def _is_missing(self, callback: Any, present: list[Any]) -> bool:
        """Whether the Trainer has neither this callback, nor another of its class, nor one that saves under its name."""
        others = [other for other in present if not any(other is own for own in self._callbacks)]
        return not (
            any(callback is other for other in present)
            or any(isinstance(other, type(callback)) or other.state_key == callback.state_key for other in others)
        )

    def _graft(self, module: LightningModule) -> list[Any]:
        """Graft the mixins of those kinds that the module does not train with yet."""
        if not self._mixins:
            return []
        present = {mixin.kind for mixin in mixins_of(module).values()}
        missing = [mixin for mixin in self._mixins if mixin.kind not in present]
        if missing:
            with_mixins(module, *missing)
        return missing


def _sentence(callbacks: list[Any], mixins: list[Any]) -> str:
    parts = []
    if callbacks:
        parts.append(f"attached {', '.join(type(callback).__name__ for callback in callbacks)}")
    if mixins:
        parts.append(f"training with {', '.join(map(repr, mixins))}")
    return "; ".join(parts)
