"""Warnings: of one category, issued in one way, and collected without touching Python's filters."""

import re
import threading
import warnings
from pathlib import Path

import pytest

import turbo_nb
from turbo_nb import errors
from turbo_nb.errors import TurboNbWarning, collect_warnings, warn

PACKAGE = Path(turbo_nb.__file__).parent


def test_a_warning_names_the_line_of_the_caller_of_the_function_that_warns():
    def function():
        warn("told", stacklevel=1)

    with pytest.warns(TurboNbWarning, match="told") as caught:
        function()
    assert caught[0].filename == __file__


def test_collected_warnings_do_not_reach_the_filters():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collect_warnings() as messages:
            warn("one")
            with collect_warnings() as inner:
                warn("two")
            warn("three")
    assert (messages, inner) == (["one", "three"], ["two"])


def test_overlapping_threads_collect_their_own_and_leave_the_filters_as_they_were():
    before, started, found = list(warnings.filters), threading.Barrier(2), {}

    def job(name):
        with collect_warnings() as messages:
            started.wait(10)
            warn(name)
            started.wait(10)
        found[name] = messages

    threads = [threading.Thread(target=job, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": ["a"], "b": ["b"]} and warnings.filters == before
    with pytest.warns(TurboNbWarning, match="after"):
        warn("after")


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"\bwarnings\.(warn|catch_warnings)\b", {"errors.py"}),
        (r"(?<![\w.\"`])print\(", {"cli.py", "terminal.py"}),
        (r"in filename", set()),
        (r"os\.umask", set()),
    ],
)
def test_the_package_warns_in_one_way_and_never_prints(pattern, allowed):
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8")) and path.name != "triton_trial.py"
    }
    assert found <= allowed


def test_the_first_line_of_an_error_is_short():
    assert errors.first_line(ValueError("\n a \n b")) == "a"
    assert errors.first_line(KeyError()) == "KeyError" and len(errors.first_line(ValueError("x" * 999))) == 160


SUBCLASSES = [errors.TurboNbError, *errors.TurboNbError.__subclasses__(), errors.UnknownModelError]


@pytest.mark.parametrize("error", SUBCLASSES)
def test_a_message_is_one_that_a_terminal_can_show(error):
    made = error(f"path is '\x1b]0;x\x07\ud800\u202e\0\r{'x' * 5000}'. Expected a file. Take another one.")
    text = str(made)
    assert len(text) <= errors.LONGEST and text.startswith(r"path is '\x1b]0;x\x07\ud800\u202e\x00\rxxx")
    assert text.endswith("xxx'. Expected a file. Take another one.") and text.encode()
    assert str(error(f"{text}\n{text}")) == f"{text}\n{text}" and str(error("赤い円 é")) == "赤い円 é"
    with collect_warnings() as messages:
        warn(made.args[0])
    assert messages == [text]
