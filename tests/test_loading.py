"""What is loaded when a layer is imported: tried in fresh interpreters, as this one has everything loaded.

An optional package that is not installed at all would make a claim here hold by itself; that the
check does see an import is shown beside it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

OPTIONAL = {
    "accelerate",
    "altair",
    "jinja2",
    "lightning",
    "pandas",
    "pytorch_lightning",
    "rich",
    "triton",
    "transformers",
    "vl_convert",
    "wandb",
    "wandb_workspaces",
}


def modules_of(folder: Path, package: str) -> list[str]:
    """Every module below `folder`, links not followed."""
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if path.stem[:2] != "__" and not any(part in ("callbacks", "dashboards") for part in parts):
            names.append(".".join((package, *parts)))
    return names


# what is loaded where it can be used, and nowhere else
ON_USE = {
    "update_watch.measure.device.bf16_rounding",
    "update_watch.measure.device.gather_kernel",
    "update_watch.measure.ledger.sheet_kernel",
    "update_watch.measure.sums.packing_kernel",
    "update_watch.measure.sums.sums_kernel",
}
CORE = [name for name in modules_of(ROOT / "update_watch", "update_watch") if name not in ON_USE]
DASHBOARDS = modules_of(ROOT / "dashboards", "update_watch.dashboards")


@functools.cache  # a fresh interpreter with torch takes seconds
def loaded_by(*stages: str) -> tuple[frozenset[str], ...]:
    """Names of all modules in a fresh interpreter, in the repository, after each piece of code."""
    tell = "import json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(f"{code}\n{tell}" for code in stages)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, f"{stages!r} do not run:\n{run.stderr}"
    return tuple(frozenset(json.loads(line)) for line in run.stdout.splitlines()[-len(stages) :])


def packages(modules: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def imports(names: list[str]) -> str:
    return "\n".join(f"import {name}" for name in names)


FUNCTIONS = """
import update_watch.watch, update_watch.audit.audit
from update_watch import audit, watch
assert callable(uw.watch) and callable(uw.audit) and (uw.watch, uw.audit) == (watch, audit)
assert uw.Watch.__module__ == "update_watch.watch" and uw.formats.BF16
assert set(uw.__all__) <= set(dir(uw))
"""
# one after another: the vocabulary, torch itself, a watch, all of the core
STAGES = (
    "import update_watch as uw\nassert uw.Health.healthy.value == 'healthy'",
    "import torch, numpy, torch.optim",
    "uw.watch",
    f"{FUNCTIONS}\n{imports(['update_watch', *CORE])}",
)
UPPER = (
    "import update_watch.dashboards.journal.journal, update_watch.dashboards.terminal",
    imports(["update_watch.dashboards", *DASHBOARDS]),
)


def test_names_are_loaded_when_they_are_asked_for_and_functions_win_over_modules_of_their_name() -> None:
    names, torch, watch, _ = loaded_by(*STAGES)
    assert "torch" not in names and "update_watch.watch" not in torch and "update_watch.watch" in watch


def test_a_watch_loads_nothing_of_torch_that_takes_a_second() -> None:
    slow = {"sympy", "torch.distributed.tensor", "torch._dynamo", "torch._inductor", "triton"}
    _, torch, watch, _ = loaded_by(*STAGES)
    assert torch & slow == set(), "torch itself loads it: this test says nothing"
    assert watch & slow == set()


def test_the_core_loads_no_optional_package_and_no_upper_layer() -> None:
    assert len(CORE) > 10, "the core's modules were not found"
    *_, modules = loaded_by(*STAGES)
    assert set(CORE) <= modules
    assert packages(modules) & OPTIONAL == set()
    assert {name for name in modules if name.startswith(("update_watch.callbacks", "update_watch.dashboards"))} == set()


def test_dashboards_load_neither_optional_packages_nor_callbacks() -> None:
    assert len(DASHBOARDS) > 5, "the dashboards' modules were not found"
    some, modules = loaded_by(*UPPER)
    assert "torch" not in some
    assert set(DASHBOARDS) <= modules
    assert packages(modules) & OPTIONAL == set()
    assert {name for name in modules if name.startswith("update_watch.callbacks")} == set()


CALLBACKS = "import update_watch.callbacks, update_watch.callbacks.automatic\ndir(update_watch.callbacks)"


def test_callbacks_load_no_trainer_before_one_is_asked_for() -> None:
    (modules,) = loaded_by(CALLBACKS)
    assert packages(modules) & OPTIONAL == set()
    assert {name for name in modules if name.startswith("update_watch.dashboards")} == set()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_a_trainers_callback_loads_that_trainer_and_no_dashboard(trainer: str) -> None:
    pytest.importorskip(trainer)
    (modules,) = loaded_by(f"from update_watch.callbacks.{trainer} import UpdateWatch")
    assert trainer in packages(modules), "the check does not see imports"
    assert {name for name in modules if name.startswith("update_watch.dashboards")} == set()


def test_the_upper_layers_import_themselves_by_one_name() -> None:
    # in a checkout, and only there, `import callbacks` works too: every module would exist twice
    modules = loaded_by(CALLBACKS)[0] | loaded_by(*UPPER)[-1]
    assert {"callbacks", "dashboards"} & packages(modules) == set()


def test_meta_the_check_sees_an_import_made_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "innocent.py").write_text("def f():\n    import wave\nf()\n")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    first, then = loaded_by(before, "import innocent")
    assert "wave" not in first and "wave" in then


def test_meta_code_that_fails_is_a_failure_not_an_empty_answer() -> None:
    with pytest.raises(AssertionError, match="no_such_module"):
        loaded_by("import no_such_module")
