"""The prose checker finds each kind of fault in each kind of file, and leaves good text alone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / ".ci/prose.py"
LONG = "The reader of this text counts words " + "and counts words " * 7  # 28 words


def load():
    spec = importlib.util.spec_from_file_location("prose", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prose"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


prose = load()


def findings(folder: Path, name: str, text: str) -> list[str]:
    """What is found in a file with this name and text, without the folder."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return [line.removeprefix(f"{path}:") for line in prose.check([path])[0]]


@pytest.mark.parametrize(
    "sentence",
    [
        "The user is told of it.",
        "That was said before.",
        "What the plan was told is here.",
        "It is a guess and says so.",
        "A line that mends it.",
        "The plan heeds memory.",
        "This is no video.",
        "There is none.",
        "These are no images.",
        "The others have none.",
        "Shapes that are none's.",
        "As it has it, the plan stays.",
        "A width goes along.",
        "A plan that moves is worth a line.",
        "What is decoded is encoded.",
        "It is what is left.",
        "Of these the plain ones.",
        "It takes the first that fits.",
        "It has a constant, which nothing reads.",
        "All of it but for the script.",
    ],
)
def test_a_banned_phrase_is_found(tmp_path, sentence):
    (found,) = findings(tmp_path, "text.md", f"Good text.\n\n{sentence}\n")[:1]
    assert found.startswith("3: '") and found.endswith(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "It is no longer supported.",
        "The value is None by default.",
        "It is not a video.",
        "The model does not exist.",
        "Nonetheless it works.",
        "Use `is told` here.",
        "The cost is no more than a copy.",
        "He amended the rule.",
    ],
)
def test_a_phrase_that_only_looks_banned_may_stay(tmp_path, sentence):
    assert findings(tmp_path, "text.md", sentence) == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("text.md", "# Title\n\nShort.\n" + LONG + ".\n", 4),
        ("text.md", "- one\n- " + LONG.replace("counts", "counts\n ", 3) + ".\n", 2),
        ("module.py", f'"""Do it.\n\n{LONG}.\n"""\n', 3),
        ("module.py", f'def f():\n    """\n    {LONG}.\n    """\n', 3),
        ("module.py", f'class A:\n    """Do it.\n\n    Args:\n        a: short.\n        b: {LONG}.\n    """\n', 6),
        ("module.py", f"a = 1\n# {LONG[:40]}\n# {LONG[40:]}.\n", 2),
        ("module.py", f"a = 1  # {LONG}.\n", 1),
        ("module.py", f'raise ValueError("{LONG}.")\n', 1),
        ("module.py", f'raise ValueError(f"{{a}} is 1. {LONG}.")\n', 1),
        ("module.py", f'option("a", help="{LONG}.")\n', 1),
        ("script.sh", f"#!/bin/bash\n# {LONG}.\n", 2),
        ("script.sh", f"a=1 # {LONG}.\n", 1),
        ("book.ipynb", json.dumps({"cells": [{"cell_type": "markdown", "source": ["# A\n", "\n", LONG]}]}), 3),
        ("book.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": ["a = 1\n", f"# {LONG}"]}]}), 2),
    ],
)
def test_a_long_sentence_is_found_with_its_line(tmp_path, name, text, line):
    (found,) = findings(tmp_path, name, text)
    assert found.startswith(f"{line}: 28 words, at most 25: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text.md", f"```\n{LONG}.\n```\n"),
        ("text.md", f"| a | b |\n|---|---|\n| {LONG} | b |\n"),
        ("text.md", f"<!-- {LONG} -->\n"),
        ("text.md", LONG[:40] + ".\n" + LONG[40:] + ".\n"),
        ("text.md", "".join(f"- {word}\n" for word in LONG.split())),
        ("text.md", f"See `{LONG}`, [this](https://a.b/{LONG.replace(' ', '/')}).\n"),
        ("text.md", "Shapes (B, L, H, D), " + "(batch, length, heads), " * 9 + "y = a * x + b - c / d + e - f * g.\n"),
        ("module.py", f'"""Show it.\n\nSuch as:\n\n    {LONG}\n"""\n'),
        ("module.py", f'"""Show it.\n\nload   {LONG}\n│ {LONG}\n"""\n'),
        ("module.py", '"""Do it.\n\nArgs:\n' + "".join(f"    a{n}: {LONG[:40]}\n" for n in range(9)) + '"""\n'),
        ("module.py", f'text = "{LONG}; and; so; on, there is none."\n'),
        ("module.py", '# First, a comment of some words\na = 1\n# and here another comment of some words\n' * 5),
        ("module.py", "# noqa: E501\n# fmt: skip\n# ---- a heading\n"),
        ("script.sh", f'a="# {LONG[:10]}"\n'),
    ],
)  # fmt: skip
def test_code_tables_drawings_and_short_sentences_are_left_alone(tmp_path, name, text):
    assert findings(tmp_path, name, text) == []


def test_a_list_of_facts_joined_by_semicolons_is_found(tmp_path):
    assert findings(tmp_path, "text.md", "One; two.") == []
    assert findings(tmp_path, "text.md", "One; two; three.") == ["1: 2 semicolons, at most 1: One; two; three."]


def test_abbreviations_end_no_sentence():
    assert [text for _, text in prose.sentences("Use one, e.g. a plan vs. none. It fits. `x`")] == [
        "Use one, e.g. a plan vs. none.", "It fits.", "`x`",
    ]  # fmt: skip


def test_names_numbers_and_formulas_are_no_words():
    assert prose.count_words("a turbo_nb model's re-used plan.py takes 3.5 GB: q = k^2 / sqrt(d), x and y") == 6


def test_the_allow_list_lets_one_sentence_stay(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("There is none here.\n\nThere is none there.\n")
    entry = prose.Allowed(path=str(path), text="none here", reason="the test needs it")
    other = prose.Allowed(path=str(path), text="elsewhere", reason="the test needs it")
    found, used = prose.check([path], [entry, other])
    assert [line.split(":")[1] for line in found] == ["3"] and used == {entry}
    assert all(entry.reason for entry in prose.ALLOWED)


def test_folders_are_searched_and_translations_left_out(tmp_path):
    for name in ("a.py", "README.zh-CN.md", "__pycache__/b.py", "c/d.md", "e.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# There is none.\n")
    assert [Path(line.split(":")[0]).name for line in prose.check([tmp_path])[0]] == ["a.py", "d.md"]


def test_the_command_prints_findings_and_fails(tmp_path):
    def run(*paths):
        return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True, cwd=tmp_path)

    (tmp_path / "bad.md").write_text("There is none.\n")
    (tmp_path / "good.md").write_text("It does not exist.\n")
    bad = run("bad.md", "good.md")
    assert bad.returncode == 1 and bad.stdout.count("\n") == 1 and "bad.md:1: 'is none'" in bad.stdout
    good = run("good.md")
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    absent = run("absent.md")
    assert absent.returncode != 0 and "absent.md does not exist" in absent.stderr


def test_all_that_the_whole_check_reads_is_here():
    assert [name for name in prose.CHECKED if not (REPOSITORY / name).exists()] == []
