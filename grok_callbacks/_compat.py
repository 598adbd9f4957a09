"""Both Lightning namespaces at once.

``lightning.pytorch`` and ``pytorch_lightning`` ship the same code as distinct classes. A Trainer or a LightningCLI of one
refuses callbacks and does not catch exceptions of the other, so ours inherit from whichever of the two are installed.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException as _FabricMisconfiguration
from lightning.pytorch import Callback as _LightningCallback

__all__ = ["Callback", "MisconfigurationException"]

if TYPE_CHECKING:

    class Callback(_LightningCallback):
        """A callback of both namespaces."""

    class MisconfigurationException(_FabricMisconfiguration):
        """A setting that cannot work; the message names the argument to change."""

else:
    _callback_bases: tuple[type[Any], ...] = (_LightningCallback,)
    _exception_bases: tuple[type[Exception], ...] = (_FabricMisconfiguration, ValueError)
    if importlib.util.find_spec("pytorch_lightning") is not None:
        from lightning_fabric.utilities.exceptions import MisconfigurationException as _OtherMisconfiguration
        from pytorch_lightning import Callback as _OtherCallback

        _callback_bases = (_LightningCallback, _OtherCallback)
        _exception_bases = (_FabricMisconfiguration, _OtherMisconfiguration, ValueError)

    # Plain ``type`` calls: a class statement cannot take bases that are known at run time only.
    Callback = type("Callback", _callback_bases, {"__doc__": "A callback of both namespaces.", "__module__": __name__})
    MisconfigurationException = type(
        "MisconfigurationException",
        _exception_bases,
        {"__doc__": "A setting that cannot work; the message names the argument to change.", "__module__": __name__},
    )
