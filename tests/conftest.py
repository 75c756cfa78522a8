"""One thread for every test: the tensors are tiny, and threads that wait for each other are slower than one.

Tests that talk to servers or build packages take minutes together: they count as slow.
"""

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.replay import known_trials
from update_watch.watching import attention

torch.set_num_threads(1)

_SLOW = ("test_wandb_server", "test_packaging")
# tests of the trials themselves, and of what they leave behind: a room and files
_TRYING = ("replay", "test_sanctity", "test_interrupts", "test_attacks", "test_device_generators")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(str(item.path)).stem in _SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: else every collection of garbage goes through all of it, for half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _trials_are_remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not {request.path.parent.name, request.path.stem} & {*_TRYING}:
        known_trials.remember(monkeypatch)


@pytest.fixture(autouse=True)
def _every_step_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models step in a fraction of a millisecond: within the default budget hardly any step would be seen."""
    monkeypatch.setattr(attention, "always", True)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Scripts of bench/ silence the log; what they do in a test must not reach the next one."""
    logger = logging.getLogger("update_watch")
    level, disabled, below = logger.level, logger.disabled, logging.root.manager.disable
    yield
    logger.setLevel(level)
    logger.disabled = disabled
    logging.disable(below)
