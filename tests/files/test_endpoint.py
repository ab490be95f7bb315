"""The cause of a failed request is named: each variable with the real failure behind it, and never a secret."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import traceback

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from loopback_hub import MODEL

from turbo_nb import catalog
from turbo_nb.checkup import problems
from turbo_nb.checkup.hub_check import Hub as Answer
from turbo_nb.errors import DownloadError, InputError
from turbo_nb.files import endpoint
from turbo_nb.files import hub as download

SPEC = catalog.find(MODEL)
PROXIES = [name for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())]


@pytest.fixture(autouse=True)
def no_variables(cache, monkeypatch):
    """Let each test's variables count: the client reads them once a session"""
    for name in (*PROXIES, "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "HF_TOKEN", *endpoint.OFFLINE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy():
    """A loopback proxy that wants a password; gives its port"""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def shown(capture=DownloadError) -> str:
    """What a user sees of a failing plan, with the traceback"""
    with pytest.raises(capture) as caught:
        download.plan(MODEL, SPEC.needs())
    assert "\n" not in str(caught.value)
    text = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in text and "hf_se" not in text, text
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
def test_a_socks_proxy_without_its_package_is_named(hub, monkeypatch, name, scheme):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, f"{scheme}://u:hunter2@127.0.0.1:7890")
    message = shown()
    assert f"{name} is a SOCKS proxy, '{scheme}://127.0.0.1:7890'" in message
    assert "pip install 'httpx" in message and "[socks]'" in message


@pytest.mark.parametrize("value", ["socks://u:hunter2@a:1", "socks4://a:1", "http://u:hunter2@a:port", "a:b:c", "://"])
def test_a_proxy_that_is_not_an_address_is_named(hub, monkeypatch, value):
    monkeypatch.setenv("HTTP_PROXY", value)
    message = shown()
    assert "HTTP_PROXY is '" in message and "Expected HOST:PORT after one of http://" in message


def test_a_proxy_that_refuses_is_named(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://u:hunter2@127.0.0.1:{port}")
    assert f"the proxy of http_proxy, 'http://127.0.0.1:{port}', gave no connection" in shown()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    assert download.plan(MODEL, SPEC.needs())


def test_a_proxy_that_wants_a_password_is_named(monkeypatch, proxy):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", f"http://u:hunter2@127.0.0.1:{proxy}")
    message = shown()
    assert f"HTTPS_PROXY, 'http://127.0.0.1:{proxy}', gave no connection (407 Proxy" in message


@pytest.mark.filterwarnings("ignore:your Hub token")
@pytest.mark.parametrize("token", ["“hf_secret”", "hf_secrét"])
def test_a_token_that_no_header_can_carry_is_named_and_not_shown(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    message = shown()
    assert "HF_TOKEN has characters that a token cannot have" in message and "cret" not in message


def test_a_saved_token_that_is_not_text_is_named(hub, monkeypatch, tmp_path):
    (tmp_path / "token").write_bytes(b"hf_\xff\xfe")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "the saved token of the Hub has characters" in shown()


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_certificates_that_cannot_be_read_are_named(hub, monkeypatch, tmp_path, content):
    path = tmp_path / "certificates.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    assert f"SSL_CERT_FILE is '{path}', which cannot be read" in shown()


def test_a_certificate_that_is_not_trusted_names_the_remedy(monkeypatch, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as secured:

        def answer():
            while secured.fileno() >= 0:
                with contextlib.suppress(OSError):
                    secured.accept()

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"https://127.0.0.1:{secured.getsockname()[1]}")
        message = shown()
    assert "certificate" in message and "set SSL_CERT_FILE" in message


@pytest.mark.parametrize("name", endpoint.OFFLINE)
def test_the_variable_that_forbids_requests_is_named(hub, tmp_path, name):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-m", "turbo_nb.cli", "download", MODEL], capture_output=True, text=True,
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), name: "1"},
    )  # fmt: skip
    assert result.returncode == 2 and f"{name} is set and it is not in" in result.stderr, result.stderr
    assert not any(other in result.stderr for other in {*endpoint.OFFLINE} - {name})


def test_the_doctor_names_variables_with_which_no_request_succeeds(monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://u:hunter2@127.0.0.1:7890")
    monkeypatch.setenv("HF_TOKEN", "“hf_secret”")
    monkeypatch.setenv("SSL_CERT_FILE", "/missing.pem")
    found = list(problems.of_hub(Answer(endpoint=endpoint.HUB, state="unreachable", error="no name")))
    assert [one.text.split()[0] for one in found] == ["ALL_PROXY", "SSL_CERT_FILE", "HF_TOKEN"]
    assert all(one.fix for one in found) and "hunter2" not in str(found) and "secret" not in str(found)
    assert not [*problems.of_hub(Answer(endpoint=endpoint.HUB, state="offline"))]


@pytest.mark.parametrize("name", endpoint.TIMEOUTS)
@pytest.mark.parametrize("value", ["", "10s", "1.5", "x" * 5000, "http://me:hunter2@a"])
def test_a_timeout_that_is_not_a_number_is_an_input_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)  # huggingface_hub calls int() on it when it is imported
    with pytest.raises(InputError, match=rf"^{name} is '.*\. Expected a whole number of seconds\. Correct") as caught:
        endpoint.check_variables()
    assert "hunter2" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [None, "0", "10", " 10 "])
def test_a_timeout_in_seconds_is_accepted(monkeypatch, value):
    for name in endpoint.TIMEOUTS:
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    endpoint.check_variables()
