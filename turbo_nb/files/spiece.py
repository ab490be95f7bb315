"""SentencePiece models: the tokenizer that ComfyUI stores in a text encoder's file, or a file `spiece.model`.

The package sentencepiece reads a model and encodes with it. It checks a model before use since version 0.2.2, so
damaged bytes are an error and not a crash of the process.
"""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from ..errors import CheckpointError, first_line
from .filenames import SPIECE


def load_spiece(data: bytes, name: str) -> SentencePieceProcessor:
    """Load a SentencePiece model. Its length is the number of its pieces.

    Args:
        data: the bytes.
        name: of the bytes, for errors.

    Raises:
        CheckpointError: the bytes are damaged, or a model without a piece for unknown words or for the end of a text.
    """
    try:
        if not data:  # because sentencepiece takes it for a model without pieces
            raise ValueError("it is empty")
        model = SentencePieceProcessor(model_proto=data)
        ids = model.unk_id(), model.eos_id()
        if not all(0 <= one < len(model) for one in ids):
            raise ValueError(f"unk is {ids[0]} and eos {ids[1]}, of {len(model)} pieces")
        return model
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{name} is not a SentencePiece model that can be read ({first_line(error)}). Expected umT5's tokenizer. "
            "Give --tokenizer_path a folder with a tokenizer, for example that of google/umt5-xxl."
        ) from error


class SentencePieceTokenizer(PreTrainedTokenizer):
    """transformers' tokenizer around a SentencePiece model. It ends a text with the piece eos.

    Args:
        model: from `load_spiece`.
        extra_ids: how many words `<extra_id_0>`, … follow the pieces, the last word first, as in seqio.
    """

    vocab_files_names = {"vocab_file": SPIECE}  # noqa: RUF012 because transformers reads it from the class
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, model: SentencePieceProcessor, extra_ids: int = 0):
        self._model = model
        ids = {"unk_token": model.unk_id(), "eos_token": model.eos_id(), "pad_token": max(model.pad_id(), 0)}
        super().__init__(
            special_tokens_pattern="eos",
            extra_ids=extra_ids,  # kept in tokenizer_config.json, as by T5Tokenizer
            **{name: model.id_to_piece(one) for name, one in ids.items()},
        )
        self.add_tokens([f"<extra_id_{index}>" for index in reversed(range(extra_ids))], special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The number of pieces, without extra words."""
        return len(self._model)

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all pieces and extra words."""
        pieces = self._model.id_to_piece(list(range(self.vocab_size)))
        return dict(zip(pieces, range(self.vocab_size), strict=True)) | self.added_tokens_encoder

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of some pieces."""
        return self._model.decode_pieces(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the model into a folder."""
        path = Path(save_directory, f"{filename_prefix}-{SPIECE}" if filename_prefix else SPIECE)
        path.write_bytes(self._model.serialized_model_proto())
        return (str(path),)

    def _tokenize(self, text: str, **options) -> list[str]:
        # by ids, because the pieces that sentencepiece returns for unknown words are the words themselves
        return self._model.id_to_piece(self._model.encode(text))

    def _convert_token_to_id(self, token: str) -> int:
        return self._model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._model.id_to_piece(index)
