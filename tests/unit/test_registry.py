"""How step functions are imported."""

import gc

import pytest

from btm_cluster.steps.registry import quick_imports


def test_the_garbage_collector_pauses_while_modules_are_imported_and_is_then_as_before() -> None:
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()
