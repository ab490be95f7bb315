"""Which tokenizer a model gets, and that it fits the text encoder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import turbo_nb
from turbo_nb import catalog, layerwise
from turbo_nb.checkpoint import load_text_encoder, load_tokenizer
from turbo_nb.errors import CheckpointError
from turbo_nb.files import recognise, resolve, vocabulary
from turbo_nb.settings import LoadOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "files"))
from test_spiece import trained

NANO = catalog.NANO.folder
PROMPT = "a small green square"


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


def encoder_file(path, spiece, rows=384):
    """nano's text encoder as ComfyUI would write it: fp16 and fp8 tensors, and a SentencePiece model"""
    state = load_file(NANO / "text_encoder" / "model.safetensors")
    file = {name: tensor.half() for name, tensor in state.items()}
    file["shared.weight"] = file["shared.weight"][:rows].contiguous()
    for name in filter(layerwise.LINEAR.search, state):
        scale = state[name].float().abs().max() / 448
        file[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
        file[name.removesuffix("weight") + "scale_weight"] = scale
    if spiece is not None:
        file["spiece_model"] = spiece if isinstance(spiece, torch.Tensor) else torch.tensor(list(spiece)).byte()
    save_file(file, path)
    return path


@pytest.fixture(scope="module")
def umt5(model, tmp_path_factory):
    return encoder_file(tmp_path_factory.mktemp("umt5") / "umt5_fp8_scaled.safetensors", model)


def ids_of(model, text):
    return [*sentencepiece.SentencePieceProcessor(model_proto=model).encode(text), 1]


def resolved(**options):
    return resolve.resolve(LoadOptions(device="cpu", **options))


def test_a_clip_is_made_with_the_encoder_and_the_tokenizer_of_one_file(umt5, model, monkeypatch, tmp_path):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
    pipe = turbo_nb.load_pipeline("nano", device="cpu", text_encoder=umt5, on_plan=lambda plan: None)
    ids = ids_of(model, PROMPT)
    assert pipe.tokenizer(PROMPT).input_ids == ids
    padded = torch.tensor([[*ids, *[0] * (512 - len(ids))]])
    with torch.no_grad():
        expected = load_text_encoder(umt5, layerwise=False)(padded, (padded > 0).long())[0][:, : len(ids)]
    embedding = pipe.turbo_nb.prompt_encoder(PROMPT)
    assert embedding.dtype is torch.float32 and not embedding[:, len(ids) :].any()
    torch.testing.assert_close(embedding[:, : len(ids)], expected, rtol=1e-4, atol=1e-5)
    assert turbo_nb.generate(pipe, PROMPT, num_frames=5, num_steps=1).frames.shape[0] == 5


def test_a_tokenizer_in_the_text_encoders_file_is_not_downloaded(umt5):
    def repos(**options):
        return {file.repo for file in resolved(model="TurboWan2.1-T2V-1.3B-480P", **options).downloads}

    assert catalog.TOKENIZER.repo in repos()
    assert catalog.TOKENIZER.repo not in repos(text_encoder=umt5)


def test_a_tokenizer_that_is_given_or_lies_beside_the_files_comes_first(umt5, tmp_path):
    own = NANO / "tokenizer"
    assert resolved(model="nano", text_encoder=umt5).tokenizer.path == umt5
    assert resolved(model="nano", text_encoder=umt5, tokenizer=own).tokenizer == own
    folder = shutil.copytree(NANO, tmp_path / "model")
    assert resolved(model=folder, text_encoder=umt5).tokenizer == folder / "tokenizer"
    shutil.rmtree(folder / "tokenizer")
    assert resolved(model=folder, text_encoder=umt5).tokenizer.path == umt5


@pytest.mark.parametrize("where", ["folder", "folder with extra words", "file", "text encoder"])
def test_a_sentencepiece_model_is_a_tokenizer_wherever_it_is(model, umt5, tmp_path, where):
    (tmp_path / "spiece.model").write_bytes(model)
    if where == "folder with extra words":
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 200}')
    path = {"file": tmp_path / "spiece.model", "text encoder": umt5}.get(where, tmp_path)
    found = resolved(model="nano", tokenizer=path)
    tokenizer = load_tokenizer(found.tokenizer)
    assert tokenizer(PROMPT).input_ids == load_tokenizer(path)(PROMPT).input_ids == ids_of(model, PROMPT)
    pieces = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    words = {"folder with extra words": pieces + 200, "text encoder": pieces + 300}
    assert len(tokenizer) == words.get(where, pieces)


def damaged(kind, model):
    return {
        "cut": model[:-40], "page": b"<html>", "empty": b"", "floats": torch.ones(9),
        "matrix": torch.zeros(3, 3, dtype=torch.uint8), "integers": torch.tensor(list(model)),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["cut", "page", "empty", "floats", "matrix", "integers"])
def test_a_damaged_tokenizer_is_an_error_that_names_the_file(model, tmp_path, kind):
    path = encoder_file(tmp_path / "umt5.safetensors", damaged(kind, model))
    with pytest.raises(CheckpointError, match=r"spiece_model in .*umt5.safetensors.*tokenizer_path"):
        load_tokenizer(resolved(model="nano", text_encoder=path).tokenizer)
    load_text_encoder(path)  # which needs no tokenizer


@pytest.mark.parametrize("where", ["text encoder", "file", "folder", "tokenizer.json", "added words"])
def test_more_words_than_embeddings_are_an_error_before_loading(model, tmp_path, where):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model)
    few = encoder_file(tmp_path / "umt5.safetensors", model, rows=50)
    if where == "tokenizer.json":
        (folder / "spiece.model").unlink()
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [[str(i), 0.0] for i in range(60)]}}))
    elif where == "added words":
        (folder / "spiece.model").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"50": {}}}))
    given = {"text encoder": few, "file": folder / "spiece.model"}.get(where, folder)
    with pytest.raises(CheckpointError, match=r"with \d+ words. Expected at most 50, the embeddings in"):
        resolved(model="nano", text_encoder=few, tokenizer=given)


def test_the_size_of_a_tokenizer_is_that_of_the_loaded_one(model, umt5, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model)
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    for path in (NANO / "tokenizer", tmp_path, tmp_path / "saved"):
        assert vocabulary.size(path) == len(load_tokenizer(path))


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"model": {}}', '{"model": {"vocab": 3}}', '{"added_tokens": [{}]}', '{"added_tokens": 1}']
)
def test_a_damaged_tokenizer_json_is_an_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_tokenizer(resolved(model="nano", tokenizer=tmp_path).tokenizer)


@pytest.mark.parametrize("path", [NANO / "vae", NANO / "nope", NANO / "text_encoder" / "model.safetensors"])
def test_a_path_without_a_tokenizer_is_an_error(path):
    with pytest.raises(CheckpointError, match="Expected a folder with"):
        resolved(model="nano", tokenizer=path)


def test_a_plan_counts_the_bytes_that_stay_in_8_bits(umt5, tmp_path):
    sizes = resolved(model="nano", text_encoder=umt5).sizes
    model = load_text_encoder(umt5)
    assert sizes.text_encoder == sum(parameter.nbytes for parameter in model.parameters())
    assert sizes.text_encoder < 0.35 * resolved(model="nano").sizes.text_encoder
    assert recognise.read(umt5).kind == "text encoder"
