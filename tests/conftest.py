"""One thread for every test: the tensors are tiny, and threads that wait for each other are slower than one.

Tests that talk to servers, build packages or look through a browser take minutes together: they count as slow.
"""

import gc
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

if not torch.cuda.is_available():
    # before anything imports Triton, as torch's compiler does: its own functions would not run in the interpreter then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support.replay import known_trials
from update_watch.watching import attention

torch.set_num_threads(1)

_SLOW = ("test_wandb_server", "test_packaging", "test_html_browser")
# files whose slow tests take minutes: they begin first, so that none of them runs on alone at the end
_LONG = ("test_thinning", "test_fuzz", "test_gpu_bench", "test_joining", "test_rank_resume", "test_device_cases")
# cases of which a like one is quick enough to be run by default, by file
_SLOW_CASES = {
    "test_scenarios": ("the_table_counts_planted", "every_verdict_on_a_weight", "a_verdict_that_stays_away"),
    "test_faults": ("sigterm_reports_the_open_window",),
    "test_state_factor": ("come_and_go", "a_stalled_state_says_how_little", "decay_inside_the_gradient"),
    "test_run_journal": ("a_page_is_of_the_whole_run",),
    "test_attention": ("counts_all_steps_and_says_how_many",),
    "test_cli": ("a_closed_pipe_is_quiet",),
    "test_html_report": ("a_live_report_waits", "a_thinned_or_damaged_journal"),
    "test_attacks": ("any_number_of_parameters",),
    "test_rule_kind": ("quantised_state_of_large_tensors",),
    "test_forecast": ("what_is_kept_of_a_long_run",),
    "test_thinning": ("that_outgrows_its_limit",),
    "test_on_audit": ("its_healthy_twin_trains[warn]",),
    "test_wandb_limits": ("of_2000_tensors",),
    "test_charts": ("of_two_thousand_tensors",),
    "test_loading": ("names_are_loaded_when_they_are_asked_for",),
    "test_wandb_sink": ("a_log_still_being_written",),
    "test_faults_inside": ("a_slow_disk_keeps_training",),
    "test_fuzz": ("random_trainings_keep_every_bit_and_their_watch[3]",),
    "test_kernel_gathers": ("reports_are_those_of_torchs_way[adamw]", "that_reads_otherwise_is_not_used"),
    "test_kernel_sums": ("that_adds_otherwise_is_not_used",),
    "test_sheet_sums": ("that_adds_otherwise_is_not_used",),
    "test_device_cases": ("nothing_grows_in_thousands_of_steps[1024]",),
    "test_command": ("a_script_that_watches_itself_is_left_alone",),
    "test_process_steps": ("a_step_that_is_compiled_is_found_and_stays_the_same", "is_found_and_measured[fp32-"),
    "test_watch_truth": (
        "adamw-loop-torch.float16-partly]",
        "foreach-torch.bfloat16-partly]",
        "fused-torch.float16-partly]",
    ),
    "test_averages": ("that_no_counter_sees_are_changes_of_values[2]",),
    "test_sanctity": (
        *("training_by_closures_is_bit_identical[muon]", "training_in_fp32_is_bit_identical[muon]"),
        *("training_is_bit_identical[adamw-amsgrad", "training_is_bit_identical[adamw-loop]", "identical[schedule-sgd"),
    ),
    "test_identity": (
        "plain-torch.bfloat16-rprop",
        "plain-torch.bfloat16-adamw-loop",
        "torch.bfloat16-asgd",
        "closure-torch.f",
    ),
    "test_scaled_weights": ("FusedSplit-1e-06", "Split-0.001", "Masters-1e-06", "Kahan-1e-06", "Remainders-1e-06"),
    "test_ledger": ("overwritten[every 24-adamw]", "adamw-pruned]", "adamw-normalised]"),
}
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_TRITON = tuple(int(part) for part in version("triton").split(".")[:2]) if find_spec("triton") else (99,)
# what an older torch does not have, or has not beside it, and the cases that need it, by file
_NEEDED = (
    (
        "torch.optim.Muon",
        hasattr(torch.optim, "Muon"),
        {
            "test_rule_properties": ("Muon-",),
            "test_truth": ("counts_its_tensors[muon",),
            "test_exact_rules": ("[muon]", "another_rule_is_refused"),
            "test_sanctity": ("[muon]",),
        },
    ),
    (
        "devices whose memory is NumPy's",
        hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        {"test_device": ("",), "test_device_only": ("",), "test_device_cases": ("on_a_device", "of_a_graph")},
    ),
    ("reading elements of uint16", _TORCH >= (2, 7), {"test_scaled_weights": ("Split",)}),
    ("casts to float8 that end at its largest value", _TORCH >= (2, 7), {"test_formats": ("float8_e4m3fn]",)}),
    (
        "gradients of another format than their tensor",
        _TORCH >= (2, 7),
        {"test_odd_tensors": ("turns_odd_in_mid_run",)},
    ),
    (
        "schedulers in sequence that do not warn of themselves",
        _TORCH >= (2, 7),
        {"test_forecast": ("a_torch_scheduler_is_run_ahead", "with_a_formula_are_asked")},
    ),
    ("torchao", find_spec("torchao") is not None, {"test_scenarios": ("of_torchao",)}),
    (
        "steps of AdamW where another device is the default",
        _TORCH >= (2, 7),
        {"test_rule_kind": ("default_dtype_and_device_of_the_user",)},
    ),
    ("an interpreter of Triton that knows truth values", _TRITON >= (3, 3), {"test_sheet_sums": ("",)}),
    ("FSDP2 on a CPU beside CUDA's libraries", _TORCH >= (2, 7), {"test_joining": ("",)}),
)
# tests of the trials themselves, and of what they leave behind: a room and files
_TRYING = ("replay", "test_sanctity", "test_interrupts", "test_attacks", "test_device_generators")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        stem = Path(str(item.path)).stem
        if stem in _SLOW or any(case in item.name for case in _SLOW_CASES.get(stem, ())):
            item.add_marker(pytest.mark.slow)
        for what, is_there, cases in _NEEDED:
            if not is_there and any(case in item.name for case in cases.get(stem, ())):
                item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} without {what}"))
    items.sort(key=lambda item: Path(str(item.path)).stem not in _LONG)  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes, servers and browsers that they start."""
    return (os.cpu_count() or 1) + 1


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
