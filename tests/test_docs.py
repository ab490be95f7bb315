"""The pages of docs/: links, commands and the file tree are real, and docs/zh/ has the same in Chinese."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from pages import (
    REPOSITORY,
    TREE,
    call_faults,
    chinese_of,
    differences,
    missing_targets,
    parse,
    read,
    tables,
    tree_faults,
)

PAGES = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))
ONLY_ENGLISH = {"docs/comparison.md", "docs/upstream.md"}
TWINS = [name for name in PAGES if "/zh/" not in name and name not in ONLY_ENGLISH]


@pytest.mark.parametrize("name", PAGES)
def test_tables_links_and_commands_of_a_page_are_whole(name):
    text = read(name)
    rows = [line for section in parse(text) for line in tables(section)]
    assert all(a == b or "end" in (a, b) for a, b in pairwise(rows)), rows
    wrong = missing_targets(name, text) + call_faults(text)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("name", TWINS)
def test_a_chinese_page_has_all_that_the_english_one_has(name):
    wrong = differences(read(name), read(chinese_of(name)), name)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_no_chinese_page_is_alone():
    assert sorted(map(chinese_of, TWINS)) == [name for name in PAGES if "/zh/" in name]


@pytest.mark.parametrize("name", [TREE, chinese_of(TREE)])
def test_the_file_tree_is_real(name):
    assert tree_faults(read(name)) == []


def planted(name: str, old: str, new: str) -> str:
    """A page with a fault in it"""
    text = read(name)
    assert old in text, f"{name} no longer has {old!r}: plant this fault in other words"
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (" probe.py,", " prob.py,", "has 'turbo_nb/machine/prob.py'"),
        (" probe.py,", "", "lacks the module 'turbo_nb/machine/probe.py'"),
        ("\n    conv/ ", "\n  conv/ ", "has 'turbo_nb/conv/'"),
        ("\n    norms/ ", "\n      norms/ ", "lacks the module 'turbo_nb/ops/norms/reference.py'"),
        ("  01_setup.ipynb ", "  00_setup.ipynb ", "has 'notebooks/00_setup.ipynb'"),
        ("\n  __init__.py ", "\n  errors.py ", "lacks the module 'turbo_nb/__init__.py'"),
    ],
)
def test_a_fault_in_the_tree_is_found(old, new, words):
    assert any(words in line for line in tree_faults(planted(TREE, old, new)))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (TREE, "  rope.py ", "  pore.py ", "lacks the code line:   pore.py"),
        ("docs/runpod.md", "| `HF_TOKEN` |", "`HF_TOKEN` |", "has a table line that docs/runpod.md has not: row of 3"),
        ("docs/runpod.md", "`TURBO_NB_PORT`", "`TURBO_NB_PORTS`", "lacks the word: `TURBO_NB_PORTS`"),
        ("docs/models.md", "| 19.2 |", "| 19.1 |", "lacks the word: 19.1"),
        ("docs/speed.md", "](batch.md)", "](models.md)", "lacks the target: link docs/models.md"),
    ],
)
def test_a_difference_between_pages_is_told_in_words(name, old, new, words):
    found = differences(planted(name, old, new), read(chinese_of(name)), name)
    assert any(words in line for line in found), found


def test_explanations_in_the_tree_may_differ():
    assert differences(read(TREE), planted(TREE, "the generator\n", "生成器\n"), TREE) == []


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed (the extra docs)")
def test_the_site_is_built_without_a_warning_and_can_be_searched(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # which answers nobody
    built = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | proxy | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    index = json.loads((tmp_path / "search/search_index.json").read_text(encoding="utf-8"))
    assert index["config"]["lang"] == ["en", "zh"]
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == {re.sub(r"index/$", "", f"{name[5:-3]}/") for name in PAGES}
    page = (tmp_path / "zh/speed/index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(https?:[^"]+\.(?:js|css|woff2?))"', page)  # all of it comes from the site


TROUBLE = "docs/troubleshooting.md"
# Texts of other programs, with the installed package whose source has them. None: it is not installed for the tests.
FOREIGN = {
    "TypeError: 'NoneType' object is not callable": None, "rope_apply": None,  # upstream's code without flash_attn
    "ModuleNotFoundError: No module named 'spas_sage_attn'": None,
    "ModuleNotFoundError: No module named 'diffusers'": None,
    "Missing key(s) in state_dict": "torch", "size mismatch for …": "torch",
    "torch.OutOfMemoryError: CUDA out of memory": None, "Killed": None, "No space left on device": None,
    "Failed to find C compiler": "triton", "Bus error": None,
    "error: externally-managed-environment": None, "ResolutionImpossible": "pip", "ensurepip is not available": None,
    "Running as root is not recommended. Use --allow-root to bypass.": "jupyter_server",
    "Invalid credentials": "jupyter_server", "Blocking Cross Origin API request": "jupyter_server",
    "setup.log": None,
}  # fmt: skip


def templates() -> list[str]:
    """The texts of the package and of the start script; a value inside a text is `…`"""
    found = []
    for path in (REPOSITORY / "turbo_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return [*found, re.sub(r"\$\w+", "…", read("runpod_start.sh"))]


def literals() -> list[str]:
    """The texts in the first column of the tables of docs/troubleshooting.md"""
    rows = [line.split(" | ")[0] for section in parse(read(TROUBLE)) for line in section.prose if line.startswith("| ")]
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]


def is_in(literal: str, texts: list[str]) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in literal.split("…")))
    return any(pattern.search(text) for text in texts)


def test_every_error_text_is_one_that_a_program_prints():
    ours = templates()
    assert len(literals()) > 25
    unknown = [text for text in literals() if text not in FOREIGN and not is_in(text, ours)]
    assert unknown == [], "nothing prints these texts; correct them, or add another program's text to FOREIGN"
    assert not is_in("that takes … GB of main memory", ours)  # of an earlier version
    assert set(FOREIGN) - {"setup.log"} <= set(literals()), "FOREIGN has texts that the page lacks"


@pytest.mark.parametrize("text", [text for text, package in FOREIGN.items() if package])
def test_a_text_of_an_installed_program_is_in_its_source(text):
    spec = find_spec(FOREIGN[text])
    if spec is None:
        pytest.skip(f"{FOREIGN[text]} is not installed")
    (folder,) = spec.submodule_search_locations
    files = {"torch": "nn/modules/module.py", "triton": "runtime/build.py"}
    place = files.get(FOREIGN[text])
    paths = [Path(folder, place)] if place else Path(folder).rglob("*.py")
    assert any(text.removesuffix(" …") in path.read_text(encoding="utf-8") for path in paths)


# One word for one thing: Jupyter's kernel is 内核, a GPU's is 核函数, a notebook is 笔记本, offloading is 卸载
NOT_CHINESE = re.compile(
    r"\b(notebooks?|kernels?|8-bit|offload(ing)?|cache)\b|搬移|移出内存|快取|高速缓存|本机的纯|因而也在|只会一件事|若都已知",
    re.IGNORECASE,
)


@pytest.mark.parametrize("name", [chinese_of("README.md"), *map(chinese_of, TWINS)])
def test_a_chinese_page_has_one_word_for_one_thing(name):
    not_prose = r"`[^`]*`|\[[\w./-]+\]\([^)]*\)|\]\([^)]*\)|Kernel → Restart|resident、.*?group"  # plans
    for section in parse(read(name)):
        text = re.sub(not_prose, "", "\n".join([section.title, *section.prose]))
        assert not NOT_CHINESE.findall(text), f"{section.title}: {NOT_CHINESE.search(text)[0]}"


RUNPOD = [
    line for section in parse(read("docs/runpod.md")) for line in section.code if "$" in line or "git clone" in line
]


def with_stubs(line: str, folder: Path, **stubs: str) -> subprocess.CompletedProcess:
    """Run a command of the page, its /workspace in a folder, with programs that only write down what they get"""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in stubs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    line = line.replace("/workspace", str(folder / "workspace")).replace(
        "/post_start.sh", str(folder / "post_start.sh")
    )
    variables = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "IMAGE": "me/turbo_nb:1",
        "RUNPOD_API_KEY": "k",
    }
    return subprocess.run(
        ["bash", "-c", line], cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("line", [line for line in RUNPOD if "git clone" in line])
def test_a_start_command_of_the_runpod_page_clones_once_and_starts(line, tmp_path):
    git = f'mkdir -p "{tmp_path}/workspace/turbo_nb"; echo "$@" >>"{tmp_path}/clones"; ' + (
        f"echo 'echo started' >'{tmp_path}/workspace/turbo_nb/runpod_start.sh'"
    )
    for _ in range(2):
        result = with_stubs(line, tmp_path, git=git)
        assert (result.returncode, result.stdout) == (0, "started\n"), result.stderr
    assert (tmp_path / "clones").read_text().count("\n") == 1


def test_every_path_in_the_clone_of_a_pod_is_real():
    pages = [path for path in (REPOSITORY / "docs").rglob("*") if path.suffix in (".md", ".yaml")]
    found = {
        pair for page in pages for pair in re.findall(r"/workspace/(turbo[-_]nb)\b/?([\w./]*)", page.read_text("utf-8"))
    }
    assert ("turbo_nb", "runpod_start.sh") in found
    assert [pair for pair in found if pair[0] != "turbo_nb" or not (REPOSITORY / pair[1]).exists()] == []


def test_a_start_that_fails_leaves_the_container_running(tmp_path):
    (line,) = [line for line in RUNPOD if line.startswith("bash -c")]
    result = with_stubs(line, tmp_path, git="exit 1", sleep='echo "sleeps $*"')
    assert result.stdout == "sleeps infinity\n" and result.returncode == 0


def test_the_template_command_sends_the_template_with_the_image(tmp_path):
    (line,) = [line for line in RUNPOD if "curl" in line]
    result = with_stubs(line, tmp_path, curl=f'printf "%s\\n" "$@" >"{tmp_path}/arguments"; cat')
    wanted = json.loads(read("runpod-template.json")) | {"imageName": "me/turbo_nb:1"}
    assert json.loads(result.stdout) == wanted and "Authorization: Bearer k" in (tmp_path / "arguments").read_text()
