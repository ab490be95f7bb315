"""What a file on the Hub is, by its head alone: shapes, names and number formats before a byte of weights comes.

huggingface_hub reads the header of a safetensors file. Of other formats a few megabytes are fetched: the head, and of a
torch file also the end. They are written into an empty file of the same size, which `recognise.read` reads like any
file. Its tensors are mapped, and nothing looks at their numbers.
"""

import os
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError
from torch import Tensor

from ..catalog import HubFile
from ..errors import CheckpointError, first_line
from . import hub, recognise
from .filenames import CONFIG, WEIGHTS
from .hub_cache import PlannedFile
from .hub_requests import read_bytes, translated
from .reading import parse_config
from .recognise import Contents

HEAD = 4 << 20  # bytes from the front of a file: a GGUF file of 1,300 tensors describes them in 0.1 MB
TAIL = 1 << 20  # bytes from the end of a torch file: its table of 1,300 tensors has 0.09 MB
PICKLE = 64 << 20  # bytes that the description of the tensors in a torch file may have
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def read(file: HubFile) -> Contents:
    """Tell what a file or folder on the Hub is, as `recognise.read` tells it of one that is here.

    The tensors have shapes and dtypes, and no numbers.

    Raises:
        CheckpointError: as `recognise.read`.
        DownloadError: the Hub does not answer.
    """
    every = hub.plan(str(file), [file]).files
    if path := hub.path_in_cache(file, every):
        return recognise.read(path)
    weights = [one for one in every if one.file.path.lower().endswith(WEIGHTS)]
    if not all(one.file.path.lower().endswith(".safetensors") for one in weights):
        return _read_heads(file, every)
    tensors, metadata = {}, {}
    for one in weights:
        found, more = _header(one)
        tensors |= found
        metadata |= more
    configs = (one for one in every if one.file.path.endswith(CONFIG))
    config = next((parse_config(read_bytes(one.file, one.commit, 0, HEAD), one.name) for one in configs), None)
    with recognise.fitting_shapes(Path(str(file))):
        return recognise.recognise(tensors, Path(str(file)), metadata, config)


def _header(file: PlannedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on no device, and its metadata"""
    try:
        with translated(file.name):
            found = HfApi().parse_safetensors_file_metadata(file.file.repo, file.file.path, revision=file.commit)
        return {
            name: torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for name, one in found.tensors.items()
        }, dict(found.metadata)
    except (SafetensorsParsingError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file.name} has no header that can be read ({first_line(error)}). Expected a safetensors file."
        ) from error


def _read_heads(file: HubFile, planned: list[PlannedFile]) -> Contents:
    """What files of other formats are, by empty files with their heads"""
    with tempfile.TemporaryDirectory(prefix="turbo_nb-", ignore_cleanup_errors=True) as folder:
        for one in planned:
            _write_head(Path(folder, PurePosixPath(one.file.path).name), one)
        shown = Path(folder) if file.path.endswith("/") else Path(folder, PurePosixPath(file.path).name)
        try:
            contents = recognise.read(shown)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(shown), str(file))) from error
        return replace(contents, path=Path(str(file)))


def _write_head(path: Path, file: PlannedFile) -> None:
    """Write a file that takes no room except for its head, and the end and the pickle of a torch file"""
    with path.open("wb") as out:
        out.truncate(file.size)
        head = read_bytes(file.file, file.commit, 0, min(HEAD, file.size)) if file.size else b""
        out.write(head)
        if not head.startswith(b"PK") or len(head) == file.size:
            return
        begin = max(len(head), file.size - TAIL)
        out.seek(begin)
        out.write(read_bytes(file.file, file.commit, begin, file.size))
        out.flush()
        with suppress(zipfile.BadZipFile, StopIteration), zipfile.ZipFile(path) as archive:
            entry = next(one for one in archive.infolist() if os.path.basename(one.filename) == "data.pkl")
            end = min(file.size, entry.header_offset + min(entry.file_size, PICKLE) + 4096)  # with the entry's header
            if end > len(head):
                begin = max(len(head), entry.header_offset)
                out.seek(begin)
                out.write(read_bytes(file.file, file.commit, begin, end))
