"""The wheel and the sdist hold the whole package, under one name, and work where only they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("update_watch", "callbacks", "dashboards")

pytestmark = pytest.mark.slow


def source_files(repository: Path) -> set[str]:
    """Every file of the package as it should lie in a distribution: 'update_watch/callbacks/lightning.py'."""
    found = set()
    for folder in FOLDERS:
        prefix = "" if folder == "update_watch" else "update_watch/"
        for path in (repository / folder).rglob("*"):  # does not follow the links
            if path.is_file() and path.suffix != ".pyc":
                found.add(prefix + path.relative_to(repository).as_posix())
    return found


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_of_the_repository(to: Path) -> Path:
    """A copy without leftovers of earlier builds, which a build would take in; links stay links."""
    to.mkdir()
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignored)
    for folder in ("tests", "docs", "examples", "bench"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in {".toml", ".md", ".in", ".py", ".txt", ".cff", ".yml", ""}:
            shutil.copy(path, to)
    return to


class Built(NamedTuple):
    repository: Path
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel and the sdist; the wheel is built from the sdist, as an installer without wheels would."""
    folder = tmp_path_factory.mktemp("packaging")
    repository = copy_of_the_repository(folder / "repository")
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", cwd=repository)
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return Built(repository, wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel, and nothing else, is installed."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, built.wheel]
    run(*pip, cwd=target)
    return target


def test_the_wheel_holds_every_file_of_the_package_and_no_other_package(built: Built) -> None:
    names = {name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name}
    assert names == source_files(built.repository)
    assert {"update_watch/callbacks/__init__.py", "update_watch/dashboards/__init__.py"} <= names
    assert "update_watch/py.typed" in names


def test_the_sdist_holds_real_files_instead_of_links(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert source_files(built.repository) <= members.keys()
    assert [name for name, member in members.items() if member.issym() or member.islnk()] == []


def test_an_installed_wheel_imports_from_its_own_files_and_lends_no_top_level_name(installed: Path) -> None:
    code = """if True:
        import pathlib, sys
        import update_watch, update_watch.callbacks, update_watch.dashboards
        for module in (update_watch, update_watch.callbacks, update_watch.dashboards):
            print(pathlib.Path(module.__file__).relative_to(sys.argv[1]).as_posix())
        print((pathlib.Path(update_watch.__file__).parent / "py.typed").exists())
    """
    start = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    assert run(sys.executable, "-c", start + code, installed, cwd=installed.parent).splitlines() == [
        "update_watch/__init__.py",
        "update_watch/callbacks/__init__.py",
        "update_watch/dashboards/__init__.py",
        "True",
    ]
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} <= {"update_watch", "bin"}


def test_every_entry_point_names_something_to_call(installed: Path) -> None:
    code = """if True:
        from importlib.metadata import distribution
        import update_watch
        for point in distribution("update-watch").entry_points:
            print(point.group, point.name, callable(point.load()))
        print("version", update_watch.__version__ == distribution("update-watch").version)
    """
    start = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    lines = run(sys.executable, "-c", start + code, cwd=installed.parent).splitlines()
    assert "console_scripts update-watch True" in lines
    assert lines[-1] == "version True"
    assert [line for line in lines if not line.endswith("True")] == []


def test_a_missing_link_fails_the_build_instead_of_losing_a_folder(tmp_path: Path) -> None:
    repository = copy_of_the_repository(tmp_path / "repository")
    (repository / "update_watch" / "dashboards").unlink()
    with pytest.raises(AssertionError, match="dashboards"):
        run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", cwd=repository)


def test_a_checkout_without_symbolic_links_is_told_what_to_do(tmp_path: Path) -> None:
    """As git leaves it on Windows, and a zip archive: a text file that holds the link's target."""
    repository = copy_of_the_repository(tmp_path / "repository")
    (repository / "update_watch" / "callbacks").unlink()
    (repository / "update_watch" / "callbacks").write_text("../callbacks")
    with pytest.raises(AssertionError, match=r"(?s)should be a link to \.\./callbacks.*git config core\.symlinks true"):
        run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", cwd=repository)


def test_the_sdist_holds_the_tests_with_their_helpers_the_docs_and_the_examples(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path)
    [unpacked] = tmp_path.iterdir()
    for folder in ("tests", "docs", "examples", "bench"):
        held = {path.relative_to(unpacked) for path in (unpacked / folder).rglob("*") if path.is_file()}
        wanted = (path for path in (built.repository / folder).rglob("*") if path.is_file())
        assert {path.relative_to(built.repository) for path in wanted} <= held
    assert (unpacked / "CHANGELOG.md").is_file() and (unpacked / "constraints.txt").is_file()
    code = "import pytest, sys; sys.exit(pytest.main(['-q', '-x', 'tests/test_formats.py', 'tests/checkpoints', '-k', 'not slow']))"
    run(sys.executable, "-c", code, cwd=unpacked)
