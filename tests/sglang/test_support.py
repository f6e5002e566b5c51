"""docs/support.md, as far as it is about SGLang."""

import pytest

from tools import support

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_the_page_is_current_and_names_tests_that_are_there(monkeypatch):
    monkeypatch.setenv("KVPLUG_POLICY", "")  # the tool sets it, policy by policy
    support.check_tests("sglang")
    assert support.part("sglang") == support.written("sglang"), (
        "run `python tools/support.py sglang` with tests/sglang/shims on PYTHONPATH"
    )
