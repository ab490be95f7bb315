"""A loopback server that speaks the Hub's HTTP: its listings, files, redirects, ranges and faults."""

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from turbo_nb import catalog
from turbo_nb.files.filenames import TOKENIZER_FILES

MODEL = "TurboWan2.1-T2V-1.3B-480P"
TURBO, WAN, UMT5 = f"TurboDiffusion/{MODEL}", "Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl"
T5 = catalog.TEXT_ENCODER.path
IN_GIT = ("config.json", "special_tokens_map.json", "index.json", ".py", ".md")  # the other files are in LFS


def some_bytes(name: str, size: int = 200_000) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


class Hub(ThreadingHTTPServer):
    """Three repositories, and those that a test adds; faults by the name of a file or repository; a log.

    `tags` are more revisions by repository and name: commit and files. `sent` counts bytes of content by repository
    and file.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos = {
            TURBO: {name: some_bytes(name) for name in (f"{MODEL}.pth", f"{MODEL}-quant.pth")},
            WAN: {name: some_bytes(name) for name in (catalog.VAE.path, T5)} | {"README.md": b"not for us"},
            UMT5: {name: some_bytes(name, 3000) for name in TOKENIZER_FILES},
        }
        self.commits = {repo: hashlib.sha1(repo.encode()).hexdigest() for repo in self.repos}
        self.tags: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = {}
        self.sent: Counter[tuple[str, str]] = Counter()
        self.slept: list[float] = []
        self.ranges = True  # whether a part of a file can be asked for
        self.faults: dict[str, tuple] = {}
        self.log: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.stuck, self.release = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another host to the client: its token stays behind
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        """Add a repository."""
        self.repos[repo], self.commits[repo] = files, hashlib.sha1(repo.encode()).hexdigest()

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and the files of a revision."""
        if repo in self.repos and revision in ("main", self.commits[repo]):
            return self.commits[repo], self.repos[repo]
        known = self.tags.get(repo, {})
        return known.get(revision) or next((one for one in known.values() if one[0] == revision), None)

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order, once."""
        return list(dict.fromkeys(path.rsplit("/", 1)[-1] for method, path in self.log if method == "GET-FILE"))

    def handle_error(self, request, client_address):
        """A client that goes away is part of the tests."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *arguments):
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fault(self, *names: str) -> bool:
        """Whether a status was asked for instead of an answer; a fault with a count ends with it."""
        for name in names:
            kind, *rest = self.server.faults.get(name, (None,))
            if kind == "status":
                status, headers, *times = rest
                if times:
                    self.server.faults[name] = (kind, status, headers, times[0] - 1)
                    if times[0] <= 1:
                        del self.server.faults[name]
                self.reply(status, b"", **headers)
                return True
        return False

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        hub, path = self.server, self.path.split("?")[0]
        self.server.tokens.add(self.headers.get("authorization"))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            hub.log.append(("API", path))
            return self.about(f"{owner}/{name}", unquote(rest[1]) if rest[:1] == ["revision"] else "main")
        owner, name, resolve, revision, *rest = map(unquote, path.strip("/").split("/"))
        repo, file = f"{owner}/{name}", "/".join(rest)
        tree = hub.tree(repo, revision)
        if tree is None or file not in tree[1]:
            return self.reply(404, X_Error_Code="EntryNotFound")
        commit, files = tree
        if resolve == "cdn":
            return self.content(repo, file, files[file])
        hub.log.append((self.command, path))
        if self.fault(file.rsplit("/", 1)[-1]):
            return None
        body, commit = files[file], {"X_Repo_Commit": commit}
        if file.endswith(IN_GIT):
            if self.command == "GET":
                return self.content(repo, file, body)
            return self.reply(200, body, ETag=f'"{git_hash(body)}"', **commit)
        sha256 = hashlib.sha256(body).hexdigest()
        return self.reply(
            302, Location=f"{hub.cdn}/{repo}/cdn/{revision}/{file}", X_Linked_Etag=f'"{sha256}"',
            X_Linked_Size=str(len(body)), **commit,
        )  # fmt: skip

    def about(self, repo: str, revision: str):
        if self.fault(repo):
            return None
        if (tree := self.server.tree(repo, revision)) is None:
            return self.reply(404, X_Error_Code="RepoNotFound" if revision == "main" else "RevisionNotFound")
        siblings = []
        for name, body in tree[1].items():
            sibling = {"rfilename": name, "size": len(body), "blobId": git_hash(body)}
            if not name.endswith(IN_GIT):
                sibling["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
            siblings.append(sibling)
        return self.reply(200, json.dumps({"id": repo, "sha": tree[0], "siblings": siblings}).encode())

    def content(self, repo: str, path: str, body: bytes):
        file = path.rsplit("/", 1)[-1]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        start, part = int(asked[1]), bool(asked[2]) and self.server.ranges
        self.server.log.append(("GET-PART" if part else "GET-FILE", path))
        kind, *_ = self.server.faults.get(file, (None,))
        if kind == "wrong":
            body = bytes(len(body) - 1) + b"!"
        if part:
            end = min(int(asked[2]) + 1, len(body))
            self.server.sent[repo, path] += end - start
            return self.reply(206, body[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(body)}")
        start = start if self.server.ranges else 0
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.server.sent[repo, path] += len(body) - start
        if kind not in ("cut", "stuck"):
            return self.reply(206 if start else 200, body[start:], **headers)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2])  # after a first cut nothing more comes
        self.wfile.flush()
        if kind == "stuck":
            self.server.stuck.set()
            self.server.release.wait(20)
        self.close_connection = True
        return None


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
