"""One thread for every test: the tensors are tiny, and threads that wait for each other are slower than one.

Tests that train with whole frameworks (Lightning, Transformers) or talk to servers take minutes together: they count as
slow.
"""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

_SLOW = ("callbacks", "test_wandb_server", "test_examples", "test_packaging")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = Path(str(item.path))
        if path.stem in _SLOW or path.parent.name in _SLOW:
            item.add_marker(pytest.mark.slow)
