"""What README.md, the pages of docs/ and their Chinese twins promise, and whether it is true."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import dropwhile, zip_longest
from os.path import normpath
from pathlib import Path

import typer.main

from turbo_nb import cli

REPOSITORY = Path(__file__).parents[1]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
TREE = "docs/architecture.md"  # the page with the file tree


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def chinese_of(name: str) -> str:
    """The path of the Chinese twin of a page"""
    return CHINESE if name == ENGLISH else name.replace("docs/", "docs/zh/")


def english_of(name: str) -> str:
    return ENGLISH if name == CHINESE else name.replace("docs/zh/", "docs/")


@dataclass(kw_only=True)
class Section:
    """A heading with what stands under it; `code` has the lines inside fences, each fence's first line among them."""

    level: int = 0
    title: str = "the first lines"
    prose: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


def parse(text: str) -> list[Section]:
    sections, fence = [Section()], None
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
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
    """`image TARGET` and `link TARGET` as the page has them"""
    found = re.findall(r'(!\[[^\]]*)?\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', "\n".join(section.prose))
    return [f"{'image' if image else 'link'} {target or html}" for image, target, html in found]


def is_outside(target: str) -> bool:
    return bool(re.match(r"[a-z]+:", target))


def path_of(target: str, name: str) -> str:
    """The path of a link's target from the repository's root, without what stands after #"""
    return normpath(Path(name).parent / target.partition("#")[0]) if target[0] != "#" else name


def targets(section: Section, name: str) -> list[str]:
    """The links of both languages by the same names: those of the English pages"""
    found = [link.split(" ", 1) for link in links(section)]
    return sorted(f"{kind} {t if is_outside(t) else english_of(path_of(t, name))}" for kind, t in found)


def tables(section: Section) -> list[str]:
    """The tables' rows by their number of columns, and where each table ends."""
    lines = re.sub(r"\\\||`[^`\n]*`", "", "\n".join(section.prose)).splitlines()
    found = [f"row of {line.count('|') - 1} columns" if line.startswith("|") else "" for line in [*lines, ""]]
    return [row or "end" for row, last in zip(found, ["", *found], strict=False) if row or last]


def facts(section: Section) -> list[str]:
    """What no translation changes: inline code and numbers."""
    prose = re.sub(r"\]\([^)]*\)", "]", " ".join(section.prose))
    return sorted(set(re.findall(r"`[^`]+`|\d+(?:\.\d+)*", prose)))


def differences(english: str, chinese: str, name: str = ENGLISH) -> list[str]:
    """What the Chinese twin of the page `name` lacks or has too much, a line each."""
    sections, others, twin = parse(english), parse(chinese), chinese_of(name)
    if [s.level for s in sections] != [s.level for s in others]:
        pairs = zip_longest(
            *([f"{'#' * s.level} {s.title}" for s in part[1:]] for part in (sections, others)), fillvalue="(none)"
        )
        return [f"the levels of the headings differ: {name} | {twin}", *(f"{a} | {b}" for a, b in pairs)]
    wrong = []
    for ours, theirs in zip(sections, others, strict=True):
        for kind, a, b in (
            ("code line", ours.code, theirs.code),
            ("table line", tables(ours), tables(theirs)),
            ("target", targets(ours, name), targets(theirs, twin)),
            ("word", facts(ours), facts(theirs)),
        ):
            for _, i, i_end, j, j_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
                if a[i:i_end] != b[j:j_end]:
                    place = f"under '{ours.title}' ({theirs.title}) {twin}"
                    wrong += [f"{place} lacks the {kind}: {item}" for item in a[i:i_end]]
                    wrong += [f"{place} has a {kind} that {name} has not: {item}" for item in b[j:j_end]]
    return wrong


def anchors(text: str) -> set[str]:
    """The names of a page's headings in links, as GitHub and the site make them"""
    titles = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", section.title) for section in parse(text))
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def missing_targets(name: str, text: str) -> list[str]:
    wrong = []
    for target in (link.split(" ", 1)[1] for section in parse(text) for link in links(section)):
        if is_outside(target):
            continue
        path, anchor = path_of(target, name), target.partition("#")[2]
        if not (REPOSITORY / path).exists():
            wrong.append(f"{name} points at '{target}', which is not here")
        elif anchor and anchor not in anchors(text if path == name else read(path)):
            wrong.append(f"{name} points at '{target}', and {path} has no such heading")
    return wrong


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
            try:
                words = list(split(line))
            except ValueError:  # a quotation that goes on in the next line
                continue
            yield from words


def split(line: str) -> Iterator[list[str]]:
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
        options = [] if name == "run" else [word.split("=")[0] for word in words if word.startswith("--")]
        wrong += [f"turbo-nb {name} has no option '{o}'" for o in options if o.replace("_", "-") not in known]
    return wrong
