"""The progress bar, with a word about the run beside the user's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["BarWithStatus"]

_NAMESPACES = ("lightning", "pytorch_lightning")
# The hooks in which Lightning's bars ask themselves for what to show.
_HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end")


class BarWithStatus:
    """Stands in for the ``get_metrics`` of one progress bar, whose answer may hold words as well as numbers.

    ``trainer.progress_bar_metrics`` would be simpler, but holds numbers only, and its readers rely on that.

    Args:
        bar: The bar.
    """

    def __init__(self, bar: Any) -> None:
        #: What to show, by name.
        self.words: Mapping[str, str] = {}
        self._bar = bar
        self._get_metrics = bar.get_metrics
        bar.get_metrics = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The bar's own metrics, after the words; where names clash, its own hold."""
        metrics = self._get_metrics(*args, **kwargs)
        return {**self.words, **metrics} if isinstance(metrics, dict) else metrics

    @classmethod
    def on(cls, trainer: Trainer) -> BarWithStatus | None:
        """Find a Trainer's bar; ``None`` if it has none, or one of the user's own that may be ready for numbers only."""
        bar = trainer.progress_bar_callback
        homes = [getattr(type(bar), hook).__module__ for hook in _HOOKS] if bar is not None else [""]
        is_known = all(".callbacks.progress." in home and home.split(".")[0] in _NAMESPACES for home in homes)
        return cls(bar) if is_known else None

    def leave(self) -> None:
        """Give the bar its method back."""
        if vars(self._bar).get("get_metrics") is self:
            del self._bar.get_metrics
