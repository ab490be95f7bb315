"""Kernels that were compiled are told apart from those that were found."""

from types import SimpleNamespace

import pytest

from turbo_nb.runtime.compilations import compilations

knobs = pytest.importorskip("triton.knobs")


def event(name, cache_hit):
    return {
        "src": SimpleNamespace(name=name),
        "metadata": {},
        "metadata_group": {},
        "times": None,
        "cache_hit": cache_hit,
    }


def test_only_what_was_compiled_is_collected_and_an_earlier_listener_still_hears(monkeypatch):
    heard = []
    earlier = lambda **event: heard.append(event["src"].name)  # noqa: E731
    monkeypatch.setattr(knobs.compilation, "listener", earlier)
    with compilations("cuda") as names:
        knobs.compilation.listener(**event("norm", False))
        knobs.compilation.listener(**event("product", True))
    assert names == ["norm"] and heard == ["norm", "product"] and knobs.compilation.listener is earlier


def test_a_cpu_compiles_nothing(monkeypatch):
    before = knobs.compilation.listener
    with compilations("cpu") as names:
        assert knobs.compilation.listener is before
    assert names == []


def test_an_error_on_a_cpu_has_no_other_error_behind_it():
    with pytest.raises(KeyError) as caught, compilations("cpu"):
        raise KeyError
    assert caught.value.__context__ is None


def test_the_listener_is_put_back_after_an_error():
    before = knobs.compilation.listener
    with pytest.raises(KeyError), compilations("cuda"):
        raise KeyError
    assert knobs.compilation.listener is before
