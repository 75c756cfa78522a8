"""Python runs this at the start of every process of `update-watch run COMMAND`, as its folder is on PYTHONPATH.

It waits until torch's optimizers are imported, and then for the first step of one. A process that never imports torch pays
for one look at the names of its imports. A `sitecustomize` of the user's own, further on the path, is run as it would have
been. Standard library alone: the process may be anything.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_AWAITED = "torch.optim.optimizer"
_HERE = os.path.dirname(os.path.abspath(__file__))


class _Waiting:
    """A finder that finds nothing, and sees when torch's optimizers are imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _listen(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _listen(module: ModuleType) -> None:
    try:
        _steps.place = module.register_optimizer_step_pre_hook(_steps)  # type: ignore[attr-defined]
        module.register_optimizer_step_post_hook(_after)  # type: ignore[attr-defined]
    except Exception as error:  # a torch of another kind: the command runs as it would have
        print(f"update-watch: this torch cannot be watched: {error!r}", file=sys.stderr)


def _steps(optimizer: Any, *_: Any) -> None:
    """Just before the first step of an optimizer: masters still have the values of what they are masters of.

    Another hook takes its place: torch goes through them just now.
    """
    cuda = sys.modules["torch"].cuda
    if cuda.is_available() and cuda.is_current_stream_capturing():
        return  # what was done here would be captured: the next step will do
    place = _steps.place  # type: ignore[attr-defined]
    place.hooks_dict_ref()[place.id] = _nothing
    try:
        if importlib.util.find_spec("update_watch") is None:  # installed for another Python than this one
            sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(_HERE))))
        from update_watch.run import session

        # the script may have compiled its step: nothing of this may be traced
        disable = sys.modules["torch"].compiler.disable
        if disable(session.begin)(optimizer, place) is not None:
            _more.follow = disable(session.follow)  # type: ignore[attr-defined]
    except Exception as error:
        print(f"update-watch: this process is not watched: {error!r}", file=sys.stderr)


def _more(optimizer: Any, *_: Any) -> None:
    """Just before any later step: it may be the first of another model, whose watch takes the place of this hook."""
    try:
        if _more.follow(optimizer, _more.place):  # type: ignore[attr-defined]
            _more.place = None  # type: ignore[attr-defined]
    except Exception as error:
        _more.follow = None  # type: ignore[attr-defined]
        place, _more.place = _more.place, None  # type: ignore[attr-defined]
        place.hooks_dict_ref()[place.id] = _nothing
        print(f"update-watch: further models of this process are not watched: {error!r}", file=sys.stderr)


def _after(*_: Any) -> None:
    """Just after any step, when hooks may be added: one that waits for the next model."""
    if _more.follow is not None and _more.place is None:  # type: ignore[attr-defined]
        register = sys.modules[_AWAITED].register_optimizer_step_pre_hook
        _more.place = register(_more)  # type: ignore[attr-defined]


def _nothing(*_: Any) -> None:
    """In place of a hook."""


_more.follow = _more.place = None  # type: ignore[attr-defined]
for _hook in (_steps, _more, _after, _nothing):
    _hook._torchdynamo_disable = True  # type: ignore[union-attr]


def _go_on() -> None:
    """Run the module of this name that would have been run without us."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if "UPDATE_WATCH_RUN" in os.environ and __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Waiting())  # type: ignore[arg-type]
    _go_on()
