"""A loopback server that speaks OpenAI's chat format, with the faults that real ones have."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

from turbo_nb.text.rewrite import KEY, MODEL, URL

SECRET, HUB_TOKEN = "sk-do-not-show-this-1234", "hf_of_the_user_12345678"


@contextmanager
def chat_server(monkeypatch) -> "Iterator[Chat]":
    """Start a server that the environment names"""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = Chat()
    for name, value in {URL: server.url, KEY: SECRET, MODEL: "qwen", "HF_TOKEN": HUB_TOKEN, "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


class Chat(ThreadingHTTPServer):
    """Answers each request with `answer`, as JSON with `status`; `raw` is sent in place of it, after `go` is set.

    `requests` has the path, the headers (names in lower case) and the JSON of each request.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: str = "A rewritten prompt."):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.status, self.raw, self.more = answer, 200, None, {"finish_reason": "stop"}
        self.headers: dict[str, str] = {}  # of the answer, beside its type
        self.requests: list[tuple[str, dict, dict]] = []
        self.go = threading.Event()
        self.go.set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that goes away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Chat

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.server.go.wait(30)
        choice = {"index": 0, "message": {"role": "assistant", "content": self.server.answer}, **self.server.more}
        raw = self.server.raw
        if raw is None:
            raw = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json" if raw[:1] == "{" else "text/html")
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw.encode())
