"""One line in a trainer: `lightning.Trainer(callbacks=[UpdateWatch()])`.

| trainer | import |
|---|---|
| Lightning (`lightning` and `pytorch_lightning`) | `from update_watch.callbacks import UpdateWatch` |
| Hugging Face's Trainer | `from update_watch.callbacks.transformers import UpdateWatch` |
| Fabric, Accelerate, plain torch | `update_watch.watch(model, optimizer)` |

No trainer is imported before the name is asked for. `StalledError` is what `on_stall="raise"` raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from update_watch.callbacks._stall import StalledError
    from update_watch.callbacks.lightning import UpdateWatch

__all__ = ["StalledError", "UpdateWatch"]


def __getattr__(name: str) -> Any:
    if name == "UpdateWatch":
        from update_watch.callbacks.lightning import UpdateWatch

        return UpdateWatch
    if name == "StalledError":
        from update_watch.callbacks._stall import StalledError

        return StalledError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
