"""The faults of tools/faults.py are of this tree: run it itself by hand, for it takes long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tools.faults import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_put_in_and_its_test_is_there(fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.right) == 1
    if fault.file.endswith(".py"):
        ast.parse(text.replace(fault.right, fault.wrong))
    file, _, name = fault.test.partition("::")
    tests = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(n, "name")}
    assert name.partition("[")[0] in tests
