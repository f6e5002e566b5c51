"""What vLLM's adapter hands the core: settings, the model's numbers, packed pages' digests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvplug import PromptKV, read_offer
from kvplug.policies.quest import KeyExtremes
from tests import handover

OFFERS = [
    {"policy": "dense"},
    handover.SETTINGS,
    {"policy": "streaming_llm(sinks=8, window=64)", "protect": 40, "shortcut": False},
    {"policy": "dense", "allow": ["quest", "snapkv"], "max_budget": 512},
]


@pytest.mark.parametrize("given", OFFERS)
def test_the_scheduler_serves_the_offer_of_the_workers(given):
    from kvplug_vllm.cache import EvictionSettings

    offer = read_offer(given, environ={})
    assert EvictionSettings.of(offer).offer() == offer


@pytest.mark.parametrize("era", [0, 1])
def test_pages_that_are_packed_in_place_say_what_they_hold(era):
    """As a GPU packs: the adapter's own, over pages whose digests another request has left; and
    into pages that it reads."""
    from kvplug_vllm import attention

    pages, heads, size, dim = 6, handover.HEADS, 4, handover.HEAD_DIM
    page = heads * (size * 2 + KeyExtremes().rows(size, 4)) * dim
    memory = torch.randn(pages * page, generator=torch.Generator().manual_seed(0))
    stride = (page, size * 2 * dim, 2 * dim, 1)
    cache = memory.as_strided((pages, heads, size, 2 * dim), stride)
    impl = object.__new__(attention.PlannedImpl)
    impl.digest, impl.head_size, impl._views, impl._viewed = KeyExtremes(), dim, None, None
    impl.offer, impl.sinks = read_offer({"policy": "quest"}, environ={}), None
    impl.numbers = None
    tail = impl.views(None, cache).tail
    tail.fill_(handover.STALE)

    prompt_pages = torch.tensor([[5, 4, 3] if era else [1, 2, 3]])
    private = torch.tensor([[5, 4]])
    keys, values = attention.PlannedImpl.read_pages(impl, None, cache, prompt_pages)
    lengths = torch.tensor([3 * size])
    prompt = PromptKV(
        keys=keys, values=values, queries=None, lengths=lengths, scale=1.0, page_size=size
    )
    tokens = torch.tensor([[[0, 2, 3, 5, 6, 7, 9, 11], [0, 1, 3, 4, 6, 8, 9, 10]]])
    slots = torch.tensor([5 * size + place for place in range(size)])
    slots = torch.cat([slots, slots - size])
    packing = SimpleNamespace(
        pages=prompt_pages,
        private=private,
        event=SimpleNamespace(in_place=bool(era)),
        width=2 * size,
        slots=slots,
        kept=lambda rows, tokens: rows[0]
        .gather(0, tokens[0].T[..., None].expand(-1, -1, rows.shape[-1])),
    )  # fmt: skip
    attention.PlannedImpl.store_kept(impl, None, cache, packing, prompt, tokens)
    for place, where in enumerate(private[0].tolist()):
        for head in range(heads):
            kept = keys[0, tokens[0, head, place * size : (place + 1) * size], head]
            assert torch.equal(cache[where, head, :, :dim], kept)
            assert torch.equal(tail[where, head], torch.stack([kept.amin(0), kept.amax(0)]))
    untouched = [0, 1, 2, 3]
    assert (tail[untouched] == handover.STALE).all()


@pytest.fixture(scope="module")
def handed(engine, random_llama, prompts):
    from kvplug_vllm import attention

    handed = handover.Handed()
    with pytest.MonkeyPatch.context() as patch, engine(
        random_llama(), dict(handover.SETTINGS), block_size=32
    ) as planned:  # fmt: skip
        handed.listen(patch, attention)
        pack = attention.PlannedImpl.pack

        def noted(impl, layer, kv_cache, packing):
            digests, size = impl.views(layer, kv_cache).tail, kv_cache.shape[2]
            digests[packing.slots // size] = handover.STALE
            pack(impl, layer, kv_cache, packing)
            handed.note(digests, packing.slots)

        patch.setattr(attention.PlannedImpl, "pack", noted)
        planned.generate(prompts(*handover.LENGTHS), 4)
    return handed


@pytest.mark.engine
@pytest.mark.parametrize(
    "check",
    [
        handover.check_min_context,
        handover.check_protect,
        handover.check_scale,
        handover.check_digests,
    ],
)
def test_what_the_core_is_handed(handed, check):
    check(handed)
