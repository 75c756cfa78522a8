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
import threading
from types import ModuleType
from typing import Any

_AWAITED = "torch.optim.optimizer"
_BEGINNING = threading.RLock()
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
    except Exception as error:  # a torch of another kind: the command runs as it would have
        print(f"update-watch: this torch cannot be watched: {error!r}", file=sys.stderr)


def _steps(optimizer: Any, *more: Any) -> None:
    """Just before the first step of an optimizer: masters still have the values of what they are masters of.

    Another hook takes its place: torch goes through them just now. Other threads that train wait.
    """
    cuda = sys.modules["torch"].cuda
    if cuda.is_available() and cuda.is_current_stream_capturing():
        return  # what was done here would be captured: the next step will do
    place = _steps.place  # type: ignore[attr-defined]
    hooks = place.hooks_dict_ref()
    with _BEGINNING:
        if hooks[place.id] is not _steps:  # another thread was first
            hooks[place.id](optimizer, *more)
        elif not _steps.has_begun:  # type: ignore[attr-defined]
            _steps.has_begun = True  # type: ignore[attr-defined]
            try:
                _begin(optimizer, place)
            finally:
                if hooks[place.id] is _steps:
                    hooks[place.id] = _nothing


def _begin(optimizer: Any, place: Any) -> None:
    try:
        if importlib.util.find_spec("update_watch") is None:  # installed for another Python than this one
            sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(_HERE))))
        from update_watch.run import session

        # the script may have compiled its step: nothing of this may be traced
        sys.modules["torch"].compiler.disable(session.begin)(optimizer, place)
    except Exception as error:
        print(f"update-watch: this process is not watched: {error!r}", file=sys.stderr)


def _nothing(*_: Any) -> None:
    """In place of a hook."""


_steps.has_begun = False  # type: ignore[attr-defined]
for _hook in (_steps, _begin, _nothing):
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
    if hasattr(os, "register_at_fork"):  # another thread may have it, which the child does not
        os.register_at_fork(after_in_child=_BEGINNING._at_fork_reinit)  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Waiting())  # type: ignore[arg-type]
    _go_on()
