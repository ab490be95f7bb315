"""Every callback of the page, and every thread of its panels, shows its errors on the page."""

import ast
import html
import re
from pathlib import Path

import ipywidgets as w
import pytest

from turbo_nb.errors import InputError
from turbo_nb.files.resolve import ResolvedModel
from turbo_nb.generator import guard, widgets
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.generator.page import family
from turbo_nb.generator.request import Job, Request
from turbo_nb.generator.widgets import Generator

ROOM = Path(widgets.__file__).parent
REGISTERS = r"\.(observe|on_click|on_msg|on_submit|on_displayed|listen)$|\b(Thread|Timer)$|\b_?pool\.submit$"
OWN = ("guard.py", "jobs.py", "downloads.py")  # without widgets; a job and a download have their errors as data


def test_an_error_is_shown_and_not_raised():
    shown = []
    double = guard.guarded(lambda number: 2 * number, shown.append)
    assert double(3) == 6 and not shown
    error = RuntimeError("the disk hums")

    def fail():
        raise error

    assert guard.guarded(fail, shown.append)() is None and shown == [error]


def test_nothing_is_registered_without_a_guard():
    seen, unguarded = 0, []
    for path in ROOM.rglob("*.py"):
        nodes = [] if path.name in OWN else list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        assigned = [(ast.unparse(one.targets[0]), ast.unparse(one.value)) for one in nodes if type(one) is ast.Assign]
        names = {name for name, value in assigned if value.startswith("guarded(")}
        for call in nodes:
            if isinstance(call, ast.Call) and re.search(REGISTERS, ast.unparse(call.func)):
                arguments = [ast.unparse(one) for one in (*call.args, *(more.value for more in call.keywords))]
                seen += 1
                if not any(one.startswith("guarded(") or one in names for one in arguments):
                    unguarded.append(f"{path.relative_to(ROOM)}:{call.lineno}")
    assert seen >= 7 and unguarded == []


@pytest.fixture
def page(tmp_path, nano, monkeypatch):
    """A page with rows in its lists, so that it has every kind of callback"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURBO_NB_REWRITE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(ResolvedModel, "downloads", ())
    runner = JobRunner("clips", load=lambda *_, **__: nano)
    for state in ("failed", "waiting"):
        runner.jobs.append(Job(request=Request.of("a red circle", model="nano"), state=state))
    made = Generator(runner)
    add_lora(made, tmp_path)
    yield made
    runner.jobs.clear()
    made.close()


def add_lora(page: Generator, folder: Path) -> None:
    path = folder / "style.safetensors"
    path.touch()
    page.form.loras.listing.files["style"] = path
    page.form.loras.add()


def callbacks(widget: w.Widget) -> list:
    """The functions of this package that a widget calls"""
    found = [one for kinds in widget._trait_notifiers.values() for kind in kinds.values() for one in kind]
    for dispatcher in ("_click_handlers", "_msg_callbacks", "_display_callbacks", "_submission_callbacks"):
        found += getattr(getattr(widget, dispatcher, None), "callbacks", [])
    libraries = ("ipywidgets.", "traitlets.", "anywidget.")
    return [one for one in found if not (getattr(one, "__module__", None) or "traitlets.").startswith(libraries)]


def shown_on(page: Generator) -> str:
    """All texts of the page"""
    parts = []
    for one in family(page.root):
        parts += [str(getattr(one, name, "")) for name in ("value", "message")]
    return html.unescape("\n".join(parts))


def test_every_callback_shows_its_error_on_the_page(page):
    found = [(one, callback) for one in family(page.root) for callback in callbacks(one)]
    assert len(page.queue.rows.children) == 2 and len(page.form.loras.rows) == 1
    unguarded = [f"{type(one).__name__} {callback}" for one, callback in found if not hasattr(callback, "show_error")]
    assert not unguarded
    buttons = [one for one in family(page.root) if isinstance(one, w.Button)]
    assert len(found) > 60 and all(callbacks(one) for one in buttons)
    for number, (one, callback) in enumerate(found):
        callback.show_error(RuntimeError(f"fault {number}."))
        assert f"unexpected RuntimeError: fault {number}." in shown_on(page), (one, callback)


def test_every_listener_shows_its_error_on_the_page(page):
    (listener,) = page.runner._listeners
    listener.show_error(InputError("the disk is full"))
    assert "the disk is full" in page.run.outlook.value


def test_the_page_is_told_why_its_question_has_no_answer(page, monkeypatch):
    def fail(_):
        raise RuntimeError("the disk hums")

    sent, player = [], page.result.player
    monkeypatch.setattr(player, "_find", fail)
    monkeypatch.setattr(player, "send", lambda content, buffers=None: sent.append(content))
    player._handle_custom_msg({"kind": "bytes", "id": "7", "key": "k", "start": 0}, [])
    assert sent == [{"error": "the disk hums", "id": "7"}]
    assert "unexpected RuntimeError: the disk hums" in page.run.outlook.value
