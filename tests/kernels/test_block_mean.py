import pytest
import torch

from kvplug_kernels.block_mean import block_mean, reference

BOUNDS = [2, 2, 3, 70, 134, 134]  # rows before and behind belong to no block


def problem(Hq, D, dtype, device="cpu"):
    """Queries and their means in float64; rows of no block are NaN."""
    query = torch.randn(137, Hq + 1, D, generator=torch.Generator().manual_seed(D)).to(dtype)
    query[:2] = query[134:] = float("nan")
    expected = torch.zeros(5, Hq, D, dtype=torch.float64)
    for i in (1, 2, 3):
        rows = query[BOUNDS[i] : BOUNDS[i + 1], :Hq].double()
        expected[i] = rows.sum(0) / len(rows)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    return query.to(device)[:, :Hq], bounds, expected.float().to(device)


@pytest.mark.parametrize("Hq, D", [(9, 64), (1, 80)])
def test_reference_is_the_mean(Hq, D, dtype):
    query, bounds, expected = problem(Hq, D, dtype)
    torch.testing.assert_close(reference.block_mean(query, bounds), expected)


@pytest.mark.parametrize("Hq, D", [(9, 64), (1, 80)])
def test_kernel_is_the_mean(Hq, D, dtype, device, poisoned_outputs):
    query, bounds, expected = problem(Hq, D, dtype, device)
    torch.testing.assert_close(block_mean(query, bounds), expected, atol=1e-5, rtol=1e-5)


def test_wrong_shapes_say_what_they_wanted():
    query = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"bounds must be \[n \+ 1\], .* got \[0\]"):
        block_mean(query, torch.zeros(0, dtype=torch.int32))
    with pytest.raises(ValueError, match="bounds must be int32, got int64"):
        block_mean(query, torch.zeros(2, dtype=torch.int64))
