"""How step functions are imported."""

import gc
import subprocess
import sys

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


def test_what_is_there_once_torch_is_imported_is_left_out_of_collections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen: list[str] = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append("once"))
    with quick_imports():
        monkeypatch.setitem(sys.modules, "other", sys)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with quick_imports():
        pass
    assert not frozen
    with quick_imports():
        monkeypatch.setitem(sys.modules, "torch", sys)
    with quick_imports():
        pass
    assert frozen == ["once"]


def test_an_average_needs_no_transformers_which_take_most_of_a_second_to_import() -> None:
    code = (
        "import sys, btm_cluster.steps.average; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "True False\n"
