"""The pages of docs/: links, commands and the file tree are real, and docs/zh/ has the same in Chinese."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

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
        ("docs/models.md", "| 17.9 |", "| 17.7 |", "lacks the word: 17.7"),
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
