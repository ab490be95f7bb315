"""How the Hub is reached: HF_ENDPOINT, proxies, certificates and the token, checked, and shown without secrets."""

import os
import re
import ssl
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

from ..errors import InputError, first_line, without_secrets
from ..values import shown

HUB = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the two variables that huggingface_hub reads
ETAG_TIMEOUT = "HF_HUB_ETAG_TIMEOUT"
TIMEOUTS = (ETAG_TIMEOUT, "HF_HUB_DOWNLOAD_TIMEOUT")
UNREACHED = ("ConnectError", "ConnectTimeout", "ProxyError", "TimeoutError")  # names of errors of a request
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def address(endpoint: str) -> str:
    """Return an HF_ENDPOINT without user name, password and query.

    Raises:
        InputError: it is not an http or https address.
    """
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _wrong(endpoint) from None
    if not host or parts.scheme not in ("http", "https") or "@" in parts.path:  # "/" in a password ends the host
        raise _wrong(endpoint)
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.partition(';')[0]}".rstrip("/")


def check_variables() -> None:
    """Raise InputError for a variable that is so malformed that huggingface_hub cannot be imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint).hostname  # noqa: B018 because reading it is what fails
    except ValueError:
        raise _wrong(endpoint) from None
    for name in TIMEOUTS:
        try:
            int(os.environ.get(name, "0"))
        except ValueError:
            got = shown(without_secrets(os.environ[name]))
            raise InputError(f"{name} is {got}. Expected a whole number of seconds. Correct it or unset it.") from None


def offline() -> str | None:
    """Return the variable that forbids requests, None where none does."""
    return next((name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def bare(address: str) -> str:
    """Return what may be an address without user name, password, query, fragment and tokens, to show it."""
    scheme, slashes, rest = address.partition("://")
    if not slashes or not re.fullmatch(r"\s*[A-Za-z][A-Za-z0-9+.-]*", scheme):
        scheme, slashes, rest = "", "", address
    host = re.split("[?#;]", re.split("[@＠﹫]", rest)[-1])[0]  # a keyboard for Chinese has the wide signs
    return scheme + slashes + re.sub(r"\b(hf_|sk-)[\w-]+", r"\1…", host)


def faults(token: str | None = None) -> Iterator[str]:
    """Yield what is wrong with the variables that every request depends on, each with its fix.

    Args:
        token: the one that is sent to the Hub. It is never shown.
    """
    for name, value in _proxies():
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            known = parts.scheme in PROXY_SCHEMES and (parts.port is None or parts.port > 0)
        except ValueError:
            known = False
        if not known:
            schemes = ", ".join(f"{scheme}://" for scheme in PROXY_SCHEMES)
            yield f"{name} is {bare(value)!r}. Expected HOST:PORT after one of {schemes}. Correct it or unset it."
        elif parts.scheme.startswith("socks") and find_spec("socksio") is None:
            yield (
                f"{name} is a SOCKS proxy, {bare(value)!r}, which needs a package. "
                f"Run: pip install '{client()}[socks]'. Or set {name} to the proxy's http port."
            )
    if path := os.environ.get("SSL_CERT_FILE"):
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:
            yield (
                f"SSL_CERT_FILE is {path!r}, which cannot be read ({first_line(error)}). "
                "Expected a PEM file of certificates. Correct it or unset it."
            )
    if token and not re.fullmatch("[!-~]+", token):
        source = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
        yield (
            f"{source or 'the saved token of the Hub'} has characters that a token cannot have, such as typographic "
            f"quotes. {'Set it again' if source else 'Log in again, with hf auth login'}, as the Hub shows the token."
        )


def cause(error: BaseException, hub: str) -> str | None:
    """Return which variable made a request to the Hub fail, and the fix. None: the variables are not at fault."""
    kind, text = type(error).__name__, without_secrets(first_line(error))
    if kind in UNREACHED:
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return (
                f"the certificate of {hub} is not trusted ({text}). If a proxy replaces certificates, "
                "set SSL_CERT_FILE to a PEM file with the proxy's own."
            )
        if used := _proxy_to(hub):
            name, value = used
            return f"the proxy of {name}, {bare(value)!r}, gave no connection ({text}). Correct {name} or unset it."
        return None
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError | ssl.SSLError):
        return None
    return next(faults(token()), None)


def token() -> str | None:
    """Return the token that is sent to the Hub. None: none is sent, or huggingface_hub is missing."""
    try:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            return None
        return get_token()
    except UnicodeDecodeError:  # a saved token that is not text
        return "\ufffd"
    except (ImportError, OSError):
        return None


def client() -> str:
    """Return the name of the package that sends the requests, which differs between versions of huggingface_hub."""
    try:
        from huggingface_hub.errors import HTTPError
    except ImportError:
        return "httpx"
    return HTTPError.__module__.partition(".")[0]


def _proxies() -> list[tuple[str, str]]:
    """The variables that name a proxy, as they are spelled, with their values"""
    used = getproxies_environment()
    pairs = ((f"{scheme}_proxy", used[scheme]) for scheme in ("http", "https", "all") if used.get(scheme))
    return [(lower if os.environ.get(lower) else lower.upper(), value.strip()) for lower, value in pairs]


def _proxy_to(hub: str) -> tuple[str, str] | None:
    """The variable and the value of the proxy between here and the Hub"""
    parts = urlsplit(hub)
    proxies = {name.lower(): (name, value) for name, value in _proxies()}
    used = proxies.get(f"{parts.scheme}_proxy") or proxies.get("all_proxy")
    return used if used and not proxy_bypass_environment(parts.netloc) else None


def _wrong(endpoint: str) -> InputError:
    return InputError(
        f"HF_ENDPOINT is {bare(endpoint)!r}. Expected an http or https address, such as {HUB}. Correct it or unset it."
    )
