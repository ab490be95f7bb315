"""Bytes on disk become raw tensors: safetensors, torch's zip files, GGUF, shards and folders.

`read_raw` knows formats of files and does not know names of tensors. It never runs code from a file, because pickles
load with `weights_only`. It refuses a damaged file before anything is allocated. Tensors are mapped, not copied.
"""

import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, first_line, listed, warn
from ..machine import environment
from ..values import local
from .filenames import CONFIG
from .gguf_file import MAGIC as GGUF
from .gguf_file import GGUFTensor, read_gguf
from .weight_set import weight_files, weight_sets

WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", re.IGNORECASE)
MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
MAX_DEPTH = 16  # dictionaries in one another
MAX_TENSORS = 20_000  # of a file. The largest checkpoints of Wan have a few thousand, and each name takes time
MAX_NAMES = 4_000_000  # characters of all names of a file


@dataclass(frozen=True, kw_only=True)
class RawContents:
    """What a path holds, by the names that its files have.

    Attributes:
        tensors: by name. Nested dictionaries of a torch file are joined with dots: "generator.blocks.0.…".
        metadata: safetensors' `__metadata__`, or the single values of GGUF's header.
        config: config.json beside the weights, whoever wrote it. None without one.
        files: the files that were read.
    """

    tensors: dict[str, Tensor | GGUFTensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    files: tuple[Path, ...]


def read_raw(path: str | Path) -> RawContents:
    """Read a file, all shards of a set, or a folder with one set of weights.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.bin`, `.ckpt` or `.gguf` file, one shard, an index or a folder.

    Raises:
        CheckpointError: the file is missing, damaged, holds something other than tensors, or would run code.
    """
    path = Path(local(path))
    tensors: dict[str, Tensor | GGUFTensor] = {}
    metadata: dict[str, str] = {}
    try:
        files = weight_files(path)
        if others := set(weight_sets(path).get(files[0].name, ())) - {files[0].name}:  # shards of an older save
            warn(f"{str(files[0])!r} is taken; left out: {listed(others)}, which lie beside it", stacklevel=2)
        for file in files:
            found, more = _read_file(file)
            if not found:
                raise CheckpointError(f"{str(file)!r} has no tensors. Expected weights. Download it again.")
            if twice := tensors.keys() & found.keys():
                raise CheckpointError(
                    f"{str(file)!r} has {listed(twice)}, which another shard of its set has, too. "
                    "Expected each tensor once. Download the shards again."
                )
            tensors |= found
            metadata |= more
        config = _config_of(path, files)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({first_line(error)}). Expected a .safetensors, .pth or .gguf file, or a "
            "folder. Check the name and its permissions."
        ) from error
    return RawContents(tensors=tensors, metadata=metadata, config=config, files=files)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return config.json of a folder, None without one.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    path = folder / CONFIG
    if not environment.exists(path):
        return None
    try:
        return parse_config(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({first_line(error)}). Expected a JSON object. Check its permissions."
        ) from error


def parse_config(data: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in the bytes of a config.json. Raises CheckpointError, which calls them `name`."""
    try:
        config = json.loads(data)
        if not isinstance(config, dict):
            raise ValueError(f"it holds {type(config).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name} cannot be read ({first_line(error)}). Expected a JSON object. Download it again."
        ) from error
    return config


def trusted_config(folder: Path, classes: Collection[str]) -> dict[str, Any] | None:
    """Return config.json of a folder if one of these classes wrote it, because others give its keys other meanings.

    Args:
        folder: of the weights.
        classes: accepted values of `_class_name` (diffusers), or without it of `model_type` (transformers).

    Raises:
        CheckpointError: config.json is damaged.
    """
    config = read_config(folder)
    return config if config and config.get("_class_name", config.get("model_type")) in classes else None


def _config_of(path: Path, files: tuple[Path, ...]) -> dict[str, Any] | None:
    """config.json beside the weights, but only if they are its folder's one set: others may share the folder"""
    if environment.is_dir(path):
        return read_config(path)
    try:
        return read_config(path.parent) if weight_files(path.parent) == files else None
    except (CheckpointError, OSError):
        return None


def _read_file(path: Path) -> tuple[dict[str, Tensor | GGUFTensor], dict[str, str]]:
    """Return the tensors and the metadata of one file"""
    with path.open("rb") as file:
        head, size = file.read(512), os.fstat(file.fileno()).st_size
    name = repr(str(path))
    if re.search("[\\ud800-\\udfff]", str(path)):  # what Python makes of bytes that are not UTF-8
        raise CheckpointError(
            f"{name} is a path that is not UTF-8. Expected UTF-8, because torch and safetensors open no other paths. "
            "Rename the file or its folder."
        )
    header = int.from_bytes(head[:8], "little")
    try:
        # first, because a header's length can spell the beginning of any other format
        if head[8:9] == b"{" and header <= size - 8:
            return _read_safetensors(path, header)
        if head.startswith(b"PK\x03\x04"):
            return _read_torch(path), {}
        if head.startswith(GGUF):
            return read_gguf(path)
        if head[8:9] == b"{" and path.suffix.lower() == ".safetensors":
            raise ValueError(f"{size} bytes, with a header of {header}")
    except (CheckpointError, OSError):
        raise
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{name} holds {held[1] if held else 'more than tensors'}, and loading it could run code: refused. "
            "Expected tensors only. Take a safetensors file, or save the tensors alone where the file was made."
        ) from error
    except Exception as error:  # because torch's unpickler raises any kind of error on damaged bytes
        raise CheckpointError(
            f"{name} is damaged or cut short ({first_line(error)}). Expected a whole file. Download it again."
        ) from error
    raise _not_weights(name, head)


def _not_weights(name: str, head: bytes) -> CheckpointError:
    if not head:
        return CheckpointError(f"{name} is empty. Expected a weight file. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{name} is a Git LFS pointer. Expected the weights. Fetch the file that it points to.")
    if WEB_PAGE.match(head):
        return CheckpointError(f"{name} is a web page. Expected weights. Download the file again.")
    fix = "Check what it is."
    if head.startswith(b"\x80"):  # pickle's first byte
        fix = "Convert an old torch file with torch.save(torch.load(path, weights_only=True), new_path)."
    return CheckpointError(
        f"{name} is neither a torch file (zip format) nor safetensors nor GGUF. Expected one of these. {fix}"
    )


def _read_safetensors(path: Path, header: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    if header > MAX_HEADER:
        raise ValueError(f"a header of {header} bytes")
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(header)
    _require_few(text.count(b'"data_offsets"'), repr(str(path)))  # before the header is parsed
    _require_short(json.loads(text, object_pairs_hook=_without_duplicates), repr(str(path)))
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _require_few(count: int, name: str) -> None:
    if count > MAX_TENSORS:
        raise CheckpointError(f"{name} has {count:,} tensors. Expected at most {MAX_TENSORS:,}. Take another file.")


def _require_short(names: Iterable[str], name: str) -> None:
    if (length := sum(map(len, names))) > MAX_NAMES:
        raise CheckpointError(
            f"{name} has tensor names of {length:,} characters in all. Expected at most {MAX_NAMES:,}. "
            "Take another file."
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # safetensors takes the last one
        raise ValueError("a key is there twice")
    return found


def _read_torch(path: Path) -> dict[str, Tensor]:
    name = repr(str(path))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        _require_few(len(names), name)
        if not any(one.endswith("data.pkl") for one in names):
            raise CheckpointError(
                f"{name} is a zip archive of {listed(names)}. Expected a torch file. Unzip it and give what is inside."
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(f"{name} has compressed entries: refused. Expected stored entries, as torch writes.")
        stored = Counter(entry.file_size for entry in archive.infolist())
    with path.open("rb") as file:  # torch takes a path that ends so for a safetensors file, and maps paths only
        source = file if path.suffix == ".safetensors" else path
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=source is path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{name} holds {type(state).__name__}. Expected a state dict: tensors by their names.")
    tensors = _flatten(state, name)
    _require_few(len(tensors), name)
    _require_short(tensors, name)
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            got = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise CheckpointError(f"{key} in {name} is {got}: refused. Expected a plain tensor. Take another file.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{key} in {name} claims more bytes than the file holds: refused. Expected a plain tensor. "
                "Take another file."
            )
    # because torch maps what follows a storage that the archive has in part
    claimed = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if Counter(size for size in claimed.values() if size) - stored:
        raise ValueError("a tensor is longer than its entry")
    return tensors


def _flatten(state: dict, name: str) -> dict[str, Tensor]:
    """Join the names of nested dictionaries with dots. What lies under a key that is not text is left out."""
    tensors: dict[str, Tensor] = {}
    waiting: list[tuple[str, dict, int]] = [("", state, 1)]
    seen = {id(state)}  # a dictionary can hold itself
    while waiting:
        prefix, level, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{name} nests dictionaries more than {MAX_DEPTH} deep. Expected a state dict. Take another file."
            )
        for key, value in level.items():
            if not isinstance(key, str):
                continue
            if isinstance(value, Tensor):
                if tensors.setdefault(prefix + key, value) is not value:
                    raise CheckpointError(
                        f"{name} has two tensors with the name {prefix + key}. Expected each once. Take another file."
                    )
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{key}.", value, depth + 1))
    if tensors:
        return {key: tensor.detach() for key, tensor in tensors.items()}
    if key := next((repr(key) for key, value in state.items() if isinstance(value, Tensor)), None):
        raise CheckpointError(
            f"{name} has the key {key} for a tensor. Expected a state dict with text keys. Take another file."
        )
    raise CheckpointError(
        f"{name} holds dict with {listed(map(str, state)) or 'nothing'}. Expected a state dict: tensors by their names."
    )
