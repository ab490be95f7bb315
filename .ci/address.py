"""Write the repository's address, its image and the version into the pages, the notebooks and RunPod's template.

    python .ci/address.py            # print the files that have others
    python .ci/address.py --write    # write them

The address is `Repository` under `[project.urls]` in pyproject.toml, and nowhere else. The image is the one that
.github/workflows/release.yml publishes for that address. Without an address the pages have the words REPOSITORY and
REGISTRY. A notebook's link then leads to Colab's own search on GitHub, and its set-up cell asks for the address.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "README.zh-CN.md",
    "docs/runpod.md",
    "docs/zh/runpod.md",
    "docs/kuberay.yaml",
    "runpod-template.json",
)
LINES = {"CITATION.cff": "repository-code", "mkdocs.yml": "repo_url"}  # what a file calls the address
COLAB = "https://colab.research.google.com/github/"
MARK = "[Open in Colab]"
# torch is named with Colab's version, because pip must fail rather than replace it. An editable install would need a
# restart of the kernel.
CELL = """\
# In Colab this cell installs turbo_nb and keeps Colab's torch. Anywhere else it does nothing.
import os

REPOSITORY = "{address}"  # what git clones
if "COLAB_RELEASE_TAG" in os.environ:
    from importlib.metadata import version

    assert REPOSITORY, "Set REPOSITORY to this repository's address, such as https://github.com/NAME/turbo_nb"
    if not os.path.exists("/content/turbo_nb"):
        !git clone --quiet --depth 1 {{REPOSITORY}} /content/turbo_nb
    %pip install --quiet "torch=={{version('torch')}}" "/content/turbo_nb[colab]"
    %cd -q /content/turbo_nb/notebooks"""


def project() -> dict:
    """Return what pyproject.toml has under `project`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def address() -> str:
    """Return the repository's address, "" where pyproject.toml does not name it."""
    return project().get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def with_address(text: str, repository: str, version: str) -> str:
    """Return a page with the address, the registry and the version in its commands."""
    if repository:
        owner = repository.split("/")[-2].lower()  # because the names of images have no capitals
        text = re.sub(r"\bREPOSITORY\b", repository, text)
        text = re.sub(r"\bREGISTRY\b", f"ghcr.io/{owner}", text)
    return re.sub(r"(?<=/turbo_nb:)\d[\w.]*(?<!\.)", version, text)


def with_line(text: str, key: str, repository: str) -> str:
    """Return a YAML file with its line about the address, or without it."""
    rest = re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE)
    return f"{rest}{key}: {repository}\n" if repository else rest


def link(name: str, repository: str) -> str:
    """Return the line of a notebook's first cell that opens it in Colab."""
    owner_and_name = repository.partition("https://github.com/")[2]
    if owner_and_name:
        return f"{MARK}({COLAB}{owner_and_name}/blob/main/notebooks/{name})"
    return f"{MARK}({COLAB}): enter this repository's address there."


def with_colab(name: str, source: str, repository: str) -> str:
    """Return a notebook's JSON with the link under its title and the set-up cell as its first code cell."""
    notebook = json.loads(source)
    title, *cells = notebook["cells"]
    lines = "".join(title["source"]).splitlines()
    rest = [line for line in lines[1:] if not line.startswith(MARK)]
    while rest and not rest[0]:
        rest.pop(0)
    title["source"] = "\n".join([lines[0], "", link(name, repository), "", *rest]).splitlines(keepends=True)
    cells = [cell for cell in cells if "colab" not in cell["metadata"].get("tags", ())]
    code = CELL.format(address=repository).splitlines(keepends=True)
    setup = {
        "cell_type": "code", "execution_count": None, "metadata": {"tags": ["colab"]}, "outputs": [], "source": code,
    }  # fmt: skip
    notebook["cells"] = [title, setup, *cells]
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = str(number)  # as nbstripout numbers them
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Print the files that differ, and with --write replace them. Returns the exit code."""
    different, repository, version = [], address(), project()["version"]
    for path in (*sorted((ROOT / "notebooks").glob("*.ipynb")), *(ROOT / name for name in (*PAGES, *LINES))):
        source = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            wanted = with_colab(path.name, source, repository)
        elif key := LINES.get(path.name):
            wanted = re.sub(
                r"^version:.*", f"version: {version}", with_line(source, key, repository), flags=re.MULTILINE
            )
        else:
            wanted = with_address(source, repository, version)
        if wanted != source:
            different.append(path)
            if "--write" in sys.argv:
                path.write_text(wanted, encoding="utf-8")
    print(*(path.relative_to(ROOT) for path in different), sep="\n", end="\n" if different else "")
    return 1 if different and "--write" not in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
