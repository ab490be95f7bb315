"""What pip installs: a wheel with everything in it, and notebooks that `turbo-nb notebooks` copies."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer.testing

from turbo_nb import cli
from turbo_nb.errors import TurboNbError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.name: path.read_bytes() for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def copy(*arguments: object) -> str:
    """Run `turbo-nb notebooks` in this process: what it prints. Raises what the command raises."""
    result = typer.testing.CliRunner().invoke(cli.app, ["notebooks", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_notebooks_are_copied_and_a_second_time_left_alone(tmp_path):
    folder = tmp_path / "new/books"
    assert copy(folder).split() == [str(folder / name) for name in NOTEBOOKS]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NOTEBOOKS
    before = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    (folder / "05_batch.ipynb").unlink()
    assert copy(folder).split() == [str(folder / "05_batch.ipynb")]
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())][:-1] == before[:-1]


def test_a_changed_notebook_is_not_overwritten_and_nothing_is_written(tmp_path):
    changed = tmp_path / "04_generate.ipynb"
    changed.write_text('{"cells": []}')
    with pytest.raises(TurboNbError, match=r"04_generate.ipynb.* differs .*Expected .*Take another folder"):
        copy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [changed.name] and changed.read_text() == '{"cells": []}'


@pytest.mark.parametrize("kind", ["file", "below a file", "folder for a notebook"])
def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path, kind):
    (tmp_path / "file").touch()
    (tmp_path / "folder/01_setup.ipynb").mkdir(parents=True)
    folder = tmp_path / {"file": "file", "below a file": "file/x", "folder for a notebook": "folder"}[kind]
    with pytest.raises(TurboNbError, match="Expected"):
        copy(folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the files of a source distribution, as a release builds it"""
    folder = tmp_path_factory.mktemp("wheel")
    (source := folder / "source").mkdir()  # because a build writes metadata beside the package, which other tests read
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("turbo_nb", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    code = (
        "import os, sys, tarfile; from setuptools import build_meta; out = sys.argv[1];"
        "archive = tarfile.open(os.path.join(out, build_meta.build_sdist(out)));"
        "archive.extractall(out, filter='data'); os.chdir(archive.getnames()[0].join((out + '/', '')));"
        "build_meta.build_wheel(out)"
    )
    built = subprocess.run([sys.executable, "-c", code, folder], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_has_the_model_the_notebooks_and_the_parts_of_the_page(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = (path for path in (ROOT / "turbo_nb").rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    assert [path for path in files if path.relative_to(ROOT).as_posix() not in names] == []
    assert {f"turbo_nb/assets/notebooks/{name}" for name in NOTEBOOKS} < names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "recipes"))]


def test_an_installed_wheel_copies_its_own_notebooks(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, 'site'); from turbo_nb.cli import run; run()"
    command = [sys.executable, "-c", code, "notebooks", "books"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "books").iterdir()} == NOTEBOOKS
