"""Ask whether the Hugging Face Hub answers."""

import os
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from ..files.endpoint import HUB, offline

HUB_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Whether the Hub answers.

    Args:
        endpoint: its address, without user name and password.
        state: "reachable", "offline" (HF_HUB_OFFLINE is set) or "unreachable".
        seconds: time to the answer, None without an answer.
        error: why the Hub is unreachable.
    """

    endpoint: str
    state: str
    seconds: float | None = None
    error: str | None = None


def ask_hub() -> Hub:
    """Send one HEAD request to the Hub (HF_ENDPOINT), and wait 3 s for the answer. Sends nothing when offline."""
    # Reports are pasted into issues, so everything up to the last @ is left out: there may be a password in it.
    endpoint = re.sub(r"^([a-z][a-z0-9+.-]*://)?.*@", r"\1", os.environ.get("HF_ENDPOINT") or HUB, flags=re.I | re.S)
    endpoint = endpoint.rstrip("/")
    if offline():
        return Hub(endpoint=endpoint, state="offline")
    if not endpoint.lower().startswith(("http://", "https://")):
        return Hub(endpoint=endpoint, state="unreachable", error="the address does not begin with https:// or http://")
    answer = []
    begin = time.monotonic()
    # A thread, because a name server that hangs ignores the timeout of the request.
    thread = threading.Thread(target=lambda: answer.append(_error_of(endpoint)), daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answer == [None]:
        return Hub(endpoint=endpoint, state="reachable", seconds=time.monotonic() - begin)
    error = answer[0] if answer else f"no answer in {HUB_SECONDS:g} s"
    return Hub(endpoint=endpoint, state="unreachable", error=error)


def _error_of(endpoint: str) -> str | None:
    """Return why an address does not answer, None where it does"""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            return None
    except urllib.error.HTTPError as error:  # any answer below 500 is the Hub's own
        return None if error.code < 500 else f"HTTP {error.code} {error.reason}"
    except Exception as error:  # a malformed address, a proxy or a broken server can raise anything, and all are facts
        return str(getattr(error, "reason", error)) or type(error).__name__
