"""What ``kvplug plan`` believes of answers is what the published results say."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]


def test_the_published_numbers_are_those_of_the_results():
    tool = runpy.run_path(str(ROOT / "tools/published.py"))
    assert tool["render"]() == tool["FILE"].read_text(), "run tools/published.py"


def test_the_chart_is_that_of_the_results():
    tool = runpy.run_path(str(ROOT / "tools/chart.py"))
    assert tool["render"]() == tool["FILE"].read_text(), "run tools/chart.py"
