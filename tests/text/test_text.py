"""Embeddings of prompts on disk: found again to the bit, whatever happened to the files meanwhile."""

import os
import re
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import turbo_nb
from turbo_nb import errors
from turbo_nb.machine import atomic, environment
from turbo_nb.text import embedding_cache

PROMPT = "a small green square growing on a gray background"
SHORT_PROMPT = "a large red circle"
SHORT = {"num_frames": 5, "num_steps": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def load(**more):
    return turbo_nb.load_pipeline("nano", device="cpu", on_plan=lambda chosen: None, **more)


@pytest.fixture
def loads(monkeypatch):
    """Where text encoders were loaded to"""
    from turbo_nb import checkpoint

    told, real = [], checkpoint.load_text_encoder
    monkeypatch.setattr(checkpoint, "load_text_encoder", lambda *a, **k: told.append(k["device"]) or real(*a, **k))
    return told


@pytest.mark.parametrize("memory_plan", ["resident", "free-text"])
def test_prompts_that_are_known_need_no_encoder(folder, loads, memory_plan):
    first = load(memory_plan=memory_plan)
    frames = turbo_nb.generate(first, PROMPT, **SHORT).frames
    assert loads == ["cpu"]
    again = load(memory_plan=memory_plan, prompts=[PROMPT])
    assert torch.equal(again.turbo_nb.prompt_encoder(PROMPT), first.turbo_nb.prompt_encoder(PROMPT))
    assert np.array_equal(turbo_nb.generate(again, f"  {PROMPT}\n", **SHORT).frames, frames)  # cleaned, it is the same
    assert loads == ["cpu"] and again.text_encoder is None
    turbo_nb.generate(again, "a large red circle", **SHORT)  # another one after all
    assert loads == ["cpu", "cpu"] and (again.text_encoder is not None) == (memory_plan == "resident")


def test_without_word_of_the_prompts_a_resident_encoder_is_there(folder, loads):
    load().turbo_nb.prompt_encoder(PROMPT)
    assert load().text_encoder is not None
    assert load(prompts=[PROMPT, "a large red circle"]).text_encoder is not None  # one of them is new


@pytest.mark.parametrize(
    ("prompts", "pin"), [([PROMPT], False), ([PROMPT] * 2, False), ([PROMPT, SHORT_PROMPT], True), ([], True)]
)
def test_an_encoder_in_main_memory_is_streamed_and_stays_there(folder, loads, prompts, pin):
    pipeline = load(prompts=prompts)
    expected, calls = load().turbo_nb.prompt_encoder(PROMPT), []
    if len(prompts) == 2:  # the first one is on disk now
        assert load(prompts=[PROMPT, SHORT_PROMPT]).turbo_nb.prompt_encoder._is_single

    class Streamed:
        def __init__(self, module, device, pin):
            self.module = module
            calls.append((device, pin))

        def release(self):
            calls.append("released")

    encoder = pipeline.turbo_nb.prompt_encoder
    encoder._stream, encoder._cache = Streamed, None
    encoder.place("cpu", "cuda:1")
    del loads[:]
    encode = type(pipeline).encode_prompt
    pipeline.encode_prompt = lambda *args, device, **more: encode(pipeline, *args, device="cpu", **more)
    for prompt in (PROMPT, SHORT_PROMPT):
        found = encoder(prompt)
        assert pipeline.text_encoder is None
    assert torch.equal(encoder(PROMPT), expected) and not torch.equal(found, expected)
    assert loads == ["cpu"] and calls == [("cuda:1", pin), "released", "released"]
    encoder.place("freed", "cpu")
    assert encoder._streamed is None


def test_words_after_the_512_tokens_are_named_also_for_a_known_prompt(folder, monkeypatch):
    long = "a red circle " * 300 + "and LASTLY a violet triangle"
    encoder = load().turbo_nb.prompt_encoder
    tokenizer = encoder._pipeline.tokenizer
    decode, decoded = tokenizer.decode, []  # ByT5's takes minutes for the words of a megabyte
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **more: decoded.append(len(ids)) or decode(ids, **more))
    for _ in range(2):
        with errors.collect_warnings() as said:
            encoder(long)
        assert len(said) == 1
        count = len(tokenizer(long).input_ids)
        assert f"has {count} tokens, and the text encoder reads 512" in said[0] and count > 512
        lost = int(said[0].partition("the last ")[2].split()[0])
        assert abs(len(tokenizer(long[:-lost]).input_ids) - 512) < 3
        assert long[-lost:].strip().startswith(said[0].partition("begin with '")[2][:40].strip())
    assert decoded == [511, 511]
    with errors.collect_warnings() as said:
        encoder("é" * 255)  # nano's tokenizer has a token for each byte, and one for the end
    assert not said and len(tokenizer("é" * 255).input_ids) == 511


def test_a_file_has_the_prompts_own_tokens_and_not_its_words(folder):
    embedding = load().turbo_nb.prompt_encoder(PROMPT)
    (file,) = folder.iterdir()
    (rows,) = load_file(file).values()
    assert rows.shape[0] == int(embedding[0].any(1).sum()) < 60 and rows.dtype == embedding.dtype
    assert torch.equal(rows, embedding[0, : len(rows)]) and b"square" not in file.read_bytes()


@pytest.mark.parametrize(
    "change", [{"encoder": "other"}, {"dtype": torch.bfloat16}, {"prompt": "a red circle"}], ids=lambda c: next(iter(c))
)
def test_another_encoder_dtype_or_prompt_is_another_file(tmp_path, change):
    embedding = torch.zeros(1, 512, 8)
    embedding[0, :3] = 1
    kept = {"encoder": "one", "dtype": torch.float32, "prompt": PROMPT}

    def cache(encoder, dtype, prompt):
        return embedding_cache.EmbeddingCache(tmp_path, encoder, dtype), prompt

    one, prompt = cache(**kept)
    one.put(prompt, embedding)
    other, prompt = cache(**kept | change)
    assert other.get(prompt) is None and torch.equal(one.get(PROMPT), embedding)


@pytest.mark.parametrize("damage", ["cut", "page", "bit", "metadata", "turned", "shape", "nan", "dtype", "pipe"])
def test_a_damaged_file_is_made_again_with_a_warning(folder, loads, damage):
    expected = load().turbo_nb.prompt_encoder(PROMPT)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-7])
    elif damage == "page":
        file.write_text("<html>")
    elif damage == "bit":  # of an exponent: finite, and another clip
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x02]))
    elif damage == "metadata":  # safetensors itself accepts null
        size = 8 + int.from_bytes(whole[:8], "little")
        header = re.sub(rb'"__metadata__":\{.*?\}', b'"__metadata__":null', whole[8:size])
        file.write_bytes(len(header).to_bytes(8, "little") + header + whole[size:])
    elif damage == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif damage == "turned":
        (rows,) = load_file(file).values()
        save_file({"embedding": rows.T.contiguous()}, file)
    else:
        wrong = {"shape": torch.ones(3), "nan": torch.full((3, 8), torch.nan), "dtype": torch.ones(3, 8).half()}
        save_file({"embedding": wrong[damage]}, file)
    again = load(prompts=[PROMPT])
    with pytest.warns(UserWarning, match="cannot be read .* encoded again"):
        assert torch.equal(again.turbo_nb.prompt_encoder(PROMPT), expected)
    assert file.read_bytes() == whole and [*folder.iterdir()] == [file] and len(loads) == 2


@pytest.mark.parametrize("off", ["argument", "variable"])
def test_it_can_be_turned_off(folder, loads, monkeypatch, off):
    load().turbo_nb.prompt_encoder(PROMPT)
    (file,) = folder.iterdir()
    file.write_bytes(b"")  # which nobody looks at
    if off == "variable":
        monkeypatch.setenv("TURBO_NB_TEXT_CACHE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(prompts=[PROMPT], text_cache=False if off == "argument" else None).turbo_nb.prompt_encoder(PROMPT)
    assert len(loads) == 2 and file.read_bytes() == b""


def test_the_least_recently_used_go_first(tmp_path, monkeypatch):
    cache = embedding_cache.EmbeddingCache(tmp_path, "one", torch.float32)
    embedding = torch.zeros(1, 512, 100)
    embedding[0, :10] = 1  # 4 kB and a head
    monkeypatch.setattr(embedding_cache, "MOST", 9500)
    for age, prompt in enumerate("ab"):
        cache.put(prompt, embedding)
        os.utime(cache.path(prompt), (1e9 + age, 1e9 + age))
    assert cache.get("a") is not None  # used, so b is the older one now
    cache.put("c", embedding)
    assert [cache.has(prompt) for prompt in "abc"] == [True, False, True]


def test_only_finished_embeddings_are_counted_and_deleted(tmp_path, monkeypatch):
    cache = embedding_cache.EmbeddingCache(tmp_path, "one", torch.float32)
    monkeypatch.setattr(embedding_cache, "MOST", 5000)
    embedding = torch.ones(1, 512, 2)
    with atomic.replaced(tmp_path / "of-another-process.safetensors") as unfinished:
        unfinished.write_bytes(bytes(9000))
        os.utime(unfinished, (time.time() - 60,) * 2)
        (tmp_path / "notes.txt").write_bytes(bytes(9000))
        abandoned = tmp_path / f"{atomic.PREFIX}0.safetensors"
        abandoned.touch()
        os.utime(abandoned, (1e9, 1e9))
        cache.put("a", embedding)
        assert unfinished.exists() and cache.has("a") and (tmp_path / "notes.txt").exists()
    assert not abandoned.exists() and len([*tmp_path.iterdir()]) == 3


@pytest.mark.filterwarnings("error:.*encoded again")
def test_a_folder_that_cannot_be_written_costs_no_video(folder):
    folder.parent.parent.joinpath("cache").write_text("a file")
    with pytest.warns(UserWarning, match="cannot keep .* TURBO_NB_CACHE"):
        assert load().turbo_nb.prompt_encoder(PROMPT).shape[1] == 512


def test_an_embedding_that_is_not_finite_is_not_kept(tmp_path):
    cache = embedding_cache.EmbeddingCache(tmp_path, "one", torch.float32)
    cache.put("a", torch.full((1, 512, 4), torch.nan))
    assert not cache.has("a")


def test_the_folder_lasts_as_long_as_what_is_downloaded(monkeypatch, tmp_path):
    for name in ("TURBO_NB_CACHE", "TURBO_NB_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache() == tmp_path / ".cache" / "turbo_nb"
    monkeypatch.setattr(environment, "volume", lambda: tmp_path / "workspace")
    assert environment.cache() == tmp_path / "workspace" / "turbo_nb_home" / "cache"
    monkeypatch.setenv("TURBO_NB_HOME", "/elsewhere")
    assert str(environment.cache()) == "/elsewhere/cache"
    monkeypatch.setenv("TURBO_NB_CACHE", "~/mine")
    assert environment.cache() == tmp_path / "mine"
