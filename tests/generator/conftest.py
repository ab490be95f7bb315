import pytest

from turbo_nb.sla import set_topk


@pytest.fixture(autouse=True)
def topk_of_nano_stays(nano):
    """A runner sets the top-k of the pipeline that it has, which the tests of all rooms share here"""
    yield
    set_topk(nano.transformer, nano.turbo_nb.spec.sla_topk)
