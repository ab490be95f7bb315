"""Check the prose of this repository: docstrings, comments, messages, Markdown and notebook cells.

    python .ci/prose.py            # everything
    python .ci/prose.py PATH …     # some files or folders

It prints `file:line: rule: text` for every finding and exits with 1 if there is one. It needs only the standard
library. CONTRIBUTING.md has the rules for writers. This file has the patterns and limits that a program can check.
"""

import argparse
import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKED = (
    "turbo_nb", "benchmarks", "recipes", "notebooks", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "runpod_start.sh", "Dockerfile", ".ci",
)  # fmt: skip
LIMIT = 25  # words of a sentence; writers aim at 20
SEMICOLONS = 1  # in a sentence: two make it a list of facts

# Each rule: what to do instead, and the pattern that it rejects (case does not matter).
BANNED = [
    ("name the actor and its verb", r"\b(is|are|was|were|be|been) (told|said|heeded|mended)\b"),
    ("name the actor and its verb", r"\b(says|said|say) (it|so)\b"),
    ("say 'fixes'", r"\bmend(s|ed|ing)?\b"),
    ("say 'takes … into account' or 'follows'", r"\bheed(s|ed|ing)?\b"),
    (
        "say 'not a' or 'does not exist'",
        r"\b(is|are|was|were) (?-i:none|no)\b(?! (longer|more|less|fewer|later|worse|better)\b)",
    ),
    ("say 'not a' or 'does not exist'", r"\b(has|have) (?-i:none)\b|\bnone's\b"),
    ("name what has it", r"\bas (it|they) (has|have)\b"),
    ("use a plain verb", r"\bgo(es)? along\b"),
    ("use a plain verb", r"\bworth an? (line|word)\b"),
    ("make it one direct sentence", r"\bwhat (is|was|has|it|they) [a-z]+ (is|are|was|were|has)\b|\bis what is\b"),
    ("repeat the noun", r"\bof (these|them) the\b"),
    ("repeat the noun", r"\bthe (first|last|next) that\b"),
    ("start a new sentence", r", which no(thing| one|body)\b"),
    ("say 'except'", r"\bbut for\b"),
]


@dataclass(frozen=True)
class Allowed:
    """A sentence that may stay although a rule rejects it."""

    path: str  # relative to the repository
    text: str  # part of the sentence as it is in the file
    reason: str


ALLOWED: list[Allowed] = []


@dataclass(frozen=True)
class Item:
    """Running text: a paragraph, a list item, a comment, a message. `lines` has (line number, text)."""

    lines: tuple[tuple[int, str], ...]
    measured: bool = True  # False: a table, a picture or a formula, whose sentences have no length


def hide(text: str) -> str:
    """Return the text with code spans, addresses, tags and shapes masked, character for character."""
    for pattern in (
        r"(`+).+?\1",  # code
        r"(?<=\])\([^)\s]*\)",  # the target of a link
        r"https?://[^\s)>]+",
        r"<[^<>]*>",
        r"\([^()\s,]{1,14}(?:, ?[^()\s,]{1,14})+\)",  # (B, L, H, D)
    ):
        text = re.sub(pattern, lambda match: "¤" * len(match[0]), text)
    return text


ABBREVIATIONS = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bal)(?<!\bFig)(?<!\bEq)(?<!\bca)(?<!\bno)"
END = re.compile(ABBREVIATIONS + r"[.!?。]+[)\"'”’»*_¤]*(?=\s|$)")


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Split masked text into sentences, each with the position of its first character."""
    begin = 0
    for end in [*(match.end() for match in END.finditer(text)), len(text)]:
        part = text[begin:end]
        if part.strip():
            yield begin + len(part) - len(part.lstrip()), part.strip()
        begin = end


def count_words(sentence: str) -> int:
    """Count the words of a sentence. Names with dots or underscores, numbers and formulas are not words."""
    words = (re.sub(r"^[^\w]+|[^\w]+$|'s$", "", word) for word in sentence.split())
    return sum(bool(re.fullmatch(r"[aAI]|[^\W\d_]{2,}(?:[-'’/][^\W\d_]+)*", word)) for word in words)


def faults(item: Item) -> Iterator[tuple[int, str, str]]:
    """Yield (line, rule, text) for what is wrong with an item."""
    text, starts = "", []
    for number, line in item.lines:
        starts.append((len(text), number))
        text += line.strip() + " "
    masked = hide(text)
    line_at = lambda place: max((start, number) for start, number in starts if start <= place)[1]  # noqa: E731
    for begin, sentence in sentences(masked):
        whole = text[begin : begin + len(sentence)]
        for instead, pattern in BANNED:
            for match in re.finditer(pattern, sentence, re.IGNORECASE):
                yield line_at(begin + match.start()), f"'{match[0]}', {instead}", whole
        if item.measured and (words := count_words(sentence)) > LIMIT:
            yield line_at(begin), f"{words} words, at most {LIMIT}", whole
        if item.measured and (marks := sentence.count(";")) > SEMICOLONS:
            yield line_at(begin), f"{marks} semicolons, at most {SEMICOLONS}", whole


# From a file to items

BULLET = r"\s*(?:[-*+•]|\d+[.)])\s+"
SECTION = r"\s*(Args|Attributes|Returns|Raises|Yields|Examples?|Notes?|References?|Sources?|Shapes?):\s*"
ENTRY = r"[\w.*]+(?:, [\w.*]+)*(?: \([^)]*\))?:\s"
DRAWN = r"\s*[|>]|.*[─-╿▀-◿]|.*[^\s.!?:;] {2,}\S|.*\S {3,}\S"


def blocks(lines: Iterable[tuple[int, str]]) -> Iterator[Item]:
    """Split the lines of a docstring or of a comment into items. Indented or aligned lines are drawings or code."""
    item, section, entry_indent = [], None, 0

    def flush() -> Iterator[Item]:
        if item:
            yield Item(tuple(item))
            item.clear()

    for number, line in lines:
        indent = len(line) - len(line.lstrip())
        if section is not None and line.strip() and indent <= section:
            section = None
        if not line.strip():
            yield from flush()
        elif re.fullmatch(SECTION, line):
            yield from flush()
            section, entry_indent = indent, 0
        elif section is not None and not re.match(DRAWN, line):
            entry_indent = entry_indent or indent
            if indent == entry_indent:
                yield from flush()
            item.append((number, re.sub(rf"^\s*{ENTRY}", "", line) if indent == entry_indent else line))
        elif re.match(DRAWN, line) or (indent >= 4 and not item):
            yield from flush()
            yield Item(((number, line),), measured=False)
        else:
            if re.match(BULLET, line):
                yield from flush()
            item.append((number, re.sub(rf"^{BULLET}", "", line)))
    yield from flush()


def of_python(source: str) -> Iterator[Item]:
    """Yield the docstrings, comments, help texts and error messages of a Python file."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                raw = first.value.value
                above = len(raw) - len(raw.lstrip("\n"))
                lines = inspect.cleandoc(raw).splitlines()
                yield from blocks(enumerate(lines, first.value.lineno + above))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from messages(node.exc.args)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("warn", "option", "_option", "Option", "Argument"):
                yield from messages(node.args)
            yield from messages(word.value for word in node.keywords if word.arg in ("help", "fix", "description"))
    yield from comments(source)


def messages(nodes: Iterable[ast.expr]) -> Iterator[Item]:
    """Yield the texts among some arguments. A value inside an f-string counts as code."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "`…`" for part in node.values)
        else:
            continue
        if " " in text.strip():
            yield Item(((node.lineno, text.replace("\n", " ")),))


def comments(source: str) -> Iterator[Item]:
    """Yield the comments of a Python file. Comments on lines that follow each other are one text."""
    block, last = [], (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text, place = token.string[1:].removeprefix(" "), token.start
        if re.match(r"!|\s*(fmt|noqa|type|pragma|ruff)\b|[-=\s]+(\w.*)?$", text) and not text.strip("-= ").count(" "):
            text = ""
        alone = not token.line[: place[1]].strip()
        if not (alone and place == (last[0] + 1, last[1])):
            yield from blocks(block)
            block = []
        block.append((place[0], text))
        last = place if alone else (0, 0)
    yield from blocks(block)


def of_shell(source: str) -> Iterator[Item]:
    """Yield the comments of a shell script, and those of a Dockerfile."""
    block = []
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.match(r"#(?!!) ?(.*)", line):
            block.append((number, match[1]))
            continue
        yield from blocks(block)
        block = []
        if match := re.search(r"(?:^|\s)# (.*)", line):
            yield from blocks([(number, match[1])])
    yield from blocks(block)


def of_markdown(source: str, first: int = 1) -> Iterator[Item]:
    """Yield the paragraphs, list items, headings and table rows of a Markdown text; `first` is its first line."""
    item, fence = [], ""
    source = re.sub(r"<!--.*?-->", lambda match: re.sub(r"[^\n]", " ", match[0]), source, flags=re.DOTALL)
    for number, line in enumerate(source.splitlines(), first):
        mark = re.match(r"\s*(```+|~~~+|\$\$)", line)
        begins = mark or fence or not line.strip() or re.match(rf"#|\||{BULLET}", line)
        if begins and item:
            yield Item(tuple(item))
            item = []
        if mark and fence in ("", mark[1]):
            fence = "" if fence or line.count("$$") > 1 else mark[1]
        elif fence or not line.strip():
            continue
        elif line.startswith("|"):
            yield Item(((number, line),), measured=False)
        elif line.startswith("#"):
            yield Item(((number, line.lstrip("# ")),))
        else:
            item.append((number, re.sub(rf"^{BULLET}", "", line)))
    if item:
        yield Item(tuple(item))


def of_notebook(source: str) -> Iterator[Item]:
    """Yield the Markdown of a notebook, and the comments of its code. Line numbers count from the cell's first line."""
    for cell in json.loads(source)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield from of_markdown(text)
        elif cell["cell_type"] == "code":
            yield from of_shell(text)


def read(path: Path) -> Iterator[Item]:
    """Yield the items of a file by its kind."""
    source = path.read_text(encoding="utf-8")
    kinds = {".py": of_python, ".md": of_markdown, ".ipynb": of_notebook}
    return kinds.get(path.suffix, of_shell)(source)


def is_checked(path: Path) -> bool:
    """Whether a file has prose in English that this script can read."""
    if path.suffix in (".py", ".md", ".ipynb", ".sh"):
        return not path.name.endswith(".zh-CN.md")
    return path.name == "Dockerfile" or path == ROOT / ".ci/run"


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to check among some files and folders. Raises SystemExit for a path that does not exist."""
    for path in paths:
        if not path.exists():
            raise SystemExit(f"{path} does not exist. Expected a file or a folder.")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        hidden = (".ipynb_checkpoints", "__pycache__", ".venv")
        yield from (one for one in inside if one.is_file() and is_checked(one) and not set(hidden) & set(one.parts))


def check(paths: Iterable[Path], allowed: Iterable[Allowed] = ()) -> tuple[list[str], set[Allowed]]:
    """Return the findings as lines, and the entries of the allow-list that were needed."""
    found, used = [], set()
    for path in files(paths):
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
        for line, rule, text in sorted(fault for item in read(path) for fault in faults(item)):
            if entry := next((one for one in allowed if one.path == name and one.text in text), None):
                used.add(entry)
            else:
                found.append(f"{name}:{line}: {rule}: {text}")
    return found, used


def main() -> int:
    """Print the findings. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Check prose by the rules of CONTRIBUTING.md.")
    parser.add_argument("paths", nargs="*", type=Path, help="Files and folders. Without one: the whole repository.")
    paths = [path.resolve() for path in parser.parse_args().paths]
    found, used = check(paths or [ROOT / name for name in CHECKED], ALLOWED)
    stale = (
        [] if paths else [f"the allow-list has '{one.text}', which nothing needs" for one in ALLOWED if one not in used]
    )
    for line in [*found, *stale]:
        print(line)
    if found or stale:
        print(f"{len(found) + len(stale)} findings. CONTRIBUTING.md has the rules.", file=sys.stderr)
    return int(bool(found or stale))


if __name__ == "__main__":
    sys.exit(main())
