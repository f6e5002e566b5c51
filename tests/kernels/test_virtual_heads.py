import pytest
import torch

from kvplug_kernels.virtual_heads import reference, virtual_heads


def selection(device):
    """Three requests of pages of 4: of 11 tokens, empty, of 8; two heads choose differently."""
    stale = 10**6
    table = torch.tensor([[7, 3, 5, stale], [-1, -1, -1, -1], [2, 9, -1, stale]])
    chosen = torch.tensor([[[0, 2, 0], [2, 0, 0]], [[0, 0, 0]] * 2, [[0, 1, 0], [1, 0, 0]]])
    counts = torch.tensor([[2, 1], [0, 0], [2, 1]])
    lengths = torch.tensor([11, 0, 8])
    inputs = (table, chosen, counts, lengths)
    return [t.to(device, torch.int32) for t in inputs]


EXPECTED = [[70, 50, 0], [53, 0, 0], [0, 0, 0], [0, 0, 0], [20, 90, 0], [93, 0, 0]]
TOKENS = [7, 3, 0, 0, 8, 4]


def test_reference_turns_heads_into_sequences():
    out = torch.full((6, 3), -5, dtype=torch.int32), torch.full((6,), -5, dtype=torch.int32)
    reference.virtual_heads(*selection("cpu"), 4, 10, 3, out)
    assert out[0].tolist() == EXPECTED
    assert out[1].tolist() == TOKENS


def test_kernel_turns_heads_into_sequences(device, poisoned_outputs, monkeypatch):
    """A selection in two blocks, into static buffers of which only the first columns are given."""
    from kvplug_kernels.virtual_heads import kernel

    monkeypatch.setattr(kernel, "CHOSEN", 2)
    buffer = torch.full((6, 8), -5, dtype=torch.int32, device=device)
    lengths = torch.full((6,), -5, dtype=torch.int32, device=device)
    out = virtual_heads(*selection(device), 4, 10, 3, out=(buffer[:, :3], lengths))
    assert out[0].data_ptr() == buffer.data_ptr()
    assert out[0].tolist() == EXPECTED
    assert out[1].tolist() == TOKENS
    assert (buffer[:, 3:] == -5).all()


# Tokens of both heads: 9, 0 and 10; 5. Empty. 3, 4 and 7; 7.
TOKEN_CHOICE = [[[0, 9, 10], [5, 0, 0]], [[0, 0, 0]] * 2, [[3, 4, 7], [7, 0, 0]]]
TOKEN_COUNTS = [[3, 1], [0, 0], [3, 1]]
TOKEN_TABLE = [[700, 510, 520], [313, 0, 0], [0, 0, 0], [0, 0, 0], [230, 900, 930], [933, 0, 0]]
PAIR_TABLE = [[700, 520, 0], [323, 0, 0], [0, 0, 0], [0, 0, 0], [220, 900, 920], [923, 0, 0]]


def units(device, unit):
    """Tokens, or the pairs of tokens 0, 5 and 2 and so on."""
    table, _, _, lengths = selection(device)
    chosen = [[[0, 5, 0], [3, 0, 0]], [[0, 0, 0]] * 2, [[1, 2, 3], [3, 0, 0]]]
    counts = [[2, 1], [0, 0], [3, 1]]
    if unit == 1:
        chosen, counts = TOKEN_CHOICE, TOKEN_COUNTS
    named = (torch.tensor(t, device=device, dtype=torch.int32) for t in (chosen, counts))
    return table, *named, lengths


@pytest.mark.parametrize(
    "unit, table, tokens",
    [(1, TOKEN_TABLE, [3, 1, 0, 0, 3, 1]), (2, PAIR_TABLE, [3, 1, 0, 0, 6, 2])],
)
def test_units_begin_within_their_pages(unit, table, tokens):
    out = virtual_heads(*units("cpu", unit), 4, 100, 3, unit=unit, token_stride=10)
    assert out[0].tolist() == table
    assert out[1].tolist() == tokens


@pytest.mark.parametrize("unit", [1, 2])
def test_kernel_finds_units_within_their_pages(unit, device, poisoned_outputs):
    out = virtual_heads(*units(device, unit), 4, 100, 3, unit=unit, token_stride=10)
    assert out[0].tolist() == (TOKEN_TABLE if unit == 1 else PAIR_TABLE)


def test_wrong_out_says_what_it_wanted():
    out = torch.zeros(6, 2, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"out\[0\] must be \[B\*H=6, K=3\], got \[6, 2\]"):
        virtual_heads(*selection("cpu"), 4, 10, 3, out=out)
