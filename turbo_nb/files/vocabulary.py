"""Tokenizers: where they lie, how many words they have, and those that are SentencePiece models.

ComfyUI stores umT5's tokenizer, a SentencePiece model, among the tensors of its text encoder.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, first_line
from ..machine import environment, recall
from .filenames import CONFIG, SPIECE, TOKENIZER_CONFIG, VOCABULARIES
from .recognise import Contents, read

if TYPE_CHECKING:  # else in functions, because it imports transformers, which takes 0.5 s
    from .spiece import SentencePieceProcessor, SentencePieceTokenizer

TENSOR = "spiece_model"  # the name of ComfyUI's tensor
READ = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")  # what tells the size of a folder
FILES = (*VOCABULARIES, TOKENIZER_CONFIG)  # one of them makes a folder a tokenizer's
EXTRA_IDS = 300  # words <extra_id_0>, … of umT5, which follow the pieces


def from_text_encoder(contents: Contents) -> "SentencePieceTokenizer":
    """Load the tokenizer in a text encoder's file.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
    """
    from .spiece import SentencePieceTokenizer

    model = _model(contents)
    return SentencePieceTokenizer(model, max(0, min(EXTRA_IDS, _rows(contents) - len(model))))


def from_spiece(path: Path) -> "SentencePieceTokenizer":
    """Load a SentencePiece model. Raises CheckpointError for a damaged one."""
    from .spiece import SentencePieceTokenizer

    model = _model(path)
    return SentencePieceTokenizer(model, max(0, (size(path.parent) or 0) - len(model)))


def spiece_file(path: Path) -> Path | None:
    """Return the SentencePiece model that `path` is, or that a folder without tokenizer.json has; else None."""
    if environment.is_file(path):
        return path
    found = path / SPIECE
    return found if environment.is_file(found) and not environment.is_file(path / "tokenizer.json") else None


def has_tokenizer(contents: object) -> bool:
    """Return whether this is a text encoder that has its tokenizer in its file."""
    return isinstance(contents, Contents) and TENSOR in contents.tensors


def find(path: Path) -> Path | Contents:
    """Return the tokenizer at a path: a folder, a SentencePiece model, or a text encoder that has one in its file.

    Raises:
        CheckpointError: the path holds something else.
    """
    if any(environment.is_file(path / name) for name in FILES):
        return path
    if environment.is_file(path):
        if path.suffix == ".model":
            return path
        if has_tokenizer(contents := read(path)):
            return contents
    raise CheckpointError(
        f"tokenizer is {str(path)!r}. Expected a folder with {' or '.join(FILES)}, such as that of google/umt5-xxl, a "
        f"file {SPIECE}, or a text encoder with {TENSOR}."
    )


def size(tokenizer: Path | Contents) -> int | None:
    """Return the rows that an embedding needs for a tokenizer, which is its largest id plus 1. Loads no tokenizer.

    Args:
        tokenizer: a folder, a SentencePiece model, or a text encoder that has its tokenizer in its file.

    Returns:
        The number. None where the files do not tell it.

    Raises:
        CheckpointError: a file is damaged.
    """
    if isinstance(tokenizer, Contents):
        return len(_model(tokenizer))
    # parsing umT5's files takes 0.5 to 1.5 s at every start
    names = [tokenizer] if environment.is_file(tokenizer) else [tokenizer / name for name in (*READ, SPIECE)]
    files = {"files": [recall.stamp(name) for name in names]}
    known = recall.recall("tokenizer", files)
    if type(known) is int and known > 0:
        return known
    if found := _found_size(tokenizer):
        recall.remember("tokenizer", files, found)
    return found


def _found_size(tokenizer: Path) -> int | None:
    if environment.is_file(tokenizer):
        return len(_model(tokenizer))
    try:
        return _size(tokenizer)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer in {str(tokenizer)!r} cannot be read ({first_line(error)}). Expected the files of one "
            "tokenizer. Download the folder again."
        ) from error


def _size(folder: Path) -> int | None:
    whole, config, added = (_json(folder / name) for name in READ)
    ids = [one["id"] for one in whole.get("added_tokens") or ()]
    ids += [*added.values(), *map(int, config.get("added_tokens_decoder") or ())]
    counts = [0, *(1 + number for number in ids)]
    if whole:
        counts.append(len(whole["model"]["vocab"]))
    elif environment.is_file(folder / SPIECE):
        counts.append(len(_model(folder / SPIECE)) + int(config.get("extra_ids") or 0))
    return max(counts) or None


def require_fit(tokenizer: object, text_encoder: object) -> None:
    """Check that the embedding of a text encoder has a row for each word of a tokenizer.

    Args:
        tokenizer: as in `size`. Anything else, such as a file that is not here yet, passes.
        text_encoder: its contents. Anything else passes.

    Raises:
        CheckpointError: it has too few rows.
    """
    if not isinstance(tokenizer, Path | Contents) or not isinstance(text_encoder, Contents):
        return
    words, rows = size(tokenizer) or 0, _rows(text_encoder)
    if words > rows:
        name = _name(tokenizer) if isinstance(tokenizer, Contents) else repr(str(tokenizer))
        raise CheckpointError(
            f"tokenizer is {name} with {words:,} words. Expected at most {rows:,}, the embeddings in "
            f"{str(text_encoder.path)!r}. Give the tokenizer of this text encoder, or another text encoder."
        )


def composite(folder: Path) -> str | None:
    """Return the class of a tokenizer that loads other tokenizers, such as RagTokenizer; None for an ordinary one.

    transformers asks on stdin whether the code of those others may run, whatever the first one was loaded with.

    Raises:
        AttributeError, ValueError: a file is damaged.
    """
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    own, config = _json(folder / TOKENIZER_CONFIG), _json(folder / CONFIG)
    names = [own.get("tokenizer_class"), config.get("tokenizer_class")]
    names += [
        TOKENIZER_MAPPING_NAMES.get(str(one))
        for one in (config.get("model_type"), dict(config.get("encoder") or {}).get("model_type"))
    ]
    for name in {str(name).removesuffix("Fast") for name in names}:
        kind = getattr(transformers, name, None) if name.endswith("Tokenizer") else None
        if isinstance(kind, type) and not issubclass(kind, transformers.PreTrainedTokenizerBase):
            return name
    return None


def _rows(text_encoder: Contents) -> int:
    tensors = text_encoder.tensors
    table = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    return table.shape[0] if table is not None and table.ndim else 0


def _name(contents: Contents) -> str:
    return f"{TENSOR} in {str(contents.path)!r}"


def _embedded(contents: Contents) -> bytes:
    """Raises CheckpointError for a file without a SentencePiece model."""
    tensor = contents.tensors.get(TENSOR)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype is not torch.uint8 or tensor.ndim != 1:
        got = "missing" if tensor is None else f"not a row of bytes, but of shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"{_name(contents)} is {got}. Expected the bytes of a SentencePiece model. "
            "Give --tokenizer_path a folder with a tokenizer, for example that of google/umt5-xxl."
        )
    return tensor.numpy().tobytes()


def _model(tokenizer: Path | Contents) -> "SentencePieceProcessor":
    """The SentencePiece model in a file of its own, or in a text encoder's file"""
    from .spiece import load_spiece

    if isinstance(tokenizer, Contents):
        return load_spiece(_embedded(tokenizer), _name(tokenizer))
    return load_spiece(_bytes(tokenizer), repr(str(tokenizer)))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({first_line(error)}). Expected a SentencePiece model. Check the file."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if environment.is_file(path) else {}
