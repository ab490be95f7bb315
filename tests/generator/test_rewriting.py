"""The prompt is rewritten in the background: what a person writes meanwhile is kept, and the key stays hidden."""

import threading
import time

import pytest
from loopback_chat import SECRET, chat_server

from turbo_nb import presets
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.generator.page import family
from turbo_nb.generator.widgets import Generator

LONG = "a large red circle growing on a black background"


@pytest.fixture
def chat(monkeypatch):
    with chat_server(monkeypatch) as server:
        server.answer = LONG
        yield server


@pytest.fixture
def generator(chat, tmp_path, nano):
    made = Generator(JobRunner(tmp_path / "clips", load=lambda *_, **__: nano))
    made.form.prompt.text.value = "ein roter Kreis"
    yield made
    made.close()


def finish(chat) -> None:
    """Let the server answer, and wait until the page has taken the answer or dropped it"""
    deadline = time.monotonic() + 30
    while not chat.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    chat.go.set()
    for thread in threading.enumerate():
        if thread.name == "turbo_nb rewrite":
            thread.join(30)


def is_shown(widget) -> bool:
    return widget.layout.display is None


def test_without_an_address_nothing_is_on_the_page(tmp_path, monkeypatch, nano):
    monkeypatch.delenv("TURBO_NB_REWRITE_URL", raising=False)
    made = Generator(JobRunner(tmp_path / "clips", load=lambda *_, **__: nano))
    assert not is_shown(made.form.prompt.rewriting.box)
    made.close()


def test_the_answer_becomes_the_prompt_and_undo_brings_the_original_back(generator, chat):
    bar, text = generator.form.prompt.rewriting, generator.form.prompt.text
    chat.go.clear()
    bar.rewrite.click()
    assert bar.rewrite.disabled and is_shown(bar.cancel) and not generator.run.generate.disabled
    finish(chat)
    assert text.value == LONG and generator.form.request.clip.prompt == LONG
    assert not bar.rewrite.disabled and not is_shown(bar.cancel) and is_shown(bar.undo)
    text.value += " slowly"
    bar.undo.click()
    assert (text.value, bar.undo.description) == ("ein roter Kreis", "Redo")
    bar.undo.click()
    assert (text.value, bar.undo.description) == (f"{LONG} slowly", "Undo")


@pytest.mark.parametrize("wins", ["an edit", "cancel", "another model", "the end of the page"])
def test_an_answer_that_comes_too_late_changes_nothing(generator, chat, wins):
    bar, text = generator.form.prompt.rewriting, generator.form.prompt.text
    chat.go.clear()
    bar.rewrite.click()
    expected = "ein roter Kreis"
    if wins == "an edit":
        text.value = expected = "ein roter Kreis, langsam"
        assert "has changed" in bar.note.value
    elif wins == "cancel":
        bar.cancel.click()
        assert "Cancelled" in bar.note.value
    elif wins == "another model":
        generator.form.model.value = "TurboWan2.1-T2V-1.3B-480P"
        assert "model has changed" in bar.note.value
    else:
        generator.close()
        before = presets.latest()
    finish(chat)
    assert (text.value == expected and not bar.rewrite.disabled) or wins == "the end of the page"
    if wins == "the end of the page":
        assert (text.value, presets.latest()) == (expected, before)


def test_each_line_is_rewritten_where_each_is_a_prompt(generator, chat):
    prompt = generator.form.prompt
    prompt.text.value = "eins\n\nzwei"
    prompt.lines.value = True
    prompt.rewriting.rewrite.click()
    finish(chat)
    assert prompt.prompts == [LONG, LONG]
    assert [request[2]["messages"][1]["content"] for request in chat.requests] == ["eins", "zwei"]


def test_a_fault_is_words_and_the_key_is_nowhere_on_the_page(generator, chat):
    bar, text = generator.form.prompt.rewriting, generator.form.prompt.text
    chat.status, chat.raw = 401, f'{{"error": "{SECRET}"}}'
    bar.rewrite.click()
    finish(chat)
    assert 'role="alert"' in bar.note.value and "refused the key" in bar.note.value
    assert text.value == "ein roter Kreis" and not is_shown(bar.undo)
    generator.run.keep()
    state = [widget.get_state() for widget in family(generator.root)]
    assert SECRET not in str(state) + str(presets.latest()) + str(generator.state)
    text.value = " "
    bar.rewrite.click()
    assert "The prompt is empty" in bar.note.value and len(chat.requests) == 1
