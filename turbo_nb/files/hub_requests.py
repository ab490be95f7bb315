"""Requests to the Hub: the names in a repository, a few bytes of a file, and failures as one line with a fix."""

import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from ..catalog import HubFile
from ..errors import DownloadError, first_line, warn, without_secrets
from ..machine.beside import within
from .endpoint import ETAG_TIMEOUT, HUB, UNREACHED, address, cause, offline, token

InvalidURL = sys.modules[HTTPError.__module__.partition(".")[0]].InvalidURL  # of httpx or httpx2
TRUSTED = (HUB, "https://hf.co")  # endpoints that a token may go to without a warning
ANSWER_SECONDS = 5  # for the names in a repository, unless HF_HUB_ETAG_TIMEOUT is set
TRIES = 3  # of a request that the Hub answers with 429
LONGEST_WAIT = 300  # seconds between them: the window of the Hub's rate limit
AGAIN = "Files that are whole stay, so run it again to go on."
DOWNLOAD_FIRST = "Download it first, with turbo-nb download."


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a repository at a commit: size in bytes and blob (see `hub_cache.PlannedFile`) by name.

    partial: these are the files in the cache, and the repository may have more.
    """

    repo: str
    commit: str
    files: dict[str, tuple[int, str | None]]
    partial: bool = False


_answers: dict[tuple[str, str, str], Listing] = {}  # of the Hub for commits, which do not change


def check_endpoint() -> None:
    """Check HF_ENDPOINT, keep its secrets out of the client's log, and warn where a token goes to a foreign place."""
    if constants.HF_HUB_OFFLINE:
        return
    endpoint = address(constants.ENDPOINT)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_hide_secrets)
    if endpoint not in TRUSTED and token():
        warn(
            f"your Hub token goes to {endpoint}, which is not the Hub; unset HF_ENDPOINT, or set "
            "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send no token",
            stacklevel=2,
        )


def _hide_secrets(record: logging.LogRecord) -> bool:
    """A filter of the client's log, because the client logs the address of a request that it repeats"""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def ask_listing(file: HubFile, *, optional: bool, missing: str) -> Listing | None:
    """Ask for the names in a file's repository.

    Args:
        file: of the repository and the revision.
        optional: return None, with a warning, where the Hub does not answer.
        missing: what an error calls the file that is not in the cache, when the Hub cannot be asked.
    """
    if file.commit and (known := _answers.get((constants.ENDPOINT, file.repo, file.commit))):
        return known
    try:
        with translated(missing if constants.HF_HUB_OFFLINE and missing else file.repo):
            info = _ask(file.repo, file.commit or file.revision)
    except DownloadError as error:
        if not optional:
            raise
        if not constants.HF_HUB_OFFLINE:
            warn(f"going on with the files in the cache, because {error}", stacklevel=3)
        return None
    files = {
        one.rfilename: (one.size, one.lfs.sha256 if one.lfs else one.blob_id)
        for one in info.siblings or ()
        if not {"..", ""} & {*one.rfilename.split("/")}  # because a name becomes a path in the cache
    }
    found = _answers[constants.ENDPOINT, file.repo, info.sha] = Listing(repo=file.repo, commit=info.sha, files=files)
    return found


def _ask(repo: str, revision: str | None, tries: int = TRIES):
    """Ask for a repository's files. Waits after a 429, because the client does that for transfers only."""
    seconds = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get(ETAG_TIMEOUT) else ANSWER_SECONDS

    def ask():
        # longer than `within` waits, whose error is the clearer one
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=seconds + 1)

    try:
        # because the client waits as long for every address of a host, and for a name server it has no timeout
        return within(seconds, ask)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; {ETAG_TIMEOUT} allows more") from None
    except HfHubHTTPError as error:
        wait = _wait(error)
        if error.response.status_code != 429 or tries == 1 or wait > LONGEST_WAIT:
            raise
    warn(f"the Hub is asked too often; asking again in {wait} s", stacklevel=5)
    time.sleep(wait)
    return _ask(repo, revision, tries - 1)


def read_bytes(file: HubFile, commit: str, begin: int, end: int) -> bytes:
    """Return some bytes of a file on the Hub without writing them anywhere. Fewer where the file is shorter.

    Raises:
        DownloadError: the Hub does not answer with these bytes.
    """
    url = hf_hub_url(file.repo, file.path, revision=commit)
    headers = build_hf_headers() | {"range": f"bytes={begin}-{end - 1}"}
    found = bytearray()
    with (
        translated(file.name),
        get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
    ):
        hf_raise_for_status(response)
        if begin and response.status_code != 206:
            raise DownloadError(f"{file.name}: {constants.ENDPOINT} cannot send a part of it. {DOWNLOAD_FIRST}")
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= end - begin:  # because a server may send more than it was asked for
                break
    return bytes(found[: end - begin])


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what huggingface_hub, httpx, hf_xet or the system raises over `what` into one line with a fix."""
    try:
        yield
    except DownloadError:
        raise
    except (OSError, HTTPError, InvalidURL, RuntimeError, ValueError, KeyError, ImportError) as error:
        first = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        variable = cause(first, constants.ENDPOINT)
        secret = variable or without_secrets(constants.ENDPOINT) != constants.ENDPOINT  # a traceback shows the causes
        raise DownloadError(without_secrets(f"{what}: {variable or _reason(first)}")) from (None if secret else error)


def _reason(error: BaseException) -> str:
    """What went wrong, and the fix"""
    status, number = getattr(getattr(error, "response", None), "status_code", None), getattr(error, "errno", None)
    kind, text, hub, cache = type(error).__name__, first_line(error), constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, OfflineModeIsEnabled):
        name = offline() or "HF_HUB_OFFLINE"
        return f"{name} is set and it is not in {cache}. Unset {name}, or copy a cache that has it."
    if status in (401, 403):
        return f"{hub} does not show it to you ({status}). Set HF_TOKEN, and accept its licence there if it has one."
    if status == 404:
        return f"{hub} does not have it (404). Check its name and revision, and HF_ENDPOINT if it is set."
    if status == 429:
        return f"{hub} is asked too often (429). Wait {_wait(error)} s, or set HF_TOKEN. {AGAIN}"
    if status:
        return f"{hub} failed ({status}). Wait some minutes. {AGAIN}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {cache}. Free some, or set HF_HOME to a folder on a larger disk. {AGAIN}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache} cannot be written ({text}). Set HF_HOME to a folder of yours."
    if kind in UNREACHED:
        return f"cannot reach {hub} ({text}). Check the network, proxies, and HF_ENDPOINT if it is set."
    if isinstance(error, (HTTPError, RuntimeError)) or "Consistency check" in text:
        return f"the transfer broke off ({kind}: {text}). {AGAIN}"
    return f"{hub} gave no answer that the Hub would give ({kind}: {text}). Check HF_ENDPOINT and proxies."


def _wait(error: HfHubHTTPError) -> int:
    """Seconds to wait after a 429, as its headers ask; 5 without such a header"""
    headers = error.response.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("retry-after", "").strip()
    return limit.reset_in_seconds if limit else int(after) if after.isdigit() else 5
