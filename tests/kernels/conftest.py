"""Kernels run on CUDA where there is one, else in Triton's interpreter if TRITON_INTERPRET=1."""

import pytest
import torch

from kvplug_kernels.dispatch import interpreted
from tests.stand_ins.interpreter import patch_once

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Triton 3.6's interpreter leans on what NumPy 1.25 deprecated; 3.9's no longer does.
OLD_INTERPRETER = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"


def pytest_collection_modifyitems(items):
    if interpreted():  # kernels alone: all else is as without it
        patch_once()
        items[:] = [item for item in items if {"device", "where"} & {*item.fixturenames}]
        for item in items:
            item.add_marker(pytest.mark.filterwarnings(OLD_INTERPRETER))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> str:
    """Where kernels run in this process; skips the test when nowhere."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if interpreted():
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("no CUDA device; TRITON_INTERPRET=1 runs kernels on the CPU")


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """The dtypes of a kernel test."""
    if interpreted() and request.param is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    return request.param


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """torch.empty returns NaN or an absurd integer, so that an unwritten output shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(10**9))

    monkeypatch.setattr(torch, "empty", poisoned)
