"""Write the link "Open in Colab" and the set-up cell into every notebook.

    python .ci/colab.py            # print the notebooks that have others
    python .ci/colab.py --write    # write them

The address of the repository is `Repository` under `[project.urls]` in pyproject.toml, and nowhere else. Without it the
link leads to Colab's own search on GitHub, and the cell asks for the address.
"""

import json
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def address() -> str:
    """Return the repository's address, "" where pyproject.toml does not name it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


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
    """Print the notebooks that differ, and with --write replace them. Returns the exit code."""
    different = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        source = path.read_text(encoding="utf-8")
        wanted = with_colab(path.name, source, address())
        if wanted != source:
            different.append(path)
            if "--write" in sys.argv:
                path.write_text(wanted, encoding="utf-8")
    print(*(path.relative_to(ROOT) for path in different), sep="\n", end="\n" if different else "")
    return 1 if different and "--write" not in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
