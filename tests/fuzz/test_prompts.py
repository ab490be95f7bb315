"""Files of prompts: jobs, or short errors that name the file and the line."""

import json
import re
from pathlib import Path

from fuzz.harness import NUMBERS, PATHS, TEXTS, as_json, bent, deep, fuzz, odd, require_short, value

from turbo_nb.batch import jobs, prompts
from turbo_nb.errors import InputError
from turbo_nb.pipeline import LoadedModel

COLUMNS = [
    *prompts.ROW_OPTIONS,
    "prompt",
    "Prompt",
    "num-frames",
    " seed ",
    "Num_Steps",
    "nope",
    "\ufeffprompt",
    "prompt\0",
]
CODECS = (
    "utf-8",
    "utf-8",
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "latin-1",
    "shift_jis",
    "cp1252",
    "gbk",
)
ENDS = ("\n", "\n", "\r\n", "\r", "\n\r", "\u2028", "\n\n", "\x0c", "")
BIG = "long " * 30_000


def lines(chance) -> list[str]:
    return [chance.choice([odd(chance), "a red circle", "# note", BIG]) for _ in range(chance.choice([0, 1, 3, 9]))]


def table(chance) -> list[str]:
    columns = chance.sample(COLUMNS, chance.choice([0, 1, 2, 4])) + ["prompt"] * (chance.random() < 0.8)
    quote = lambda text: chance.choice([text, f'"{text}"', '"{}"'.format(text.replace('"', '""')), f'"{text}'])  # noqa: E731
    separator = chance.choice([",", ",", ",", ";", "\t", ", "])
    width = lambda: chance.choice([len(columns)] * 5 + [0, 1, len(columns) + 1])  # noqa: E731
    cells = lambda: [chance.choice([odd(chance), "a red circle", "5", "", BIG]) for _ in range(width())]  # noqa: E731
    rows = [[quote(cell) for cell in cells()] for _ in range(chance.choice([0, 1, 3, 9]))]
    return [separator.join(row) for row in [columns, *rows]]


def objects(chance) -> list[str]:
    made = []
    for _ in range(chance.choice([0, 1, 3, 9])):
        row = {chance.choice(COLUMNS): chance.choice([value(chance), chance.choice(NUMBERS)]) for _ in range(3)}
        row |= {"prompt": chance.choice(["a red circle", value(chance), BIG])} if chance.random() < 0.8 else {}
        whole = [as_json(row, chance), as_json(row, chance), as_json(value(chance), chance), deep(chance), odd(chance)]
        whole += [f'{{"prompt": "x", "seed": {chance.choice(NUMBERS)}}}', f'{{"prompt": "x", "image": {deep(chance)}}}']
        text = chance.choice(whole)
        made.append(text[: chance.randrange(len(text) + 1)] if chance.random() < 0.1 else text)
    return made


KINDS = {"txt": lines, "csv": table, "jsonl": objects}


def test_files_of_prompts_are_jobs_or_errors_with_file_and_line(folder, nano):
    model = LoadedModel.of(nano)

    def attempt(chance):
        suffix = chance.choice([*KINDS])
        rows, end = KINDS[chance.choice([suffix] * 9 + [*KINDS])](chance), chance.choice(ENDS)
        data = (chance.choice(["", "", "", "\ufeff", "\0", "#"]) + end.join(rows) + end).encode(
            chance.choice(CODECS), "replace"
        )
        data = bent(data, chance) if chance.random() < 0.2 else data
        path = folder / f"p.{chance.choice([suffix] * 9 + [suffix.upper(), 'yaml', 'json', 'tsv', ''])}"
        path.write_bytes(data)
        try:
            read = prompts.read_rows(path)
        except InputError as error:
            of_the_file = (
                "Rename or convert" in str(error) or "holds no prompt" in str(error) or "in UTF-16" in str(error)
            )
            assert str(error).startswith("prompts is" if of_the_file else str(path)), str(error)
            require_short(str(error))
            return
        found = [str(row) for row in read if isinstance(row, InputError)]
        assert all(re.match(rf"{re.escape(str(path))}:\d+: ", row) for row in found), found
        for row in found:
            require_short(row)
            assert len(row) < 700 and "\n" not in row, row[:900]
        good = [row for row in read if isinstance(row, prompts.Job)]
        try:
            tasks = [*jobs.Tasks(good[:20] or ["x"], model, Path("out"), {"num_frames": 1})]
        except InputError as error:
            require_short(str(error))
            return
        assert all(len(task.path.name) < 100 and json.dumps(task.clip.prompt).encode() for task in tasks)

    fuzz("prompts", 250, attempt)


def test_names_of_files_of_prompts(folder):
    def attempt(chance):
        name = (
            chance.choice(PATHS)
            if chance.random() < 0.7
            else chance.choice(TEXTS) + chance.choice([".txt", ".csv", ".jsonl"])
        )
        prompts.read_prompts(chance.choice([name, Path(name)]))

    fuzz("names of prompts", 100, attempt)
