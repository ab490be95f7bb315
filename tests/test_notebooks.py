"""The notebooks open in Colab: a link, a set-up cell that does nothing elsewhere, and the packages for it.

The repository's address is in one place, and reaches the notebooks, the pages and the template from there.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement

from turbo_nb.machine import environment

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/someone/turbo_nb"
_spec = importlib.util.spec_from_file_location("addresses", ROOT / ".ci/address.py")
addresses = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(addresses)


def test_every_notebook_has_the_link_and_the_cell_and_nothing_else_changed():
    result = subprocess.run([sys.executable, ROOT / ".ci/address.py"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "") and len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        title, setup, parameters = json.loads(path.read_text(encoding="utf-8"))["cells"][:3]
        assert "[Open in Colab]" in title["source"][2] and setup["metadata"]["tags"] == ["colab"]
        assert parameters["metadata"]["tags"] == ["parameters"]


def test_the_address_in_pyproject_reaches_the_link_and_the_cell():
    path = NOTEBOOKS[0]
    made = addresses.with_colab(path.name, path.read_text(encoding="utf-8"), ADDRESS)
    title, setup = json.loads(made)["cells"][:2]
    link = f"https://colab.research.google.com/github/someone/turbo_nb/blob/main/notebooks/{path.name}"
    assert f"[Open in Colab]({link})\n" in title["source"] and f'REPOSITORY = "{ADDRESS}"' in "".join(setup["source"])
    assert addresses.with_colab(path.name, made, addresses.address()) == path.read_text(encoding="utf-8")


def test_the_address_reaches_the_pages_the_image_and_the_template():
    for name in addresses.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        made = addresses.with_address(text, "https://github.com/Some-One/turbo_nb", "9.8.7")
        assert "REPOSITORY" not in made and "REGISTRY" not in made and "turbo_nb:0.1.0" not in made
        images = re.findall(r"ghcr\.io[^\s|\"`]*", made)
        assert set(images) <= {"ghcr.io/some-one", "ghcr.io/some-one/turbo_nb:9.8.7"} and (
            images or "git clone https://github.com/" in made
        )
        assert addresses.with_address(made, "https://github.com/Some-One/turbo_nb", "9.8.7") == made
    assert addresses.with_line("a: 1\n", "repo_url", ADDRESS) == f"a: 1\nrepo_url: {ADDRESS}\n"
    assert addresses.with_line(f"repo_url: {ADDRESS}\na: 1\n", "repo_url", "") == "a: 1\n"


RUN = """
import sys
from IPython.core.interactiveshell import InteractiveShell
result = InteractiveShell.instance().run_cell(sys.stdin.read())
print("google.colab" in sys.modules, type(result.error_in_exec).__name__)
import os
print(os.getcwd())
"""


def run_cell(tmp_path, address: str, **variables) -> tuple[list[str], list[str]]:
    """Run the set-up cell in a shell whose git and pip only write down how they were called."""
    calls, content = tmp_path / "calls", tmp_path / "content"
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin/git"
    git.write_text(f'#!/bin/sh\necho "git $*" >>{calls}\nmkdir -p {content}/turbo_nb/notebooks\n')
    git.chmod(0o755)
    (tmp_path / "site/pip").mkdir(parents=True)
    (tmp_path / "site/pip/__init__.py").touch()
    pip = f"import sys\nopen({str(calls)!r}, 'a').write('pip ' + ' '.join(sys.argv[1:]) + chr(10))"
    (tmp_path / "site/pip/__main__.py").write_text(pip)
    cell = addresses.CELL.format(address=address).replace("/content", str(content))
    kept = {name: value for name, value in os.environ.items() if name != "COLAB_RELEASE_TAG"}
    result = subprocess.run(
        [sys.executable, "-c", RUN], input=cell, capture_output=True, text=True, cwd=tmp_path,
        env=kept | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "site"),
                    "IPYTHONDIR": str(tmp_path / "ipython"), **variables},
    )  # fmt: skip
    return result.stdout.splitlines()[-2:], calls.read_text().splitlines() if calls.exists() else []


def test_the_cell_installs_in_colab_and_keeps_its_torch(tmp_path):
    (_, folder), calls = run_cell(tmp_path, ADDRESS, COLAB_RELEASE_TAG="release-colab-external_20260819")
    content = tmp_path / "content/turbo_nb"
    torch = environment.version("torch")
    assert calls == [
        f"git clone --quiet --depth 1 {ADDRESS} {content}", f"pip install --quiet torch=={torch} {content}[colab]",
    ]  # fmt: skip
    assert folder == str(content / "notebooks")


def test_the_cell_asks_for_the_address_where_the_project_has_none(tmp_path):
    (outcome, _), calls = run_cell(tmp_path, "", COLAB_RELEASE_TAG="release-colab-external_20260819")
    assert outcome.endswith("AssertionError") and calls == []


def test_the_cell_does_nothing_outside_colab(tmp_path):
    (outcome, folder), calls = run_cell(tmp_path, "")
    assert outcome == "False NoneType" and folder == str(tmp_path) and calls == []


@pytest.mark.parametrize("in_colab", [True, False])
def test_the_doctor_asks_for_the_packages_of_the_place(monkeypatch, in_colab):
    """Colab's own ipykernel 6.17.1 is older than the notebook extra wants, and may not be replaced."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {extra: {Requirement(line).name for line in extras[extra]} for extra in ("notebook", "colab")}
    assert names["colab"] < names["notebook"] and not names["colab"] & {"ipykernel", "jupyterlab", "voila"}
    lines = [f"{line}; extra == '{extra}'" for extra in names for line in extras[extra]]
    ours = SimpleNamespace(requires=lines, metadata={"Requires-Python": ">=3.11"})
    monkeypatch.setattr(environment.metadata, "distribution", lambda name: ours)
    monkeypatch.setattr(environment, "version", lambda name: "1.0")
    monkeypatch.setattr(environment, "in_notebook", lambda: True)
    monkeypatch.setattr(environment, "place", lambda: "Colab" if in_colab else "Jupyter")
    needed = {package.name for package in environment.needed_packages()}
    assert needed == {"Python", *names["colab" if in_colab else "notebook"]}


def test_conda_and_the_image_install_what_the_notebooks_need():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (pip,) = [one["pip"] for one in conda if isinstance(one, dict)]
    assert pip == ["-e .[notebook,dev]"] and "turbo_nb[notebook,ray]" in (ROOT / "Dockerfile").read_text(
        encoding="utf-8"
    )


def test_the_first_notebook_ends_at_the_generator_after_one_table_of_models():
    cells = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "widgets.show(" in code[-1] and "turbo_nb.play(path, width=640)" in "".join(code)
    assert "".join(code).count('"Models"') == 1
