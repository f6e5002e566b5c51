"""docs/support.md, as far as it is about vLLM."""

import pytest

from tools import support


def test_the_page_is_current_and_names_tests_that_are_there():
    support.check_tests("vllm")
    assert support.part("vllm") == support.written("vllm"), "run `python tools/support.py vllm`"


def test_a_cell_is_not_tested_without_a_test(monkeypatch):
    gone = support.Row("a wish", tests={"vllm/test_support.py::test_nothing": "quest"})
    monkeypatch.setitem(support.TABLES, "vllm", {"Models": [gone]})
    with pytest.raises(ValueError, match=r"a wish: vllm/test_support\.py::test_nothing"):
        support.check_tests("vllm")
    wrong = support.Row("MLA", "DeepseekV2", tests={"vllm/test_support.py::test_it": "quest"})
    monkeypatch.setitem(support.TABLES, "vllm", {"Models": [wrong]})
    with pytest.raises(ValueError, match=r"MLA: quest is tested and refused: .*latent attention"):
        support.part("vllm")
