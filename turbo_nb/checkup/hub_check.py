"""Ask whether the Hugging Face Hub answers."""

import os
import re
import time
from dataclasses import dataclass
from importlib import import_module

from ..errors import first_line, without_secrets
from ..files.endpoint import HUB, cause, client, offline
from ..machine.beside import within

HUB_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Whether the Hub answers.

    Args:
        endpoint: its address, without user name, password and query.
        state: "reachable", "offline" (HF_HUB_OFFLINE is set) or "unreachable".
        seconds: time to the answer, None without an answer.
        error: why the Hub is unreachable.
        fix: what to do about it, None where no variable is at fault.
    """

    endpoint: str
    state: str
    seconds: float | None = None
    error: str | None = None
    fix: str | None = None


def ask_hub() -> Hub:
    """Send one HEAD request to the Hub (HF_ENDPOINT), and wait 3 s for the answer. Sends nothing when offline."""
    # Reports are pasted into issues, so everything up to the last @ and the query are left out: they may be secret.
    endpoint = re.sub(r"^([a-z][a-z0-9+.-]*://)?.*@", r"\1", os.environ.get("HF_ENDPOINT") or HUB, flags=re.I | re.S)
    endpoint = re.split(r"[?#]", endpoint, maxsplit=1)[0].rstrip("/")
    if offline():
        return Hub(endpoint=endpoint, state="offline")
    if not endpoint.lower().startswith(("http://", "https://")):
        return Hub(endpoint=endpoint, state="unreachable", error="the address does not begin with https:// or http://")
    begin = time.monotonic()
    try:
        answer = within(HUB_SECONDS, _error_of, endpoint)  # because a name server that hangs ignores timeouts
    except TimeoutError as error:
        answer = str(error)
    if answer is None:
        return Hub(endpoint=endpoint, state="reachable", seconds=time.monotonic() - begin)
    error, _, fix = answer.partition(". ")
    return Hub(endpoint=endpoint, state="unreachable", error=error, fix=fix or None)


def _error_of(endpoint: str) -> str | None:
    """Return why an address does not answer and, after a full stop, the fix. None: it answers"""
    try:
        # The client of huggingface_hub, because another one reads proxies and certificates from other variables
        with import_module(client()).Client(follow_redirects=True, timeout=HUB_SECONDS) as session:
            answer = session.head(endpoint)
    except Exception as error:  # a malformed address, a proxy or a broken server can raise anything, and all are facts
        return cause(error, endpoint) or without_secrets(first_line(error)).replace(". ", ", ") or type(error).__name__
    # any answer below 500 is the Hub's own
    return None if answer.status_code < 500 else f"HTTP {answer.status_code} {answer.reason_phrase}"
