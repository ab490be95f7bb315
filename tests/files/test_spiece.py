"""The tokenizer in a text encoder's file: it encodes as SentencePiece does, and damaged bytes are an error."""

import io
import random

import pytest
import sentencepiece

from turbo_nb.errors import CheckpointError
from turbo_nb.files.spiece import SentencePieceTokenizer, load_spiece

WORDS = "a small green square grows on gray background while the cat sits near a red circle 猫 在 草地 上 奔跑 犬が走る"
TEXTS = [
    "", " ", "a", "a small green square growing on a gray background", "A Cat, and THE cat.", "  two   spaces  ",
    "一只猫在草地上奔跑", "猫cat 猫 cat", "emoji 🐈‍⬛ 🎬 👩🏽‍🚀!", "ﬁne ｆｕｌｌ ½ ①", "e\u0301 é",
    "tab\tand\nnewline\n", "\u3000wide\u00a0space\u200b",
    "▁▁raw▁", "x\x00y", "unknown ☃ ☃☃ snow", "مرحبا नमस्ते สวัสดี", "don't — “quote”", "1234567 3.14", "cat " * 700,
]  # fmt: skip


def trained(**options) -> bytes:
    """A SentencePiece model with umT5's special pieces, trained on a few sentences"""
    words, lines = WORDS.split(), random.Random(0)
    sentences = [" ".join(lines.choices(words, k=9)) + lines.choice(".!?,") for _ in range(400)]
    given = {"vocab_size": 150, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "hard_vocab_limit": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, **(given | options)
    )
    return model.getvalue()


def tokenizer_of(data: bytes, extra_ids: int = 0) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(load_spiece(data, "it"), extra_ids)


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"byte_fallback": True, "vocab_size": 420}, {"unk_id": 2, "bos_id": -1}, {"pad_id": -1, "unk_id": 0},
        {"normalization_rule_name": "identity"}, {"normalization_rule_name": "nfkc_cf"},
        {"normalization_rule_name": "nfkc"}, {"normalization_rule_name": "nmt_nfkc_cf"},
        {"add_dummy_prefix": False}, {"remove_extra_whitespaces": False}, {"split_by_whitespace": False},
        {"user_defined_symbols": ["<video>", "cat."]},
        {"model_type": "bpe"}, {"model_type": "char"}, {"treat_whitespace_as_suffix": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "umT5",
)  # fmt: skip
def test_ids_are_those_of_sentencepiece_and_eos(options):
    data = trained(**options)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), tokenizer_of(data)
    assert len(theirs) == len(ours)
    for text in [*TEXTS, "a <video>cat.cat <video>"]:
        assert ours(text).input_ids == [*theirs.encode(text), theirs.eos_id()], text


def test_words_are_padded_and_cut_as_diffusers_asks(model):
    tokenizer = tokenizer_of(model)
    both = tokenizer(["a cat", "cat " * 100], padding="max_length", max_length=16, truncation=True)
    assert [len(ids) for ids in both.input_ids] == [16, 16]
    assert both.input_ids[0][-1] == 0 and both.attention_mask[0][-1] == 0
    assert both.input_ids[1][-1] == 1 and all(both.attention_mask[1])
    assert tokenizer.decode(tokenizer("the cat.").input_ids, skip_special_tokens=True) == "the cat."


def test_extra_words_follow_the_pieces_the_last_one_first(model):
    tokenizer = tokenizer_of(model, extra_ids=300)
    count = len(load_spiece(model, "it"))
    assert len(tokenizer) == count + 300
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_299>"]) == [count + 299, count]
    assert tokenizer("<extra_id_0>").input_ids == [count + 299, 1]


def field(number: int, data: bytes) -> bytes:
    """A field of a protocol buffer"""
    size, length = len(data), []
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + data


def written(words: list[str]) -> bytes:
    """A SentencePiece model of some words after pad, eos and unk"""
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((word, 1) for word in words)]
    records = (field(1, word.encode()) + b"\x15" + bytes(4) + bytes([0x18, kind]) for word, kind in pieces)
    return b"".join(field(1, record) for record in records)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"<html>" * 9, bytes(1000), b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x10\x03", b"\x08\x01", b"\xff" * 20,
        written(["a" * 10**6]), written(["a", "a"]), written([""]),
    ],
    ids=["empty", "page", "zeros", "cut", "no piece", "number", "ones", "endless piece", "twice", "no word"],
)  # fmt: skip
def test_other_bytes_are_an_error(data):
    with pytest.raises(CheckpointError, match=r"it is not a SentencePiece model .*Expected umT5.*tokenizer_path"):
        tokenizer_of(data)


def test_a_model_without_an_end_is_an_error():
    with pytest.raises(CheckpointError, match="Expected umT5's tokenizer"):
        tokenizer_of(trained(eos_id=-1))


def test_damaged_bytes_are_an_error_or_a_tokenizer(model):
    """Never a crash of the process, which sentencepiece before 0.2.2 allowed."""
    choose, refused = random.Random(0), 0
    start = model.rindex(b"nmt_nfkc")  # the rules that normalise characters follow
    for turn in range(300):
        data = bytearray(model)
        for _ in range(choose.choice([1, 3, 300])):
            place = choose.randrange(start, len(data)) if turn % 2 else choose.randrange(len(data))
            data[place] = choose.choice([0, 255, data[place] ^ (1 << choose.randrange(8))])
        data = bytes(data[: choose.randrange(len(data))] if turn % 10 == 0 else data)
        try:
            tokenizer = tokenizer_of(data)
        except CheckpointError:
            refused += 1
            continue
        for text in TEXTS:
            assert all(0 <= index < len(tokenizer) for index in tokenizer(text).input_ids)
    assert 30 < refused < 300


def test_a_vocabulary_of_umt5s_size_is_read():
    assert len(load_spiece(written([f"w{i}" for i in range(255_997)]), "it")) == 256_000


def test_a_tokenizer_is_saved_as_the_model_it_was_made_from(model, tmp_path):
    tokenizer_of(model, extra_ids=5).save_pretrained(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == model
