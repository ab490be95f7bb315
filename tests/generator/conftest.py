import pytest

from turbo_nb.sla import set_topk


@pytest.fixture(autouse=True)
def topk_of_nano_stays(nano):
    """A runner sets the top-k of the pipeline that it has, which the tests of all rooms share here"""
    yield
    set_topk(nano.transformer, nano.turbo_nb.spec.sla_topk)


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory, monkeypatch):
    """Each test begins without presets and without the settings of an earlier session"""
    monkeypatch.setenv("TURBO_NB_CONFIG", str(tmp_path_factory.mktemp("config")))
