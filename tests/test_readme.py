"""README.md keeps its word: it is short, its commands and links are real, and its Chinese twin has the same."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from pages import CHINESE, ENGLISH, REPOSITORY, call_faults, calls, differences, links, missing_targets, parse, read
from PIL import Image

from turbo_nb import catalog

RUN = (
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && turbo-nb t2v --prompt"
    ' "a large red circle moving from left to right on a black background" --save_path red.mp4'
)
TEST = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[notebook,dev]' && pytest"


def ci_test_command(text: str, folder: Path) -> str:
    """What `.ci/run` takes from a README as the test command, by the script's own line."""
    (folder / ENGLISH).write_text(text, encoding="utf-8")
    (line,) = re.findall(r"^test_command=.*$", read(".ci/run"), re.MULTILINE)
    script = f'set -euo pipefail; {line}; printf %s "$test_command"'
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True).stdout


def test_each_links_to_the_other_in_its_first_lines():
    for name, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        assert f"]({other})" in "".join(read(name).splitlines()[:4]), f"{name} does not begin with a link to {other}"


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_it_is_short_and_begins_with_a_number_and_a_picture(name):
    text = read(name)
    assert len(text.splitlines()) <= 150
    first, *others = parse(text)[1:]
    assert re.search(r"\d\.\d s\b", "\n".join(first.prose)) and any(link.startswith("image ") for link in links(first))
    assert len(first.prose) + len(first.code) < 20 and others[0].code[0] == "```bash"


def test_the_picture_moves_and_is_small():
    (picture,) = (link.split()[1] for link in links(parse(read(ENGLISH))[1]) if link.startswith("image "))
    path = REPOSITORY / picture
    assert path.stat().st_size <= 3_000_000
    with Image.open(path) as image:
        assert image.n_frames > 20 and image.width >= 800


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_the_two_commands_that_set_everything_up_stand_word_for_word(name):
    lines = [line for section in parse(read(name)) for line in section.code]
    assert RUN in lines and TEST in lines


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_three_lines_lead_to_the_first_video_with_and_without_a_gpu(name):
    section = next(section for section in parse(read(name)) if RUN in section.code)
    blocks = "\n".join(section.code).split("```bash\n")[1:3]
    for block in blocks:
        clone, _, last = block.split("```")[0].strip().splitlines()
        assert re.fullmatch(r"git clone \S+ turbo_nb && cd turbo_nb", clone) and "turbo-nb t2v --prompt" in last
    assert "whl/cpu" in blocks[0] and "turbo-nb download auto" in blocks[1]


def test_the_chinese_readme_has_all_that_the_english_one_has():
    wrong = differences(read(ENGLISH), read(CHINESE))
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_links_and_commands_are_real(name):
    text = read(name)
    assert any(map(links, parse(text))) and list(calls(text))  # they are found at all
    wrong = missing_targets(name, text) + call_faults(text)
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
    assert ci_test_command(read(ENGLISH), tmp_path) == TEST


def planted(old: str, new: str) -> str:
    """README.md with a fault in it."""
    text = read(ENGLISH)
    assert old in text, f"{ENGLISH} no longer has {old!r}: plant this fault in other words"
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\n## ", "\n### ", "the levels of the headings differ"),
        ("\n## ", "\n", "the levels of the headings differ"),
        ("seed=7", "seed=8", "lacks the code line: video = turbo_nb.generate("),
        ("```python\n", "```\n", "has a code line that README.md has not: ```python"),
        ("| `nano` |", "`nano` |", "has a table line that README.md has not: row of 5 columns"),
        ("|---|---|\n", "|---|---|---|\n", "lacks the table line: row of 6 columns"),
        ("](LICENSE)", "](LICENCE)", "lacks the target: link LICENCE"),
        ("![", "[", "lacks the target: link docs/"),
        ("`turbo-nb verify`", "`turbo-nb verify nano`", "lacks the word: `turbo-nb verify nano`"),
        ("| 1.19 s |", "| 1.91 s |", "has a word that README.md has not: 1.19"),
    ],
)
def test_a_difference_is_told_in_words(old, new, words):
    assert any(words in line for line in differences(planted(old, new), read(CHINESE)))


def test_comments_may_differ():
    assert differences(read(ENGLISH), read(ENGLISH)) == []
    assert differences(read(ENGLISH), planted("# a diffusers WanPipeline", "# 一个 WanPipeline")) == []


@pytest.mark.parametrize(
    ("check", "old", "new", "words"),
    [
        (lambda text: missing_targets(ENGLISH, text), "](docs/speed.md)", "](docs/sped.md)", "'docs/sped.md'"),
        (lambda text: missing_targets(ENGLISH, text), "](LICENSE)", "](LICENSE/no#x)", "'LICENSE/no#x'"),
        (lambda text: missing_targets(ENGLISH, text), "models.md#memory)", "models.md#mem)", "has no such heading"),
        (call_faults, "&& turbo-nb t2v", "&& A=1 turbo-nb t3v", "no command 't3v'; it has batch"),
        (call_faults, "--adaptive_resolution", "--adaptive_resolutions", "i2v has no option '--adaptive_resolutions'"),
        (call_faults, "turbo-nb download auto", "turbo-nb download A --quants=1; ls", "no option '--quants'"),
        (call_faults, "`turbo-nb verify`", "`turbo-nb very fine`", "no command 'very'"),
    ],
)
def test_a_fault_is_found(check, old, new, words):
    text = planted(old, new)
    assert words not in str(check(read(ENGLISH))) and any(words in line for line in check(text)), check(text)


def test_ci_without_a_test_command_or_with_another_is_seen(tmp_path):
    assert ci_test_command(planted("&& pytest", "; pytest"), tmp_path) == ""
    assert ci_test_command("Say `x && pytest`.\n" + read(ENGLISH), tmp_path) == "Say `x && pytest`."


def cells(name: str) -> list[list[str]]:
    """The cells of every table row of a page"""
    lines = [line for section in parse(read(name)) for line in section.prose if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_models_have_the_catalogues_size_and_the_cards_of_the_page_about_memory():
    memory = cells("docs/models.md")
    for spec in catalog.MODELS.values():
        (row,) = (row for row in cells(ENGLISH) if row[0] == spec.name)
        assert row[1].startswith("{}×{}".format(*spec.size)), row
        if spec.files:
            place = next(at for at, found in enumerate(memory) if found[0] == spec.name)
            bf16, int8 = memory[place : place + 2]
            assert (bf16[1], int8[1]) == ("bf16", "int8") and row[-2:] == [bf16[-1], int8[-1]]
    frames, fps = {(spec.num_frames, spec.fps) for spec in catalog.MODELS.values() if spec.files}.pop()
    assert f"{frames} frames at {fps} frames a second" in read(ENGLISH)
