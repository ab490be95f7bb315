"""README.md keeps its word: commands, links and file tree are real, and README.zh-CN.md says the same in Chinese."""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import dropwhile, pairwise, zip_longest
from pathlib import Path

import pytest
import typer.main

from turbo_nb import cli

REPOSITORY = Path(__file__).parents[1]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@dataclass(kw_only=True)
class Section:
    """A heading with what stands under it; `code` has the lines inside fences, each fence's first line among them."""

    level: int = 0
    title: str = "the first lines"
    prose: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


def parse(text: str) -> list[Section]:
    sections, fence = [Section()], None
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
            if fence:
                sections[-1].code.append(fence)
        elif fence == "```":  # the file tree: names, two spaces or more, an explanation
            sections[-1].code.append(re.split(r"(?<=\S)\s{2,}", line)[0])
        elif fence:
            sections[-1].code.append(re.sub(r"(^|\s+)#(\s.*|$)", "", line))
        elif heading := re.match(r"(#+) (.+)", line):
            sections.append(Section(level=len(heading[1]), title=heading[2]))
        else:
            sections[-1].prose.append(line)
    return sections


def links(section: Section) -> list[str]:
    """`image TARGET` and `link TARGET`, but for the link to the other language."""
    found = re.findall(r'(!\[[^\]]*)?\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', "\n".join(section.prose))
    named = [f"{'image' if image else 'link'} {target or html}" for image, target, html in found]
    return [name for name in named if name not in (f"link {ENGLISH}", f"link {CHINESE}")]


def tables(section: Section) -> list[str]:
    """The tables' rows by their number of columns, and where each table ends."""
    lines = re.sub(r"\\\||`[^`\n]*`", "", "\n".join(section.prose)).splitlines()
    found = [f"row of {line.count('|') - 1} columns" if line.startswith("|") else "" for line in [*lines, ""]]
    return [row or "end" for row, last in zip(found, ["", *found], strict=False) if row or last]


def facts(section: Section) -> list[str]:
    """What no translation changes: inline code and numbers."""
    prose = re.sub(r"\]\([^)]*\)", "]", " ".join(section.prose))
    return sorted(set(re.findall(r"`[^`]+`|\d+(?:\.\d+)*", prose)))


def differences(english: str, chinese: str) -> list[str]:
    """What the Chinese README lacks or has too much, a line each."""
    sections, others = parse(english), parse(chinese)
    if [s.level for s in sections] != [s.level for s in others]:
        pairs = zip_longest(
            *([f"{'#' * s.level} {s.title}" for s in part[1:]] for part in (sections, others)), fillvalue="(none)"
        )
        return [f"the levels of the headings differ: {ENGLISH} | {CHINESE}", *(f"{a} | {b}" for a, b in pairs)]
    wrong = []
    for ours, theirs in zip(sections, others, strict=True):
        for kind, pick in {
            "code line": lambda s: s.code, "table line": tables, "target": lambda s: sorted(links(s)), "word": facts,
        }.items():  # fmt: skip
            a, b = pick(ours), pick(theirs)
            for _, i, i_end, j, j_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
                if a[i:i_end] != b[j:j_end]:
                    place = f"under '{ours.title}' ({theirs.title}) {CHINESE}"
                    wrong += [f"{place} lacks the {kind}: {item}" for item in a[i:i_end]]
                    wrong += [f"{place} has a {kind} that {ENGLISH} has not: {item}" for item in b[j:j_end]]
    return wrong


def missing_targets(name: str, text: str) -> list[str]:
    targets = [link.split(" ", 1)[1].partition("#")[0] for section in parse(text) for link in links(section)]
    absent = [t for t in targets if not re.match(r"[a-z]+:", t) and not (REPOSITORY / t).exists()]
    return [f"{name} points at '{target}', which is not here" for target in absent]


def tree(text: str) -> list[str]:
    """The paths in the file tree; two spaces in front of a name are one folder deeper, and a line may have many."""
    code = next(section.code for section in parse(text) if "turbo_nb/" in section.code)
    paths, folders = [], []
    for line in code[code.index("turbo_nb/") :]:
        names = line.strip().split(", ")
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        paths += ["".join((*folders, name)) for name in names]
        if names[-1].endswith("/"):
            folders.append(names[-1])
    return paths


def tree_faults(text: str) -> list[str]:
    paths = tree(text)
    modules = [path.relative_to(REPOSITORY).as_posix() for path in sorted((REPOSITORY / "turbo_nb").rglob("*.py"))]
    shown = [path for path in modules if path.count("/") == 1 or not path.endswith("/__init__.py")]
    return [f"the file tree has '{path}', which is not here" for path in paths if not (REPOSITORY / path).exists()] + [
        f"the file tree lacks the module '{path}'" for path in shown if path not in paths
    ]


def calls(text: str) -> Iterator[list[str]]:
    """The words after each `turbo-nb`, in shell blocks and in inline code."""
    for section in parse(text):
        inline = re.findall(r"`(turbo-nb [^`]+)`", "\n".join(section.prose))
        for line in [*(line for line in section.code if "turbo-nb " in line), *inline]:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split, lexer.commenters = True, ""
            words = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set(lexer.punctuation_chars):
                    words = list(dropwhile(re.compile(r"\w+=").match, words))  # X=1 turbo-nb …
                    if words[:1] == ["turbo-nb"] and words[1:] not in ([], ["--help"]):
                        yield words[1:]
                    words = []
                else:
                    words.append(word)


def call_faults(text: str) -> list[str]:
    commands, wrong = typer.main.get_command(cli.app).commands, []
    for name, *words in calls(text):
        if name not in commands:
            wrong.append(f"turbo-nb has no command '{name}'; it has {', '.join(sorted(commands))}")
            continue
        known = {"--help", *(o for p in commands[name].params for o in (*p.opts, *p.secondary_opts))}
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        wrong += [f"turbo-nb {name} has no option '{o}'" for o in options if o.replace("_", "-") not in known]
    return wrong


def ci_test_command(text: str, folder: Path) -> str:
    """What `.ci/run` takes from a README as the test command, by the script's own line."""
    (folder / ENGLISH).write_text(text, encoding="utf-8")
    (line,) = re.findall(r"^test_command=.*$", read(".ci/run"), re.MULTILINE)
    script = f'set -euo pipefail; {line}; printf %s "$test_command"'
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True).stdout


def test_each_links_to_the_other_in_its_first_lines():
    for name, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        assert f"]({other})" in "".join(read(name).splitlines()[:4]), f"{name} does not begin with a link to {other}"


def test_the_chinese_readme_has_all_that_the_english_one_has():
    wrong = differences(read(ENGLISH), read(CHINESE))
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_links_tree_and_commands_are_real(name):
    text = read(name)
    assert any(map(links, parse(text))) and list(calls(text))  # they are found at all
    wrong = missing_targets(name, text) + tree_faults(text) + call_faults(text)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_the_paths_in_contributing_are_real():
    named = set(re.findall(r"`((?:turbo_nb|tests|recipes|\.ci)/[\w./-]*)`", read("CONTRIBUTING.md")))
    assert len(named) > 10 and sorted(path for path in named if not (REPOSITORY / path).exists()) == []


def test_the_picture_of_imports_is_the_codes():
    spec = importlib.util.spec_from_file_location("imports", REPOSITORY / ".ci/imports.py")
    imports = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imports)
    text = read("CONTRIBUTING.md")
    assert imports.replaced(text) == text, "run python .ci/imports.py --write"
    assert "cli --> " in text and imports.replaced(text.replace("cli --> ", "ops --> ")) == text


def test_ci_finds_the_test_command(tmp_path):
    command = ci_test_command(read(ENGLISH), tmp_path)
    blocks = [line for section in parse(read(ENGLISH)) for line in section.code]
    assert command.endswith("&& pytest") and command in blocks, f".ci/run takes '{command}' for the test command"


def planted(old: str, new: str) -> str:
    """README.md with a fault in it."""
    text = read(ENGLISH)
    assert old in text, f"{ENGLISH} no longer has {old!r}: plant this fault in other words"
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\n### ", "\n## ", "the levels of the headings differ"),
        ("\n## ", "\n", "the levels of the headings differ"),
        ("seed=7", "seed=8", "lacks the code line: video = turbo_nb.generate("),
        ("  rope.py ", "  pore.py ", "has a code line that README.md has not:   pore.py"),
        ("```python\n", "```\n", "lacks the code line: ```python"),
        ("| `HF_TOKEN` |", "`HF_TOKEN` |", "lacks the table line: row of 3 columns"),
        ("|---|---|\n", "|---|---|---|\n", "has a table line that README.md has not: row of 3 columns"),
        ("](LICENSE)", "](LICENCE)", "lacks the target: link LICENSE"),
        ("![", "[", "lacks the target: image docs/nano.png"),
        ("`TURBO_NB_PORT`", "`TURBO_NB_PORTS`", "lacks the word: `TURBO_NB_PORT`"),
        ("| 17.9 |", "| 17.7 |", "has a word that README.md has not: 17.7"),
    ],
)
def test_a_difference_is_told_in_words(old, new, words):
    assert any(words in line for line in differences(read(ENGLISH), planted(old, new)))


def test_comments_and_explanations_may_differ():
    text = planted("# a diffusers WanPipeline", "# 一个 WanPipeline")
    assert differences(read(ENGLISH), text.replace("the generator\n", "生成器\n")) == []


@pytest.mark.parametrize(
    ("check", "old", "new", "words"),
    [
        (lambda text: missing_targets(ENGLISH, text), "](docs/nano.png)", "](docs/onan.png)", "'docs/onan.png'"),
        (lambda text: missing_targets(ENGLISH, text), "](LICENSE)", "](LICENSE/no#x)", "'LICENSE/no'"),
        (tree_faults, " probe.py,", " prob.py,", "has 'turbo_nb/machine/prob.py'"),
        (tree_faults, " probe.py,", "", "lacks the module 'turbo_nb/machine/probe.py'"),
        (tree_faults, "\n    conv/ ", "\n  conv/ ", "has 'turbo_nb/conv/'"),
        (tree_faults, "\n    norms/ ", "\n      norms/ ", "lacks the module 'turbo_nb/ops/norms/reference.py'"),
        (tree_faults, "  01_setup.ipynb ", "  00_setup.ipynb ", "has 'notebooks/00_setup.ipynb'"),
        (tree_faults, "\n  __init__.py ", "\n  errors.py ", "lacks the module 'turbo_nb/__init__.py'"),
        (call_faults, "&& turbo-nb t2v", "&& A=1 turbo-nb t3v", "no command 't3v'; it has batch"),
        (call_faults, "--adaptive_resolution", "--adaptive_resolutions", "i2v has no option '--adaptive_resolutions'"),
        (call_faults, "download TurboWan2.1-T2V-1.3B-480P ", "download A --quants=1; ls", "no option '--quants'"),
        (call_faults, "`turbo-nb info FILE`", "`turbo-nb inform FILE`", "no command 'inform'"),
    ],
)
def test_a_fault_is_found(check, old, new, words):
    text = planted(old, new)
    assert words not in str(check(read(ENGLISH))) and any(words in line for line in check(text)), check(text)


def test_ci_without_a_test_command_or_with_another_is_seen(tmp_path):
    assert ci_test_command(planted("&& pytest", "; pytest"), tmp_path) == ""
    assert ci_test_command("Say `x && pytest`.\n" + read(ENGLISH), tmp_path) == "Say `x && pytest`."


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "docs").glob("*.md")))
def test_tables_and_links_of_the_docs_are_whole(name):
    text = read(f"docs/{name}")
    rows = [line for section in parse(text) for line in tables(section)]
    assert rows and all(a == b or "end" in (a, b) for a, b in pairwise(rows)), rows
    targets = [link.split(" ", 1)[1].partition("#")[0] for section in parse(text) for link in links(section)]
    assert [t for t in targets if not re.match(r"[a-z]+:", t) and not (REPOSITORY / "docs" / t).exists()] == []
