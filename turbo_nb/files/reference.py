"""References to files of the Hub: their forms, and which files of a repository a model is. Asks no network.

A reference is data. The names of a repository's files and the index of its shards decide what is fetched. Only weights,
`config.json` and the files of a tokenizer are ever chosen.
"""

import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from .. import catalog
from ..catalog import HubFile
from ..errors import CheckpointError, InputError, listed, without_secrets
from ..machine import environment
from .endpoint import HUB
from .filenames import (
    EXPERTS,
    INDEX,
    STANDARD,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_FOLDERS,
    VOCABULARIES,
    WEIGHTS,
    as_one_file,
)  # fmt: skip

FORMS = "owner/repo, owner/repo/path/file.safetensors, each with or without @revision, or their address"
HOSTS = {urlsplit(HUB).netloc, "www.huggingface.co", "hf.co"}
NAME = r"\w(?:[\w.-]{0,94}\w)?"  # of an owner or a repository, as huggingface_hub requires it
REFERENCE = re.compile(rf"({NAME}/{NAME})((?:/[^/\\@]+)*)/?(?:@([^\s\\@]+))?", re.ASCII)
# Where the other parts of a model lie, first in diffusers' layout, then in that of Wan-AI's repositories
PARTS = {
    "vae": ("vae/", catalog.VAE.path),
    "text_encoder": ("text_encoder/", catalog.TEXT_ENCODER.path),
    "tokenizer": tuple(f"{name}/" for name in TOKENIZER_FOLDERS),
}
OTHER_PARTS = re.compile(r"vae|t5|clip|lora", re.IGNORECASE)  # in the name of a file that is not a transformer


def read(given: str | Path, option: str = "model", endpoint: str = HUB) -> str | Path | HubFile:
    """Tell what an option was given: a model's name, a path or a reference.

    A name of the catalogue is a name whatever lies here. A path that exists is a path, also where it looks like a
    reference. The folder of a repository in the Hub's cache means its snapshot.

    Args:
        given: the text.
        option: "model" may have a name.
        endpoint: the Hub's address; one with its host is a reference, too.

    Returns:
        A name, known or not, for a model. A path, which may not exist. Or a HubFile, whose path is "/" for a whole
        repository and ends with "/" for a folder.

    Raises:
        InputError: an address of another host, or one that does not name weights.
        CheckpointError: the folder of a repository in the Hub's cache does not show which snapshot is meant.
    """
    text = str(given)
    if option == "model" and text in ("auto", *catalog.MODELS, *catalog.UPSTREAM_NAMES):
        return text
    if os.path.exists(text):
        return snapshot(Path(given))
    if found := parse(text, option, endpoint):
        known = catalog.of_repo(found.repo) if found.path == "/" and found.revision is None else None
        return known.name if known and option == "model" else found
    return text if option == "model" and isinstance(given, str) else Path(given)


def snapshot(path: Path) -> Path:
    """Return the snapshot that a repository's folder in the Hub's cache means. Another path stays as it is.

    It is the snapshot of the branch main, else the only one.

    Raises:
        CheckpointError: no snapshot, or several without a branch that chooses one.
    """
    folder = path.parent if path.name == "snapshots" else path
    if not (Path(os.path.abspath(folder)).name.startswith("models--") and environment.is_dir(folder / "snapshots")):
        return path
    commits = sorted(os.listdir(folder / "snapshots"))
    with suppress(OSError):
        main = (folder / "refs" / "main").read_text().strip()
        commits = [main] if main in commits else commits
    if len(commits) != 1:
        found = f"several snapshots ({listed(commits)})" if commits else "no snapshot"
        raise CheckpointError(
            f"{str(folder)!r} is a folder of the Hub's cache with {found}. Expected one snapshot. "
            f"{'Give the path of one of them.' if commits else 'Download the model again.'}"
        )
    return folder / "snapshots" / commits[0]


def parse(text: str, option: str = "model", endpoint: str = HUB) -> HubFile | None:
    """Return what a reference or an address of the Hub names; None for text of another form. Raises InputError."""
    if match := re.match(r"(https?):/+(?=\w|\[)", text):  # because a Path has one slash there
        return _of_address(f"{match[1]}://{text[match.end() :]}", option, endpoint)
    match = REFERENCE.fullmatch(text)
    if not match or not text.isprintable():
        return None
    repo, path, revision = match.groups()
    if not path and repo.lower().endswith(WEIGHTS):
        return None  # the name of a file that does not exist
    return _file(repo, path.split("/")[1:], revision)


def _of_address(address: str, option: str, endpoint: str) -> HubFile:
    wrong = InputError(
        f"{option} is {without_secrets(address)!r}. Expected an address such as {HUB}/owner/repo or "
        f"{HUB}/owner/repo/resolve/main/file.safetensors. Download a file of another place, and give its path."
    )
    try:
        parts, own = urlsplit(address), urlsplit(endpoint)
        host = parts.netloc.rpartition("@")[2].lower()
    except ValueError:
        raise wrong from None
    prefix = ""
    if host == own.netloc.rpartition("@")[2].lower():
        prefix = own.path.rstrip("/")
    elif host not in HOSTS:
        raise wrong
    if not parts.path.startswith(f"{prefix}/"):
        raise wrong
    owner, name, *rest = [*map(unquote, parts.path.removeprefix(prefix).strip("/").split("/")), ""]
    rest, revision = [one for one in rest if one], None
    if rest:
        how, *rest = rest
        if how not in ("resolve", "blob", "raw", "tree") or not rest:
            raise wrong
        length = 3 if rest[:2] in (["refs", "pr"], ["refs", "convert"]) else 1
        revision, rest = "/".join(rest[:length]), rest[length:]
        if how != "tree" and not rest:
            raise wrong
    repo = f"{owner}/{name}"
    if owner in ("datasets", "spaces", "models", "docs", "api") or not REFERENCE.fullmatch(repo):
        raise wrong
    found = _file(repo, rest, revision)
    if found is None:
        raise wrong
    return found


def _file(repo: str, segments: list[str], revision: str | None) -> HubFile | None:
    """The file or folder; None where a part of it cannot be the name of one"""
    if any(one in (".", "..") or "\\" in one or "/" in one for one in (*segments, *(revision or "").split("/"))):
        return None
    if ".." in repo or "--" in repo or repo.endswith(".git"):
        return None
    path = "/".join(segments)
    if path.lower().endswith(".model"):  # SentencePiece's
        return HubFile(repo, path, revision, kind="tokenizer")
    return HubFile(repo, path if path.lower().endswith(WEIGHTS) else f"{path}/", revision)


# What the names of a repository's files tell


def find(whole: HubFile, names: Collection[str], part: str = "transformer") -> tuple[HubFile, ...]:
    """Return the files or folders of a part in a repository, or in a folder of it.

    Args:
        whole: a reference. A file is returned as it is.
        names: of the repository's files.
        part: "transformer" (one, or high-noise and low-noise), "vae", "text_encoder", "tokenizer" or "LoRA".

    Raises:
        CheckpointError: the folder has no such part, or several files that may be it.
    """
    if not whole.path.endswith("/"):
        folder = whole.path.rpartition("/")[0]
        is_shard = as_one_file(whole.path) != whole.path and whole.path in weights(names, f"{folder}/".lstrip("/"))[1]
        return (replace(whole, path=f"{folder}/") if is_shard else whole,)
    folder = whole.path.lstrip("/")
    if part == "transformer":
        for pair in EXPERTS:
            paths = [f"{folder}{name}/" for name in pair]
            if _has_weights(names, paths[0]):
                return tuple(replace(whole, path=path) for path in paths if _has_weights(names, path))
    elif found := beside(whole, names, part):
        return (found,)
    if part == "tokenizer":
        if any(f"{folder}{name}" in names for name in TOKENIZER_FILES):
            return (replace(whole, kind="tokenizer"),)
        raise _nothing(whole, names, part)
    inside = _inside(names, folder)
    if any(STANDARD.fullmatch(name) for name in inside):
        return (whole,)
    files = [name for name in inside if name.lower().endswith(WEIGHTS)]
    wanted = [name for name in files if not OTHER_PARTS.search(name)] if part == "transformer" else files
    wanted = wanted or files
    if len({as_one_file(name) for name in wanted}) > 1:
        raise CheckpointError(
            f"{whole} has {len(wanted)} weight files: {listed(wanted, 8)}. Expected one of them. "
            f"Give {str(replace(whole, path=folder + sorted(wanted)[0]))!r}, for example."
        )
    if not wanted:
        raise _nothing(whole, names, part)
    return (replace(whole, path=folder + wanted[0]) if len(wanted) == 1 else whole,)


def beside(whole: HubFile, names: Collection[str], part: str) -> HubFile | None:
    """Return the part that a repository, or a folder of it, has at the usual place; else None."""
    folder = whole.path.lstrip("/") if whole.path.endswith("/") else ""
    for place in PARTS.get(part, ()):
        path = folder + place
        if part == "tokenizer":
            if any(f"{path}{name}" in names for name in VOCABULARIES):
                return replace(whole, path=path, kind="tokenizer")
        elif path in names or (path.endswith("/") and _has_weights(names, path)):
            return replace(whole, path=path)
    return None


def weights(names: Collection[str], folder: str) -> tuple[str | None, list[str]]:
    """Return the index and the weight files of a folder. The files are those to take where the index does not exist.

    safetensors come before other formats. A variant such as `model.fp16.safetensors` is taken where nothing else is
    there.
    """
    inside = _inside(names, folder)
    groups: dict[tuple, list[str]] = {}
    for name in inside:
        if match := STANDARD.fullmatch(name):
            stem, variant, _, suffix = match.groups()
            groups.setdefault((suffix != "safetensors", variant or "", stem), []).append(name)
        elif name.lower().endswith(WEIGHTS):
            groups.setdefault((2, not name.lower().endswith(".safetensors"), as_one_file(name)), []).append(name)
    if not groups:
        return None, []
    key = min(groups)
    files = sorted(groups[key])
    variant = key[1] if key[0] < 2 else ""
    whole = PurePosixPath(as_one_file(files[0]).replace(variant, ""))  # what the file would be called in one piece
    form = rf"{re.escape(whole.stem)}\..*{re.escape(variant)}.*\.json" if variant else re.escape(f"{whole}{INDEX}")
    index = next((name for name in sorted(inside) if re.fullmatch(form, name)), None)
    return index and folder + index, [folder + name for name in files]


def tokenizer(names: Collection[str], folder: str) -> list[str]:
    """Return the files of a tokenizer in a folder."""
    return [f"{folder}{name}" for name in TOKENIZER_FILES if f"{folder}{name}" in names]


def makes_tokenizer(names: Iterable[str]) -> bool:
    """Return whether files of these names are enough for a tokenizer."""
    names = {*names}
    return TOKENIZER_CONFIG in names and bool(names & {*VOCABULARIES})


def _inside(names: Collection[str], folder: str) -> list[str]:
    """The names of the files in a folder, without those of its folders"""
    inside = (name.removeprefix(folder) for name in names if name.startswith(folder))
    return [name for name in inside if "/" not in name]


def _has_weights(names: Collection[str], folder: str) -> bool:
    return bool(weights(names, folder)[1])


def _nothing(whole: HubFile, names: Collection[str], part: str) -> CheckpointError:
    return CheckpointError(
        f"{whole} has {listed(names, 8) or 'no files'}. Expected a {part.replace('_', ' ')}. Give {FORMS}."
    )
