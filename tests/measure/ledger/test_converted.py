"""A model that is converted to another format in mid-run."""

from __future__ import annotations

import logging

import pytest
import torch

import update_watch as uw
from tests.measure.ledger.writes_between_steps import WINDOW, sgd
from tests.support.watch_nets import Net, backward, batches


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_back", [False, True])
def test_a_model_that_is_converted_within_a_window_is_no_error_of_ours(
    to: torch.dtype, is_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    formats = (to, torch.float32) if is_back else (torch.float32, to)
    model = Net(formats[0])
    optimizer = sgd(model.parameters())
    with caplog.at_level(logging.INFO, "update_watch"), uw.watch(model, optimizer, window=WINDOW, budget=None) as watch:
        for i, x in enumerate(batches(3 * WINDOW)):
            if i == WINDOW + 5:
                model.zero_grad()
                model.to(formats[1])
                for state in optimizer.state.values():
                    state["momentum_buffer"] = state["momentum_buffer"].to(formats[1])
            model.zero_grad()
            backward(model, x.to(formats[i >= WINDOW + 5]))
            optimizer.step()
        report = watch.flush()
    assert report is not None
    assert {t.dtype for t in report.tensors} == {str(formats[1]).removeprefix("torch.")}
    assert all(t.written_between is not None for t in report.tensors)  # the ledger goes on
    assert not [record for record in caplog.records if record.exc_info]
