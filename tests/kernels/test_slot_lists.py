from itertools import pairwise

import pytest
import torch

from kvplug_kernels.slot_lists import reference, slot_lists

STALE = 10**6


def selection(device, heads: bool = True):
    """Three requests of pages of 4: of 11 tokens, empty, of 8; two heads choose differently."""
    table = torch.tensor([[7, 3, 5, STALE], [-1, -1, -1, -1], [2, 9, -1, STALE]])
    chosen = torch.tensor([[[0, 2, 0], [2, 0, 0]], [[0, 0, 0]] * 2, [[0, 1, 0], [1, 0, 0]]])
    counts, lengths = torch.tensor([[2, 1], [0, 0], [2, 1]]), torch.tensor([11, 0, 8])
    given = (table, lengths, chosen, counts) if heads else (table, lengths, None, None)
    return [None if each is None else each.to(device, torch.int32) for each in given]


def lists(bounds, slots):
    return [slots[a:b].tolist() for a, b in pairwise(bounds.tolist())]


def run(op, table, lengths, chosen, counts, S=4, unit=None, strides=None):
    """The op over outputs that hold nothing yet."""
    unit, heads = unit or S, 1 if chosen is None else chosen.shape[1]
    sequences, width = (
        (len(table), table.shape[1]) if chosen is None else (counts.numel(), chosen.shape[2])
    )
    out = table.new_full((sequences + 1,), -5), table.new_full((sequences * width * S,), -5).long()
    op(table, lengths, S, chosen, counts, *out, unit, strides or (S * heads, heads))
    return lists(*out)


CHOSEN = [  # of head 0, slots are even: (page * 4 + offset) * 2 + head
    [56, 58, 60, 62, 40, 42, 44], [41, 43, 45], [], [],
    [16, 18, 20, 22, 72, 74, 76, 78], [73, 75, 77, 79],
]  # fmt: skip
ALL = [[28, 29, 30, 31, 12, 13, 14, 15, 20, 21, 22], [], [8, 9, 10, 11, 36, 37, 38, 39]]


def test_reference_writes_what_each_head_reads():
    assert run(reference.slot_lists, *selection("cpu")) == CHOSEN
    assert run(reference.slot_lists, *selection("cpu", heads=False)) == ALL


@pytest.mark.parametrize("block", [2, 1024])
def test_kernel_writes_what_each_head_reads(device, monkeypatch, block):
    """Bounds over several blocks of sequences, lists over several blocks of tokens."""
    from kvplug_kernels.slot_lists import kernel

    monkeypatch.setattr(kernel, "SEQUENCES", block)
    monkeypatch.setattr(kernel, "TOKENS", block)
    assert run(kernel.slot_lists, *selection(device)) == CHOSEN
    assert run(kernel.slot_lists, *selection(device, heads=False)) == ALL


@pytest.mark.parametrize("B, H, P, K, S", [(1, 1, 1, 1, 1), (3, 5, 33, 7, 16), (9, 3, 40, 40, 3)])
def test_kernel_equals_the_reference(device, poisoned_outputs, B, H, P, K, S):
    """Rows of all lengths, an empty one among them; the table is wider than what is given."""
    generator = torch.Generator().manual_seed(B * P)
    lengths = torch.randint(0, P * S + 1, (B,), generator=generator).int()
    lengths[0] = P * S
    if B > 1:
        lengths[1] = 0
    pages = (lengths + S - 1) // S
    table = torch.randperm(B * (P + 3), generator=generator).int().view(B, P + 3)[:, :P]
    chosen = torch.full((B, H, K), STALE, dtype=torch.int32)
    counts = torch.zeros(B, H, dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            counts[b, h] = count = min(K, int(pages[b]), 1 + h)
            if count:
                others = torch.randperm(int(pages[b]) - 1, generator=generator)[: count - 1]
                chosen[b, h, :count] = torch.cat([others.sort()[0], pages[b : b + 1] - 1])
    for given in ((table, lengths, chosen, counts), (table, lengths, None, None)):
        wanted = run(reference.slot_lists, *given, S=S)
        moved = [None if each is None else each.to(device) for each in given]
        assert lists(*slot_lists(moved[0], moved[1], S, *moved[2:])) == wanted


def test_pages_of_a_head_among_others_are_read_by_their_first_slots(device):
    """Three heads: the tokens of one lie three slots apart."""
    table, lengths, *_ = selection("cpu", heads=False)
    first = torch.where((table >= 0) & (table < STALE), table * 4 * 3 + 2, table)
    wanted = [[3 * slot + 2 for slot in each] for each in ALL]
    assert run(reference.slot_lists, first, lengths, None, None, strides=(1, 3)) == wanted
    moved = first.to(device), lengths.to(device)
    assert lists(*slot_lists(*moved, 4, token_stride=3)) == wanted


@pytest.mark.parametrize("unit", [1, 2])
def test_units_of_tokens_are_read_token_by_token(device, unit):
    """Head 0 of the first request reads tokens 2 and 3 of its page 1 and the newest, 10."""
    table, lengths, _, _ = selection(device)
    tokens = [[[6, 7, 10], [0, 10, 0]], [[0, 0, 0]] * 2, [[2, 7, 0], [7, 0, 0]]]
    units = [[[3, 5], [0, 5]], [[0, 0]] * 2, [[1, 3], [3, 0]]]
    counts = {1: [[3, 2], [0, 0], [2, 1]], 2: [[2, 2], [0, 0], [2, 1]]}[unit]
    chosen = torch.tensor(tokens if unit == 1 else units, dtype=torch.int32, device=device)
    counts = torch.tensor(counts, dtype=torch.int32, device=device)
    wanted = {
        1: [[28, 30, 44], [57, 45], [], [], [20, 78], [79]],
        2: [[28, 30, 44], [57, 59, 45], [], [], [20, 22, 76, 78], [77, 79]],
    }[unit]
    assert lists(*slot_lists(table, lengths, 4, chosen, counts, unit)) == wanted
    assert run(reference.slot_lists, table, lengths, chosen, counts, unit=unit) == wanted


def test_no_request_reads_nothing(device):
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    bounds, slots = slot_lists(empty.view(0, 3), empty, 4)
    assert bounds.tolist() == [0]
    assert slots.numel() == 0


def test_a_choice_without_counts_is_refused():
    table, lengths, chosen, _ = selection("cpu")
    with pytest.raises(ValueError, match="chosen and counts must be given together"):
        slot_lists(table, lengths, 4, chosen)
    with pytest.raises(ValueError, match="pages that are read whole, got a choice beside it"):
        slot_lists(table, lengths, 4, chosen, torch.zeros(3, 2).int(), token_stride=2)
    with pytest.raises(ValueError, match=r"counts must be \[B=3, H=2\], got \[3, 1\]"):
        slot_lists(table, lengths, 4, chosen, torch.zeros(3, 1, dtype=torch.int32))
