"""The journal: whatever happens to the process, the disk or the file, what was written stays readable."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.journals import environment, steps, tiny, write
from tests.support.run_samples import fully_filled_report
from update_watch.dashboards.journal import Journal, JournalError, packing, read_journal
from update_watch.dashboards.journal.packing import PACKED_FROM

ROOT = Path(__file__).parents[3]


# --- damage --------------------------------------------------------------------------------------------


def test_damaged_lines_are_skipped_and_named(tmp_path):
    path = write(tmp_path / "j.jsonl", *(tiny(10 * n) for n in range(1, 9)))
    lines = path.read_bytes().splitlines()
    lines[3] = lines[3][:50]
    lines[5] = lines[5].replace(b'"health":"hh"', b'"health":"hx"')
    lines[7] = b"[1, 2]"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"3 damaged lines were skipped \(line 4, 6, 8;"):
        assert steps(path) == [10, 30, 50, 70, 80]


def test_windows_whose_table_of_tensors_is_damaged_are_named(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10))
    lines = path.read_bytes().splitlines()
    lines[1] = b"{}..."
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"2 damaged lines were skipped \(line 2, 3;"):
        assert steps(path) == []


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(JournalError, match="notes.txt is not an update-watch journal: none of its 2 lines can be read"):
        steps(path)


def test_a_file_that_is_no_journal_is_not_written_to(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(JournalError, match=r"notes\.txt'\): the file is there already and is not .* Give another path"):
        write(path, tiny(10))
    assert path.read_text() == "one\ntwo\n"


def test_a_journal_of_a_newer_version_is_neither_read_nor_continued(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10))
    text = path.read_text().replace('"schema":2', '"schema":7')
    path.write_text(text)
    message = (
        r"j\.jsonl was written by a newer update-watch: its schema is version 7, .* up to 2\. Upgrade: pip install -U"
    )
    with pytest.raises(JournalError, match=message):
        steps(path)
    with pytest.raises(JournalError, match=message):
        write(path, tiny(20))
    assert path.read_text() == text


def test_lines_of_a_kind_not_known_are_passed_over(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10))
    with path.open("a") as file:
        file.write('{"kind":"note","text":"of a later version"}\n')
    assert steps(write(path, tiny(20))) == [10, 20]


def _mutations() -> Any:
    garbage = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just([]), st.just({})
    )
    deeper = st.recursive(
        garbage, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
    )
    return st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 30), max_size=5), deeper), min_size=1, max_size=3
    )


@pytest.mark.parametrize("packed_from", [1, PACKED_FROM], ids=["packed", "lists"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=_mutations(), cut=st.integers(0, 4000), noise=st.binary(max_size=6))
def test_no_content_of_a_file_raises_anything_but_a_journal_error(tmp_path, packed_from, mutations, cut, noise):
    lines = [json.loads(line) for line in _full_journal(tmp_path, packed_from).splitlines()]
    for which, route, value in mutations:
        _replace(lines, which, route, value)
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path = tmp_path / "fuzzed.jsonl"
    path.write_bytes(data[:cut] + noise + data[cut:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            for report in read_journal(path):
                report.to_dict()
        except JournalError:
            pass


def _full_journal(tmp_path: Path, packed_from: int) -> bytes:
    path = tmp_path / "full.jsonl"
    if not path.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "PACKED_FROM", packed_from)
            write(path, fully_filled_report())
    return path.read_bytes()


def _replace(node: Any, which: int, route: list[int], value: Any) -> None:
    """Put `value` somewhere into line `which`, following `route` as far as it leads."""
    key: Any = which
    for turn in route:
        child = node[key]
        keys = list(child) if isinstance(child, dict) else list(range(len(child))) if isinstance(child, list) else []
        if not keys:
            break
        node, key = child, keys[turn % len(keys)]
    node[key] = value


# --- a disk that fails -----------------------------------------------------------------------------------


def test_a_full_disk_raises_once_and_leaves_a_readable_file(tmp_path):
    script = """
        import resource, sys, warnings
        from pathlib import Path
        sys.path.insert(0, ".")
        from tests.support.run_samples import synthetic_run
        from update_watch.dashboards.journal import Journal, read_journal
        from update_watch.worker import Sinks
        path = Path(sys.argv[1])
        journal, calls = Journal(path), []
        def sink(report):
            calls.append(report.step)
            journal(report)
        sinks = Sinks([sink])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # every byte beyond is refused, as by a full disk
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for report in synthetic_run(windows=8):
                sinks(report)
        assert len(calls) < 8 and path.read_bytes().endswith(b"\\n"), calls
        assert [r.step for r in read_journal(path)] == calls[:-1], calls
        assert len(seen) == 1 and "OSError(27" in str(seen[0].message), seen
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path / "j.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_raises_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Journal(tmp_path / "file" / "j.jsonl")(tiny(10))
