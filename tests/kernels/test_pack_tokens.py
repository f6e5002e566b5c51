from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from kvplug_kernels.pack_tokens import pack_tokens, reference

STALE = 10**9  # what padding holds: followed, it leads nowhere
PADDING = 8  # elements after each page, columns after each row


@dataclass(frozen=True)
class Job:
    """The arguments of one call."""

    cache: Tensor
    pages: Tensor
    tokens: Tensor
    keep: Tensor
    targets: Tensor

    def arguments(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def job(prompts, H, C, S, dtype=torch.float32, device="cpu", integers=torch.int64, flat=False):
    """prompts: (length, keep) each, all of which begin with the same page.

    Memory is NaN but for the prompts' tokens, private pages too. Heads lie one after the other in
    a page with padding behind, or with ``flat`` side by side in a token.
    """
    generator = torch.Generator().manual_seed(H * C + S + sum(map(sum, prompts)))
    J, K = len(prompts), max([keep for _, keep in prompts], default=0) + 3
    P, Kp = max([-(-length // S) for length, _ in prompts], default=0), -(-K // S)
    N = 1 + J * (P + Kp) + 2
    memory = torch.full((N, H * S * C + PADDING), float("nan"), dtype=dtype)
    pages = torch.full((J, P + PADDING), STALE, dtype=integers)
    targets = torch.full((J, Kp + PADDING), STALE, dtype=integers)
    tokens = torch.full((J, H + 1, K), STALE, dtype=integers)
    shuffled = torch.randperm(N, generator=generator).tolist()
    shared = shuffled.pop()
    cache = view(memory, H, C, S, flat)
    for j, (length, keep) in enumerate(prompts):
        for p in range(-(-length // S)):
            pages[j, p] = page = shuffled.pop() if p else shared
            filled = min(S, length - p * S)
            cache[page, :, :filled] = torch.randn(H, filled, C, generator=generator).to(dtype)
        for k in range(-(-keep // S)):
            targets[j, k] = shuffled.pop()
        for h in range(H):
            kept = torch.randperm(length, generator=generator)[:keep].sort().values
            tokens[j, h, :keep] = kept
    return Job(
        cache=view(memory.to(device), H, C, S, flat),
        pages=pages.to(device)[:, :P],
        tokens=tokens.to(device)[:, :H],
        keep=torch.tensor([keep for _, keep in prompts], dtype=integers, device=device),
        targets=targets.to(device)[:, :Kp],
    )


def view(memory, H, C, S, flat):
    """[N, page and padding] -> [N, H, S, C]"""
    page = memory[:, : H * S * C]
    if flat:
        return page.unflatten(1, (S, H, C)).transpose(1, 2)
    return page.unflatten(1, (H, S, C))


def whole(cache):
    """All bytes behind a cache, as numbers."""
    return torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())


def plainly(job):
    """All memory as it must be: copied number by number, as the docstring defines it."""
    memory = whole(job.cache).cpu().clone()
    before, strides = memory.clone(), job.cache.stride()
    _, H, S, C = job.cache.shape
    for j, keep in enumerate(job.keep.tolist()):
        for h in range(H):
            for k in range(keep):
                token = int(job.tokens[j, h, k])
                source, target = int(job.pages[j, token // S]), int(job.targets[j, k // S])
                read, written = (
                    page * strides[0] + h * strides[1] + row % S * strides[2]
                    for page, row in ((source, token), (target, k))
                )
                memory[written : written + C] = before[read : read + C]
    return memory


def check(pack, job):
    expected = plainly(job)
    assert pack(*job.arguments()) is None
    got = whole(job.cache).cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


SHAPES = {
    "ragged": ([(70, 33), (64, 64), (17, 1), (40, 0)], 3, 192, 16),
    "pages of 32": ([(100, 40), (33, 31)], 2, 192, 32),
    "one page": ([(16, 7)], 1, 128, 16),
    "a page of one token": ([(5, 3), (1, 1)], 2, 80, 1),
    "nothing kept": ([(20, 0), (0, 0)], 2, 64, 16),
    "odd pages and channels": ([(31, 30), (9, 2)], 5, 33, 7),
    "no prompt": ([], 2, 64, 16),
}


@pytest.mark.parametrize("flat", [False, True], ids=["by head", "by token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference_copies_what_is_kept_and_nothing_else(shape, flat):
    check(reference.pack_tokens, job(*shape, flat=flat))


@pytest.mark.parametrize("flat", [False, True], ids=["by head", "by token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_copies_what_is_kept_and_nothing_else(shape, flat, dtype, device):
    check(pack_tokens, job(*shape, dtype=dtype, device=device, flat=flat))


def test_kernel_takes_rows_wider_than_a_block(device, monkeypatch):
    from kvplug_kernels.pack_tokens import kernel

    monkeypatch.setattr(kernel, "ELEMENTS", 100)  # fewer than a token's
    check(pack_tokens, job([(40, 23), (16, 16)], 2, 192, 16, device=device))


def test_kernel_takes_int32(device):
    check(pack_tokens, job([(40, 23), (16, 5)], 2, 64, 16, device=device, integers=torch.int32))


@pytest.mark.gpu
def test_kernel_reaches_pages_behind_two_to_the_31_elements():
    """4 GiB and more: page numbers times strides need 64 bits."""
    cache = torch.empty(5000, 8, 256, 256, dtype=torch.bfloat16, device="cuda")
    cache[4998:] = 0
    cache[4998, :, 5] = 1
    at = torch.tensor([[4998]], device="cuda"), torch.tensor([[4999]], device="cuda")
    tokens = torch.full((1, 8, 1), 5, device="cuda")
    pack_tokens(cache, at[0], tokens, torch.tensor([1], device="cuda"), at[1])
    assert (cache[4999, :, 0] == 1).all()
    assert (cache[4999, :, 1:] == 0).all()


@pytest.mark.gpu
def test_kernel_is_captured_in_a_graph():
    """Which also proves that nothing waits for the device."""
    one = job([(70, 33), (64, 64)], 3, 192, 16, torch.bfloat16, "cuda")
    untouched = one.cache.clone()
    pack_tokens(*one.arguments())
    expected = one.cache.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack_tokens(*one.arguments())
    one.cache.copy_(untouched)
    graph.replay()
    torch.testing.assert_close(one.cache, expected, rtol=0, atol=0, equal_nan=True)


def arguments():
    return job([(40, 20), (16, 5)], 2, 64, 16).arguments()


def test_too_few_targets_say_what_they_wanted():
    cache, pages, tokens, keep, targets = arguments()
    wanted = "targets must have room for the 23 tokens of a head, got 1 pages of 16"
    with pytest.raises(ValueError, match=wanted):
        pack_tokens(cache, pages, tokens, keep, targets[:, :1])


def test_wrong_heads_say_what_they_wanted():
    cache, pages, tokens, keep, targets = arguments()
    with pytest.raises(ValueError, match=r"tokens must be \[J=2, H=2, K=23\], got \[2, 1, 23\]"):
        pack_tokens(cache, pages, tokens[:, :1], keep, targets)
