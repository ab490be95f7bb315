"""Which files a path of weights means: one file, or all shards of a set."""

import json
import os
import re
from pathlib import Path

from ..errors import CheckpointError, first_line, listed
from ..machine import environment
from .filenames import INDEX, SHARD, USUAL, WEIGHTS, as_one_file


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files that a path means.

    Args:
        path: a file, one shard, a shard's index (`*.safetensors.index.json`), or a folder with one set of weights.

    Raises:
        CheckpointError: a weight file or a shard is missing, or several sets lie in the folder.
        OSError: the folder cannot be listed.
    """
    if environment.is_dir(path):
        return _of_folder(path)
    if not environment.is_file(path):
        try:
            os.stat(path)
        except PermissionError:  # the file may well be there
            raise
        except (OSError, ValueError):
            pass
        raise CheckpointError(
            f"no file {str(path)!r}. Expected a .safetensors, .pth or .gguf file, or a folder. Check the name."
        )
    if path.name.endswith(INDEX):
        return _indexed(path)
    if path.suffix == ".distcp":
        raise _distributed(path.parent)
    if not (match := SHARD.fullmatch(path.name)):
        return (path,)
    index = path.with_name(match["stem"] + match["suffix"] + INDEX)
    if environment.is_file(index) and path in (files := _indexed(index)):
        return files
    return _numbered(path.parent, match)


def weight_sets(folder: Path) -> dict[str, list[str]]:
    """Return the names of weight files and indexes in a folder, by the name that their set would have as one file.

    Of a folder that is missing or cannot be listed: an empty dictionary.
    """
    sets: dict[str, list[str]] = {}
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):  # ValueError for a name with a null byte
        return sets
    for name in names:
        if name.startswith(".") or environment.is_dir(folder / name):  # "._model.safetensors" is a note of macOS
            continue
        if name.endswith(INDEX) or name.lower().endswith(WEIGHTS):
            sets.setdefault(as_one_file(name.removesuffix(INDEX)), []).append(name)
    return sets


def names_in_index(data: bytes, name: str) -> list[str]:
    """Return the names of the shards in an index's bytes, sorted. Raises CheckpointError, which names the index."""
    try:
        return sorted({str(one) for one in json.loads(data)["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{name} is not an index of shards ({first_line(error)}). Expected JSON with a weight_map. "
            "Download it again."
        ) from error


def _of_folder(folder: Path) -> tuple[Path, ...]:
    sets = weight_sets(folder)
    if not sets:
        raise _without_weights(folder)
    one = next((name for name in USUAL if name in sets), None)
    if one is None and len(sets) > 1:
        raise CheckpointError(
            f"{str(folder)!r} holds several files of weights: {listed(sets, 6)}. Expected one set. "
            "Give the path of one file."
        )
    one = one or next(iter(sets))
    if one in sets[one]:
        return (folder / one,)
    if one + INDEX in sets[one]:
        return _indexed(folder / (one + INDEX))
    matches = [SHARD.fullmatch(name) for name in sets[one]]
    if len({match["count"] for match in matches}) > 1:
        raise CheckpointError(
            f"{str(folder)!r} holds shards of several sets: {listed(sets[one], 6)}. Expected one set. "
            "Delete the older shards."
        )
    return _numbered(folder, matches[0])


def _indexed(index: Path) -> tuple[Path, ...]:
    """All shards that an index names"""
    names = names_in_index(index.read_bytes(), repr(str(index)))
    if bad := [name for name in names if os.path.basename(name) != name or not name.endswith(WEIGHTS)]:
        raise CheckpointError(
            f"{str(index)!r} names {listed(map(repr, bad))}. Expected names of weight files beside it. "
            "Download it again."
        )
    if missing := [name for name in names if not environment.is_file(index.parent / name)]:
        raise CheckpointError(
            f"{str(index)!r} names {listed(missing)}, which is not in the folder. Expected all {len(names)} shards. "
            "Download what is missing."
        )
    return tuple(index.parent / name for name in names)


def _numbered(folder: Path, match: re.Match) -> tuple[Path, ...]:
    """All shards of a set without an index"""
    count = int(match["count"])
    names = [f"{match['stem']}-{number:05}-of-{count:05}{match['suffix']}" for number in range(1, count + 1)]
    missing = [name for name in names if not environment.is_file(folder / name)]
    if missing or match[0] not in names:
        raise CheckpointError(
            f"{match[0]} in {str(folder)!r} is one of {count} shards; missing: {listed(missing) or 'none'}. "
            "Expected all of them in one folder, numbered from 1. Download what is missing."
        )
    return tuple(folder / name for name in names)


def _without_weights(folder: Path) -> CheckpointError:
    names = sorted(os.listdir(folder))
    if any(name.endswith(".distcp") for name in names):
        return _distributed(folder)
    if inner := [name for name in names if environment.is_dir(folder / name) and weight_sets(folder / name)]:
        return CheckpointError(
            f"no weights in {str(folder)!r} itself, but in its folders {listed(inner, 6)}. Expected one of these. "
            f"Give {str(folder / inner[0])!r}, for example."
        )
    return CheckpointError(
        f"no weights in {str(folder)!r}. Expected a folder with one set of {', '.join(WEIGHTS)} files. "
        "Give the path of a file instead."
    )


def _distributed(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{str(folder)!r} is a distributed checkpoint (.distcp files). Expected one file of tensors. Convert it with "
        f"torch.distributed.checkpoint.format_utils.dcp_to_torch_save({str(folder)!r}, 'model.pt')."
    )
