"""The Hub's address in HF_ENDPOINT: checked, and shown without its secrets."""

import os
import re
from urllib.parse import urlsplit

from ..errors import InputError

HUB = "https://huggingface.co"


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
    if not host or parts.scheme not in ("http", "https"):
        raise _wrong(endpoint)
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}".rstrip("/")


def check_variable() -> None:
    """Raise InputError where HF_ENDPOINT is so malformed that huggingface_hub cannot be imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint).hostname  # noqa: B018 because reading it is what fails
    except ValueError:
        raise _wrong(endpoint) from None


def without_secrets(text: str) -> str:
    """Remove user names, passwords and queries from the addresses in a text."""
    return re.sub(r"(https?://)(?:[^\s'\"]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?", r"\1\2", text)


def _wrong(endpoint: str) -> InputError:
    shown = endpoint.rpartition("@")[2].partition("?")[0]
    return InputError(
        f"HF_ENDPOINT is {shown!r}. Expected an http or https address, such as {HUB}. Correct it or unset it."
    )
