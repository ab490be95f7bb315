"""Seeded fuzzers: each kind of input has an index, and the seed, the kind and the index determine the input.

TURBO_NB_FUZZ=1000 tries as many inputs of each kind, and one that takes over 5 s is a fault. Without it a kind has a
few inputs, and only one that takes over 60 s is a fault, because machines that test are busy.
TURBO_NB_FUZZ_SEED=spring tries other inputs. CI has no seed, because its inputs must not change.
TURBO_NB_FUZZ_ONLY=arguments:17 tries one input again, and raises its error as it is.
"""

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from turbo_nb.errors import TurboNbError

COUNT = int(os.environ.get("TURBO_NB_FUZZ") or 0)
SEED = os.environ.get("TURBO_NB_FUZZ_SEED", "")
ONLY = os.environ.get("TURBO_NB_FUZZ_ONLY", "")
LIMIT = 5 if COUNT else 60  # seconds for one input
CODES = {0, 1, 2, 130}  # that the README documents
MEMORY = 8 << 30  # bytes of this process, above which an input ends in MemoryError, which is a fault
LINES, CHARACTERS = 10, 2500  # of an error on stderr; 5 bad rows of a file have a line each
PHASE = re.compile(r"(?m)^ *\d+\.\d\d s  .*\n")  # a line of --timing
SHOWN = 12  # faults in the failure of a test
ENDS: Counter[str] = Counter()  # how the inputs of a kind ended: exit codes, and errors of turbo_nb


class Hang(BaseException):
    """An input that took too long. Not an Exception, because code under test may catch those"""


def fuzz(kind: str, count: int, attempt: Callable[[random.Random], object], limit: float = LIMIT) -> None:
    """Try inputs of one kind, and fail with all faults: an exception other than TurboNbError, or a hang.

    Args:
        kind: a name without a colon.
        count: of inputs where TURBO_NB_FUZZ is not set.
        attempt: makes one input from a random generator, and tries it.
        limit: seconds for one input.
    """
    only, _, index = ONLY.rpartition(":")
    if ONLY:
        if only == kind:
            _once(kind, int(index), attempt, limit)
        return
    faults, slowest, start = [], (0.0, 0), time.perf_counter()
    ENDS.clear()
    for index in range(COUNT or count):
        begin = time.perf_counter()
        try:
            _once(kind, index, attempt, limit)
        except (Exception, Hang, SystemExit, KeyboardInterrupt) as error:  # whatever comes out is a fault
            lines = str(error).strip().splitlines() or [""]
            faults.append(f"{kind}:{index}  {type(error).__name__}: {lines[0][:300]}{_place(error)}")
        slowest = max(slowest, (time.perf_counter() - begin, index))
    figures = (
        f"{kind}: {COUNT or count} inputs in {time.perf_counter() - start:.0f} s, {len(faults)} faults, "
        f"slowest {slowest[0]:.2f} s ({kind}:{slowest[1]}), {dict(ENDS.most_common())}"
    )
    print(figures)
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        seed = f"TURBO_NB_FUZZ_SEED={SEED!r} " if SEED else ""
        again = f"Try one again: {seed}TURBO_NB_FUZZ_ONLY={faults[0].split('  ')[0]!r} pytest tests/fuzz"
        raise AssertionError("\n".join([figures, *faults[:SHOWN], *more, again]))


def _once(kind: str, index: int, attempt: Callable[[random.Random], object], limit: float) -> None:
    begin = time.perf_counter()
    with _limited(limit), _bounded():
        try:
            attempt(random.Random(f"{SEED}{kind} {index}"))
        except TurboNbError as error:
            ENDS[type(error).__name__] += 1
            require_short(str(error))
    if (seconds := time.perf_counter() - begin) > limit:  # in code that no signal interrupts
        raise Hang(f"took {seconds:.1f} s")


def require_short(text: str) -> None:
    """Require what an error prints to be a few lines that a terminal can show"""
    assert len(text.splitlines()) <= LINES and len(text) <= CHARACTERS, (
        f"{len(text)} characters of error: {text[:200]!r}"
    )
    assert not {chr(27), "\0"} & set(text), f"control characters in {text[:200]!r}"
    assert "Traceback" not in text, text[-300:]


def require_documented(result) -> None:
    """Require the result of a command to be a documented one, and a failure to have a short reason"""
    ENDS[f"exit {result.returncode}"] += 1
    assert result.returncode in CODES, f"exit code {result.returncode}: {result.stderr[-300:]}"
    require_short(PHASE.sub("", result.stderr))
    assert result.returncode != 2 or (result.stderr + result.stdout).strip(), "exit code 2 without a word"
    assert not {chr(27), "\0"} & set(result.stdout), f"control characters in {result.stdout[:200]!r}"


@contextmanager
def _bounded() -> Iterator[None]:
    """Let this process have no more than MEMORY, where the system can tell, because others use the machine, too"""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = MEMORY if before[1] == resource.RLIM_INFINITY else min(MEMORY, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after some seconds, where the system and the thread allow it"""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Hang(f"took over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    """Return where the innermost line of turbo_nb raised, such as " (batch/prompts.py:97)" """
    found, trace = "", error.__traceback__
    while trace:
        name = trace.tb_frame.f_code.co_filename
        if f"{os.sep}turbo_nb{os.sep}" in name:
            found = f" ({name.rpartition(f'{os.sep}turbo_nb{os.sep}')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


# Values that inputs of all kinds are made of

TEXTS = (
    "", " ", "\0", "a\0b", "\n", "a\nb", "a\rb", "\t", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x07",
    "\u202egnp.exe", "\ufeff", "\ud800", "\udcff", "é" * 200, "赤い円", "😀", "ﷺ" * 50, "a" * 300, "a" * 5000,
    "x " * 60_000, "e\u0301" * 99, "'", '"', "`", "\\", "{", "}", "[", "[bold]x[/bold]", "[/]", "[/nope]", "%s%n",
    "{0}", "$HOME", "$(id)", "; id", "<b>", "&amp;", "--", "-", "-1", "#", "# a", ",", ";", "=", ":", "a=b;c#d\\e",
    "null", "None", "true", "True", "yes", "ode",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "1.5", "1e3", "1e400", "-0", "+1", "nan", "inf", "-inf", "0x10", "0b1", "1_0", " 1 ", "１２", "٣",
    "¹", "9" * 25, "9" * 5000, "1" + "0" * 310, "1/2", "1,5", str(2**31), str(2**63), str(2**63 - 1), str(2**64),
    "0.1", "4", "5", "4.0", "00", "1e-400", "0.0000001", "True",
)  # fmt: skip
PATHS = (
    "~", "~/x", "~nobody/x.mp4", "~\0", ".", "..", "/", "//", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem",
    "/proc/self/environ", "dir", "dir/", "dir.mp4", "loop", "loop.mp4", "loop/x.mp4", "gone.mp4", "gone", "file",
    "file/x", "file/x.mp4", "fifo.mp4", "fifo.txt", "fifo.safetensors", "fifo.png", "zero.txt", "zero.jsonl",
    "zero.csv", "zero.mp4", "zero.pth", "12:30.mp4", "a:b/c.mp4", "http://[::1/x.mp4", "http://x/y.mp4",
    "https://huggingface.co/a/b", "file:///etc", "data:,", "s3://a/b", "a/b", "a/b/c", "a/b@main",
    "a/b/c.safetensors@1", "a//b", "../" * 60 + "x.mp4", "a" * 251 + ".mp4", "a" * 256 + ".mp4", "é" * 130 + ".mp4",
    "/".join(["a" * 200] * 30) + "/x.mp4", "a/" * 5000 + "x.mp4", "x.MP4", ".mp4", "x.mp4.mp4", "x.mp4 ", " x.mp4",
    "-x.mp4", "x\ny.mp4", "\x1b[31m.mp4", "\udcff.mp4", "\ud800.mp4", "%d.mp4", "x.avi", "CON.mp4", "good.mp4",
    "good.png", "good.txt", "good.csv", "good.jsonl", "empty.mp4", "empty.txt", "empty.png", "empty.pth", "page.mp4",
    "page.png", "page.safetensors", "pointer.safetensors", "deep.jsonl",
)  # fmt: skip


def odd(chance: random.Random, *more: str) -> str:
    """Return an odd text: one of the lists, of some more, or of two joined"""
    text = chance.choice(chance.choice([TEXTS, NUMBERS, PATHS, more or TEXTS]))
    if chance.random() < 0.1:
        text += chance.choice([*TEXTS, *PATHS])
    return text


def value(chance: random.Random, depth: int = 3) -> object:
    """Return an odd JSON value"""
    kind = chance.choice(["text", "text", "number", "number", "constant", "list", "object"] if depth else ["text"])
    if kind == "text":
        return odd(chance)
    if kind == "number":
        return chance.choice(
            [0, 1, -1, 5, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**25, 10**400, 2**53 + 1, 2**63]
        )
    if kind == "constant":
        return chance.choice([None, True, False])
    items = [value(chance, depth - 1) for _ in range(chance.choice([0, 1, 2, 2, 3, 40]))]
    return items if kind == "list" else {odd(chance): item for item in items}


def as_json(data: object, chance: random.Random) -> str:
    """Return JSON as some program could write it: with NaN, lone surrogates, or duplicates of keys"""
    text = json.dumps(data, ensure_ascii=chance.random() < 0.7, default=str)
    return text.replace("{", '{"prompt": 1, "prompt": 2, ', 1) if chance.random() < 0.05 else text


def deep(chance: random.Random) -> str:
    """Return JSON of many levels"""
    levels = chance.choice([10, 33, 500, 990, 5000, 100_000])
    start, end = chance.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    return start * levels + "1" + end * levels


def bent(data: bytes, chance: random.Random, head: int | None = None) -> bytes:
    """Return bytes with some changed, cut off, put in, or doubled; `head`: only before this place"""
    made = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 40])):
        place = chance.randrange(min(len(made), head or len(made)) or 1)
        how = chance.choice(["flip", "flip", "byte", "byte", "zeros", "ones", "cut", "add", "double"])
        if how == "flip" and made:
            made[place] ^= 1 << chance.randrange(8)
        elif how == "byte" and made:
            made[place] = chance.randrange(256)
        elif how in ("zeros", "ones"):
            length = chance.choice([1, 4, 8])
            made[place : place + length] = (b"\0" if how == "zeros" else b"\xff") * length
        elif how == "cut":
            del made[place : chance.choice([place + 1, place + 100, len(made)])]
        elif how == "add":
            made[place:place] = chance.randbytes(chance.choice([1, 7, 300]))
        elif how == "double":
            made[place:place] = made[place : place + 64]
    return bytes(made)
