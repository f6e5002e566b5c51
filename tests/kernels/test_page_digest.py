import pytest
import torch

from kvplug_kernels.page_digest import update_page_digest

S = 4


def plain(digest, keys, slots, page_size):
    """Key by key, as the docstring defines it."""
    for slot, key in zip(slots.tolist(), keys, strict=False):
        page, offset = divmod(slot, page_size)
        if slot >= 0:
            low, high = (key, key) if offset == 0 else digest[page].unbind(1)
            digest[page] = torch.stack([low.minimum(key), high.maximum(key)], 1)


RUNS = {
    "one token": [[9]],
    "decode with padding": [[4, -1, 17, 30, -1]],
    "page 0 after padding": [[-1, 0, 1, 2]],
    "two chunks of a prompt": [list(range(8, 18)), list(range(18, 31)), [31]],
    "pages in any order": [[12, 13, 14, 15, 0, 1, 28, 29, 30, 31, 4, -1, -1]],
    "nothing": [[]],
}


@pytest.mark.parametrize("chunks", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("heads, D", [(2, 80), (3, 96), (7, 128)])
def test_kernel_equals_reference(chunks, heads, D, dtype, device):
    """Digests in a padded tail of each page; where a page begins they hold what must not count."""
    torch.manual_seed(0)
    memory = torch.randn(8, heads * 2 * D + 5, dtype=dtype, device=device)
    for chunk in chunks:
        for slot in chunk:
            if slot >= 0 and slot % S == 0:
                memory[slot // S, ::2], memory[slot // S, 1::2] = -1e4, 1e4
                memory[slot // S, ::7] = float("nan")
    expected = memory.clone()
    for chunk in chunks:
        keys = torch.randn(len(chunk) + 2, heads + 1, D, dtype=dtype, device=device)[:, 1:]
        slots = torch.tensor(chunk, dtype=torch.int64, device=device)
        for pool, update in ((memory, update_page_digest), (expected, plain)):
            update(pool[:, 5:].view(8, heads, 2, D), keys, slots, S)
    torch.testing.assert_close(memory, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_kernel_is_captured_in_a_graph():
    keys = torch.randn(64, 8, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(64, device="cuda")
    digest = torch.zeros(4, 8, 2, 128, device="cuda", dtype=torch.bfloat16)
    update_page_digest(digest, keys, slots, 16)
    expected = digest.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_page_digest(digest, keys, slots, 16)
    digest.zero_()
    graph.replay()
    assert torch.equal(digest, expected)


def test_wrong_dtype_says_what_it_wanted():
    keys = torch.zeros(3, 2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="keys must be float32, got float16"):
        update_page_digest(torch.zeros(4, 2, 2, 8), keys, torch.arange(3), 4)


def test_fewer_keys_than_slots_says_what_it_wanted():
    with pytest.raises(ValueError, match=r"keys must be \[T=3, H=2, D=8\], got \[1, 2, 8\]"):
        update_page_digest(torch.zeros(4, 2, 2, 8), torch.zeros(1, 2, 8), torch.arange(3), 4)
