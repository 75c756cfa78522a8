"""What tests of the tap share."""

from __future__ import annotations

import pytest
import torch

from tests.support.tap_recorder import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def param() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(1.0, 2.0, 5))
