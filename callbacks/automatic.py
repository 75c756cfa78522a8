"""UpdateWatch in every Lightning Trainer of an environment, where UPDATE_WATCH=1 asks for it.

The entry point of `lightning.pytorch.callbacks_factory` and `pytorch_lightning.callbacks_factory`: each Trainer calls
it when it is made, so nothing is imported until it is asked for.
"""

from __future__ import annotations

import os
from typing import Any

SWITCH = "UPDATE_WATCH"


def callbacks() -> list[Any]:
    """One UpdateWatch with default options if the environment asks for it, else nothing.

    It stands back where the user gave the Trainer an UpdateWatch.
    """
    if os.environ.get(SWITCH) != "1":
        return []
    from update_watch.callbacks.lightning import UpdateWatch

    return [UpdateWatch._of_environment()]
