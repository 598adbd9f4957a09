"""What Lightning asks, through its entry points, whenever a Trainer is made.

Almost always there is nothing to attach, so this module and the package around it load nothing.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["VARIABLE", "callbacks_factory"]

VARIABLE = "GROK_CALLBACKS"


def callbacks_factory() -> list[Any]:
    """The callback that attaches what the environment variable ``GROK_CALLBACKS`` names; none if it is unset or empty.

    Raises:
        MisconfigurationException: If the variable names neither a preset nor a configuration that can be read.
    """
    setting = os.environ.get(VARIABLE, "").strip()
    if not setting:
        return []
    from grok_callbacks.callbacks._zero_touch import ZeroTouch

    return [ZeroTouch(setting)]
