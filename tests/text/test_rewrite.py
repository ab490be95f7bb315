"""Prompts are rewritten by huggingface_hub's client and a loopback server; the key stays in the request's header."""

import json
import logging
import traceback

import pytest
from helpers import command_line
from huggingface_hub import constants
from loopback_chat import HUB_TOKEN, SECRET, Chat, chat_server

import turbo_nb
from turbo_nb import catalog
from turbo_nb.errors import EndpointError, InputError, TurboNbError, collect_warnings
from turbo_nb.text import rewrite
from turbo_nb.text.rewrite import KEY, URL, cleaned, instructions, rewrite_prompt
from turbo_nb.video import mp4


@pytest.fixture
def chat(monkeypatch):
    with chat_server(monkeypatch) as server:
        yield server


def test_the_text_and_the_instructions_are_sent_and_the_answer_comes_back(chat):
    chat.answer = "A ginger cat,\n\nwalking."
    assert turbo_nb.rewrite_prompt("eine Katze", task="i2v") == "A ginger cat, walking."
    path, headers, body = chat.requests[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", f"Bearer {SECRET}")
    assert body == {
        "model": "qwen",
        "messages": [
            {"role": "system", "content": instructions("i2v")},
            {"role": "user", "content": "eine Katze"},
        ],
        "stream": False,
    }


def test_instructions_suit_the_model():
    for words in ("English", "200 words", "motion", "camera", "light", "style", "names", "quoted"):
        assert words in instructions()
    assert "picture" in instructions("i2v") and "picture" not in instructions()
    nano = instructions(vocabulary=catalog.NANO.vocabulary)
    assert "SHAPE: circle, square, triangle" in nano and "200 words" not in nano


@pytest.mark.parametrize("key", ["", "  "])
def test_without_a_key_no_token_of_the_hub_is_sent(chat, monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    rewrite_prompt("a cat")
    assert HUB_TOKEN not in str(chat.requests) and chat.requests[0][1]["authorization"] == "Bearer none"


@pytest.mark.parametrize(
    ("tail", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
        ("/api/v4/chat/completions?version=2", "/api/v4/chat/completions?version=2"),
    ],
)
def test_an_address_is_completed_as_openais_client_does_it(chat, monkeypatch, tail, path):
    monkeypatch.setenv(URL, f" {chat.url.removesuffix('/v1')}{tail}\n")
    rewrite_prompt("a cat")
    assert chat.requests[0][0] == path


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ('"A cat walks."', "A cat walks."),
        ("“A cat walks.”", "A cat walks."),
        ("```\nA cat walks.\n```", "A cat walks."),
        ('```text\n"A cat walks."\n```\n', "A cat walks."),
        ("<think>\nHm, a cat.\n</think>\n\nA cat walks.", "A cat walks."),
        ("Hm, a cat.\n</think>\nA cat walks.", "A cat walks."),
        ("<think>Hm, a c", ""),
        ('"Hello", a sign says, and another "Bye"', '"Hello", a sign says, and another "Bye"'),
        ("Here is the prompt: A cat walks.", "Here is the prompt: A cat walks."),
        ("A **cat** walks.\n- slowly", "A **cat** walks. - slowly"),
        ("a\x1b[31m cat\ud800", "a[31m cat"),
        (" \n", ""),
    ],
)
def test_only_thoughts_fences_and_surrounding_quotes_are_removed(answer, prompt):
    assert cleaned(answer) == prompt


def test_an_answer_that_is_too_long_or_cut_off_warns(chat):
    chat.answer = "word " * 600
    with collect_warnings() as notes:
        assert len(rewrite_prompt("a cat").split()) == 600
    assert ["600 words" in note and "512 tokens" in note for note in notes] == [True]
    chat.answer, chat.more = "A cat that", {"finish_reason": "length"}
    with collect_warnings() as notes:
        rewrite_prompt("a cat")
    assert ["cut off" in note for note in notes] == [True]


def error(message: object) -> str:
    return json.dumps({"error": message})


HTML = "<html><body>nginx</body></html>"
FAULTS = {
    "401": (
        401,
        f'{{"error": {{"message": "Incorrect API key: {SECRET}"}}}}',
        "refused the key (401). Expected a valid",
    ),
    "404": (404, error({"message": "no model"}), "(404: no model). Expected an API that has the model 'qwen'."),
    "400": (400, f'{{"error": "{SECRET} is odd"}}', "(400: … is odd). Expected"),
    "404 as HTML": (404, HTML, "refused the request (404). Expected"),
    "429": (429, "{}", "enough requests for now (429). Expected"),
    "500": (500, HTML, "failed (500). Expected"),
    "HTML": (200, HTML, "did not answer with a chat completion. Expected an OpenAI-compatible endpoint. Correct"),
    "no choices": (200, '{"choices": []}', "did not answer with a chat completion"),
    "other JSON": (200, '{"choices": [{"text": "a"}]}', "did not answer with a chat completion"),
    "null": (200, '{"choices": [{"message": {"role": "assistant", "content": null}}]}', "is empty. Expected a prompt."),
    "a list": (200, '{"choices": [{"message": {"role": "assistant", "content": [{}]}}]}', "with a chat completion"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_endpoint_has_words_and_never_the_key(chat, caplog, fault):
    chat.status, chat.raw, words = FAULTS[fault]
    caplog.set_level(logging.DEBUG)
    with pytest.raises(EndpointError) as caught:
        rewrite_prompt("a cat")
    assert words in str(caught.value) and "Expected" in str(caught.value) and str(caught.value).endswith(".")
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)


def test_a_server_that_is_slow_or_gone_is_an_error_in_words(chat, monkeypatch):
    chat.go.clear()
    with pytest.raises(EndpointError, match=r"did not answer for 0.2 s. Expected an answer. Try again, or set"):
        rewrite_prompt("a cat", timeout=0.2)
    monkeypatch.setenv(URL, "http://127.0.0.1:1/v1")
    with pytest.raises(EndpointError, match=r"^http://127.0.0.1:1/v1/chat/completions gave no connection .* Start it"):
        rewrite_prompt("a cat")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EndpointError, match=r"was not asked, because HF_HUB_OFFLINE is set. .* Unset HF_HUB_OFFLINE"):
        rewrite_prompt("a cat")


def test_a_proxy_that_is_wrong_is_named(chat, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "foo://proxy:1")
    with pytest.raises(InputError, match="HTTPS_PROXY is"):
        rewrite_prompt("a cat")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (URL, "localhost:11434/v1", f"{URL} is 'localhost:11434/v1'. Expected an http or https address"),
        (URL, "ftp://me:secret@host/x?key=secret", f"{URL} is 'ftp://host/x'. Expected"),
        (URL, "sk-secret-of-mine", f"{URL} is 'sk-…'. Expected"),
        (URL, "http://a b/v1", "Expected an http"),
        (URL, "http://[::1/v1", "Expected an http"),
        (URL, "http://host:99999999/v1", "Expected an http"),
        (URL, " ", f"{URL} is not set. Expected"),
        (KEY, "sk-“quoted”-secret", f"{KEY} has characters that a key cannot have. Expected"),
        (KEY, "secret\nsecret", f"{KEY} has characters"),
    ],
)
def test_wrong_variables_are_named_before_anything_is_sent(chat, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        rewrite_prompt("a cat")
    assert words in str(caught.value) and "secret" not in str(caught.value) and chat.requests == []


@pytest.mark.parametrize("host", ["a..b", "*", "xn--", "." * 300, "exa%mple", "☃".encode().hex() * 40])
def test_odd_hosts_are_errors_of_this_package(chat, monkeypatch, host):
    monkeypatch.setenv(URL, f"http://{host}/v1")
    with pytest.raises(TurboNbError, match="Expected"):
        rewrite_prompt("a cat", timeout=2)


def test_a_user_name_and_a_query_of_the_address_are_not_shown(chat, monkeypatch):
    monkeypatch.setenv(URL, chat.url.replace("//", "//me:password@") + "?key=secret")
    with pytest.raises(InputError, match=f"{URL} has a user name, and {KEY} is set. Expected one"):
        rewrite_prompt("a cat")  # httpx would send the user name alone
    monkeypatch.delenv(KEY)
    chat.status, chat.raw = 500, "{}"
    with pytest.raises(EndpointError) as caught:
        rewrite_prompt("a cat")
    assert not any(word in "".join(traceback.format_exception(caught.value)) for word in ("password", "secret"))


@pytest.mark.parametrize("status", [302, 307, 308])
def test_neither_text_nor_key_follow_to_another_address(chat, monkeypatch, status):
    other = Chat()
    chat.status, chat.raw, chat.headers = status, "", {"location": f"{other.url.replace('//', '//me:word@')}?a=b"}
    with pytest.raises(EndpointError, match=rf"sends on to '{other.url}' \({status}\). Expected .* Correct {URL}"):
        rewrite_prompt("a cat")
    other.shutdown()
    other.server_close()
    assert other.requests == [] and len(chat.requests) == 1


ODD = {
    "parts": ([{"type": "text", "text": "A cat"}, {"type": "text", "text": " walks."}], "A cat walks."),
    "an object": ({"a": 1}, "did not answer with a chat completion"),
    "a number": (5, "did not answer with a chat completion"),
    "nothing that shows": ("\u200b\ufeff\u202e\x00", "is empty. Expected a prompt"),
    "half an emoji": ("\ud83d", "is empty. Expected a prompt"),
    "one word without end": ("a" * 30_000, "is 30,000 characters long. Expected a prompt"),
    "megabytes": ("a" * 2_000_000, "did not answer with a chat completion"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_contents_are_a_prompt_or_an_error(chat, kind):
    content, words = ODD[kind]
    chat.raw = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
    if kind == "parts":
        assert rewrite_prompt("a cat") == words
    else:
        with pytest.raises(EndpointError, match=words):
            rewrite_prompt("a cat")


def test_it_is_off_without_an_address(monkeypatch):
    monkeypatch.delenv(URL, raising=False)
    assert not rewrite.is_set()


def test_the_shell_keeps_both_prompts_and_no_key(chat, tmp_path):
    chat.answer = "a large red circle growing on a black background"
    path = tmp_path / "clip.mp4"
    size = ("--num_frames", 1, "--num_steps", 1, "--resolution", "32x32", "--device", "cpu")
    result = command_line("t2v", "--rewrite", "--prompt", "ein roter Kreis", "--save_path", path, *size, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"prompt: {chat.answer}" in result.stdout.splitlines()
    found = mp4.read_metadata(path)
    assert (found["prompt"], found["original_prompt"]) == (chat.answer, "ein roter Kreis")
    assert chat.requests[0][2]["messages"][0]["content"] == instructions(vocabulary=catalog.NANO.vocabulary)
    assert SECRET.encode() not in path.read_bytes() and SECRET not in str(result) + json.dumps(found)
    chat.status, chat.raw = 401, "{}"
    result = command_line("t2v", "--rewrite", "--prompt", "x", "--save_path", path, *size, cwd=tmp_path)
    assert result.returncode == 2 and "refused the key" in result.stderr and SECRET not in str(result)
