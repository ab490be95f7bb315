"""Garbage collection that is put off is on again afterwards, unless the user had put it off."""

import gc
from contextlib import suppress

from turbo_nb.machine.garbage import uncollected


def test_collection_is_on_again_after_the_last_context():
    first, second = uncollected(), uncollected()
    first.__enter__()
    second.__enter__()
    assert not gc.isenabled()
    first.__exit__(None, None, None)
    assert not gc.isenabled()  # because another thread is still inside
    second.__exit__(None, None, None)
    assert gc.isenabled()
    with suppress(ZeroDivisionError), uncollected():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_user_who_put_collection_off_keeps_it_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
