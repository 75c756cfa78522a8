"""One line in a trainer: `lightning.Trainer(callbacks=[UpdateWatch()])`.

| trainer | import |
|---|---|
| Lightning (`lightning` and `pytorch_lightning`), Hugging Face's Trainer and those made of it (TRL) | `from update_watch.callbacks import UpdateWatch` |
| Fabric, Accelerate, plain torch | `update_watch.watch(model, optimizer)` |

No trainer is imported before the name is asked for. `update_watch.callbacks.lightning` and `.transformers` hold the callback
of one trainer each; one that is given to the other trainer becomes the one made for it. `StalledError` is what `on_stall="raise"` raises.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from update_watch.callbacks.lightning import UpdateWatch
    from update_watch.callbacks.on_stall import StalledError

__all__ = ["StalledError", "UpdateWatch"]


def __getattr__(name: str) -> Any:
    if name == "UpdateWatch":
        try:
            from update_watch.callbacks.lightning import UpdateWatch
        except ImportError:
            if importlib.util.find_spec("transformers") is None:
                raise
            from update_watch.callbacks.transformers import UpdateWatch  # type: ignore[assignment]

        return UpdateWatch
    if name == "StalledError":
        from update_watch.callbacks.on_stall import StalledError

        return StalledError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
