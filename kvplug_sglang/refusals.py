"""What would be wrong, refused at start with the reason and the nearest thing that works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvplug import (
    ChunkReuse,
    Composition,
    HeadBudgets,
    LayerBudgets,
    LocalLayers,
    Offer,
    PageFormat,
    Placement,
    Planner,
    PositionalEviction,
    Refused,
    Rotation,
    ScoredEviction,
    Selector,
    Settings,
    SparsePrefill,
    read_offer,
    sharing,
)
from kvplug_sglang import backend, compat, windows
from kvplug_sglang.settings import NAME

PAGE_SIZE = 32
"""With a digest of two keys a page, 1/32 of the pool."""

CODED = (32, 64)
"""Tokens of pages that formats code."""

PLAIN = ("auto", "bf16", "bfloat16", "float16", "float32")
"""Caches of the numbers that a model computes in."""

REQUESTS = 256
"""That run at once unless the user says, where each fills a page of its own in full precision."""

KNOWN = (
    SparsePrefill, PositionalEviction, ScoredEviction, LayerBudgets, Selector, PageFormat,
    ChunkReuse,
)  # fmt: skip
"""Kinds of policies that this adapter carries out."""

FEATURES = {
    "speculative_algorithm": (
        "speculative decoding was never run: on a CPU SGLang verifies drafts by compiled kernels "
        "of sgl_kernel alone; drop --speculative-algorithm, or serve it in vLLM"
    ),
    "enable_unified_memory": (
        "unified memory renumbers slots behind the policy's back; drop --enable-unified-memory"
    ),
    "enable_streaming_session": (
        "a session hands a request's row, which may be compressed, to the next turn; drop "
        "--enable-streaming-session (the prefix cache serves the next turn)"
    ),
    "enable_session_radix_cache": (
        "a session keeps what a request inserted, and a compressed one inserts its prompt alone; "
        "drop --enable-session-radix-cache"
    ),
    "enable_hierarchical_cache": (
        "HiCache moves pages between a GPU and its host without their digests; drop "
        "--enable-hierarchical-cache, or serve twilight or quest in vLLM with --kv-offloading-size"
    ),
    "enable_lmcache": "LMCache moves pages without their digests; drop --enable-lmcache",
    "enable_unified_cache_external_linker": (
        "an external cache moves pages without their digests; drop "
        "--enable-unified-cache-external-linker"
    ),
    "enable_hisparse": "HiSparse selects pages itself; drop --enable-hisparse",
    "enable_pdmux": "PD multiplexing splits a step between streams; drop --enable-pdmux",
    "enable_two_batch_overlap": (
        "two-batch overlap splits a batch after it was planned; drop --enable-two-batch-overlap"
    ),
    "enable_deterministic_inference": (
        "deterministic inference needs kernels of its own; drop --enable-deterministic-inference"
    ),
    "dllm_algorithm": "diffusion models rewrite what they decoded; drop --dllm-algorithm",
    "radix_cache_backend": (
        "another prefix cache would not know which requests are compressed; drop "
        "--radix-cache-backend"
    ),
}
SPLITS = {
    "dcp_size": "context parallelism splits a request's pages over ranks; drop --dcp-size",
    "attn_cp_size": "context parallelism splits a request's pages over ranks; drop --attn-cp-size",
    "attn_dp_size": "data-parallel attention was never run; drop --attn-dp-size",
    "pp_size": "pipeline parallelism was never run; use --tp-size",
}


def refuse(server_args: Any, given: object) -> dict[str, Any]:
    """What is left for kvplug to decide of SGLang's arguments. Raises ValueError with every
    reason why kvplug cannot serve them right."""
    view, model = compat.resolved(server_args)
    reasons = list(refusals(view, model, given, backend.stock(server_args, view.device)))
    if reasons:
        raise ValueError("kvplug cannot serve this configuration:\n- " + "\n- ".join(reasons))
    offer = read_offer(given, environ={})
    dense = offer.settings.policy.is_dense and not offer.mixed
    decisions = {} if dense else compat.graphs(view)
    if view.page_size is None and (size := default_page(offer)) is not None:
        decisions["page_size"] = size
    if offer.format is not None and view.max_running_requests is None:
        decisions["max_running_requests"] = REQUESTS
    return decisions


def default_page(offer: Offer) -> int | None:
    """Tokens of a page where a policy speaks of pages; None for SGLang's own."""
    speaks = offer.digest is not None or offer.block_selectors or offer.format is not None
    return PAGE_SIZE if speaks else None


def refusals(view: Any, model: Any, given: object, wrapped: str) -> Iterator[str]:
    """The reasons, each saying what to do instead. A bad policy line is one of them.

    wrapped: SGLang's name of the attention that kvplug wraps here.
    """
    try:
        offer = read_offer(given, environ={})
    except ValueError as error:
        yield str(error)
        return
    backends = compat.attention_backends(view)
    if set(backends) != {NAME}:
        yield (
            f"the attention backends are {' for prefill and '.join(backends)} for decode: kvplug "
            "compresses while it prefills and reads while it decodes; give --attention-backend "
            "kvplug alone. On GPUs it wraps FlashAttention 3 where that is SGLang's own choice, "
            "else Triton; FlashInfer, whose plan fixes lengths on the host, cannot be wrapped yet"
        )
    if compat.uses_mla(model):
        yield (
            "the model uses multi-head latent attention (MLA), whose cache has no keys to score; "
            "serve it without --attention-backend kvplug (the engine has its own sparse paths)"
        )
    if offer.settings.policy.is_dense and not offer.mixed:
        return
    yield from unsupported(offer)
    page = view.page_size or default_page(offer) or 1
    try:
        Planner(offer.settings, page)
    except ValueError as error:
        yield str(error)
        return
    if offer.digest is not None:
        try:
            offer.digest_rows(view.page_size or PAGE_SIZE, 2)
        except ValueError as error:
            yield f"pages of --page-size cannot carry what the policy reads: {error}"
    if offer.settings.policy.reuse is not None:
        yield from reusing(offer.settings.policy.reuse, view, model)
    if offer.format is not None:
        yield from with_format(offer.format, offer, view, model, page)
    yield from offer.settings.policy.misfits(model.hf_text_config)
    if isinstance(scored := offer.settings.policy.scored, HeadBudgets):
        yield from by_head(scored, view, model)
    for name, reason in FEATURES.items():
        if getattr(view, name):
            yield reason
    for name, reason in SPLITS.items():
        if (getattr(view, name) or 1) > 1:
            yield reason
    if view.disaggregation_mode != "null":
        yield (
            "prefill-decode disaggregation sends whole rows between servers; drop "
            "--disaggregation-mode, or use the policy 'dense'"
        )
    yield from with_quantised_cache(view.kv_cache_dtype, wrapped)
    if compat.breaks_decode_graphs(view):
        yield (
            "breakable CUDA graphs of decode were never run; use --cuda-graph-config "
            '\'{"decode": {"backend": "full"}}\''
        )
    if compat.glues_metadata():
        yield (
            "SGLANG_ENABLE_METADATA_GLUE_GRAPH captures the plan of one step, and every later one "
            "would be served by it; unset SGLANG_ENABLE_METADATA_GLUE_GRAPH"
        )
    if compat.head_major_cache():
        yield "the cache's layout is head-major; unset SGLANG_USE_HND_KVCACHE"
    if compat.attention_sinks(model) and offer.block_selectors:
        yield (
            f"{offer.block_selectors[0].name} reads each KV head's pages as sequences of their "
            "own, and the model's attention sinks belong to query heads; use a_shape or tri_shape"
        )
    if compat.shares_caches(model):
        yield from sharing.refusals(offer)
        yield from sharing.beside(offer.settings)
    yield from beside_recurrent(view, offer)
    for what in compat.special_layers(model):
        yield f"{what}, which was never run; use the policy 'dense'"
    if compat.windows_of_other_heads(model):
        yield (
            "the model's windowed layers keep heads of another shape than the others, which "
            "SGLang has in a pool of their own; that pool knows nothing of a row that a policy "
            "rewrites; use the policy 'dense'"
        )
    elif compat.windows_apart(model):
        yield (
            "the model's windowed layers have a pool of their own, which knows nothing of a row "
            "that a policy rewrites; add --disable-hybrid-swa-memory, or use the policy 'dense'"
        )
    elif (window := compat.declared_window(model)) > 0:
        yield from too_narrow(offer.settings, model, window, page)
    policy = offer.settings.policy
    streams = policy.scored if policy.scored is not None and policy.scored.chunk else None
    during = policy.eviction or streams
    if during is not None and compat.masks_images(model):
        yield (
            "the model's images see themselves both ways by a mask over the whole prompt, and "
            f"{during.name} takes parts of it while it is prefilled; use "
            "snapkv, or the policy 'dense'"
        )
    if compat.attends_in_chunks(model):
        yield (
            "some of the model's layers attend within chunks of the context, which SGLang has in "
            "its kernels for GPUs alone: it was never run; serve it in vLLM, or use the policy "
            "'dense'"
        )


def with_quantised_cache(dtype: str, wrapped: str) -> Iterator[str]:
    """Where pages hold other numbers than a model computes in."""
    instead = "use --kv-cache-dtype auto, or the policy 'dense'"
    if dtype in PLAIN:
        return
    if not dtype.startswith("fp8"):
        yield (
            f"a page of the KV cache {dtype} keeps scales of its blocks, and no policy can read "
            f"it; {instead}"
        )
    elif wrapped == backend.NATIVE:
        yield f"on a CPU SGLang has a KV cache {dtype} for its own AMX attention alone; {instead}"
    elif wrapped != backend.FLASH:
        yield (
            "SGLang's Triton kernels, which kvplug wraps here, read what a step adds to a KV "
            f"cache {dtype} before it is quantised, and every later step what became of it; "
            f"{instead}"
        )


def by_head(scored: HeadBudgets, view: Any, model: Any) -> Iterator[str]:
    """What heads of a layer that keep different numbers of pages were never run with."""
    without = f"use {scored.base}"
    if view.tp_size > 1:
        yield (
            "tensor parallelism gives each rank some heads of a layer, whose shares "
            f"{scored.name} takes of them all together; drop --tp-size, or {without}"
        )
    yield from beside_layers(scored.name, without, model)
    if view.kv_cache_dtype not in PLAIN:
        yield (
            f"a quantised cache beside {scored.name} was never run; drop --kv-cache-dtype, or "
            f"{without}"
        )


def beside_layers(who: object, without: str, model: Any) -> Iterator[str]:
    """Layers of a model beside which the plainest alone were run."""
    for what, has in (
        ("recurrent layers", compat.recurrent(model)),
        ("layers that see a window", compat.windows_apart(model) or compat.declared_window(model)),
        ("layers that share a cache", compat.shares_caches(model)),
        ("attention sinks", compat.attention_sinks(model)),
        ("values of another size than its keys", model.v_head_dim != model.head_dim),
    ):
        if has:
            yield f"the model has {what}, beside which {who} was never run; {without}"


def with_format(
    format: PageFormat, offer: Offer, view: Any, model: Any, page_size: int
) -> Iterator[str]:
    """What writes or reads pages past the layers that code them, or was never run with them."""
    without = f"leave {format.name} out"
    if view.kv_cache_dtype != "auto":
        yield f"{format} codes plain pages, got --kv-cache-dtype {view.kv_cache_dtype}; drop it"
    if page_size not in CODED:
        yield (
            f"{format} codes pages of 32 or 64 tokens, got --page-size {page_size}; write "
            f"--page-size {PAGE_SIZE}"
        )
    else:
        try:
            layers = model.num_hidden_layers
            format.layouts(layers, page_size, model.head_dim, model.dtype)
        except ValueError as error:
            yield f"{format}: {error}; {without}"
    yield from beside_layers(format, without, model)
    for what, has in (
        ("tensor parallelism", view.tp_size > 1),
        ("--enable-mixed-chunk", view.enable_mixed_chunk),
        ("--enable-memory-saver", view.enable_memory_saver),
        ("a server that only prefills", view.prefill_only_disable_kv_cache),
        ("layers of different budgets", not offer.settings.policy.uniform),
        ("sparse prefill", offer.generates),
    ):
        if has:
            yield f"{what} beside {format} was never run; drop it, or {without}"


def reusing(reuse: ChunkReuse, view: Any, model: Any) -> Iterator[str]:
    """What keeps chunks from being found, moved or seen, and what was never run with them."""
    instead = "use the policy 'dense'"
    if view.disable_radix_cache:
        yield f"{reuse} finds chunks in the prefix cache; drop --disable-radix-cache, or {instead}"
    try:
        Rotation.of(model.hf_text_config, model.head_dim)
    except ValueError as error:
        yield f"{reuse} moves keys: {error}; {instead}"
    yield from beside_layers(reuse, instead, model)
    if model.is_multimodal:
        yield (
            f"the model has images or audio in its prompts, beside which {reuse} was never run; "
            f"{instead}"
        )
    for what, flag, has in (
        ("a quantised cache", "--kv-cache-dtype", view.kv_cache_dtype != "auto"),
        ("tensor parallelism", "--tp-size", view.tp_size > 1),
        ("adapters", "--enable-lora", view.enable_lora),
        ("mixed chunks", "--enable-mixed-chunk", view.enable_mixed_chunk),
        ("watermarks", "--enable-watermark", view.enable_watermark),
    ):
        if has:
            yield f"{what} beside {reuse} was never run; drop {flag}, or {instead}"


def beside_recurrent(view: Any, offer: Offer) -> Iterator[str]:
    """Where the prefix cache keeps recurrent states."""
    alone = compat.caches_last_states_alone(view)
    if alone and view.page_size is None and default_page(offer) is not None:
        yield (
            "the prefix cache of a model with recurrent layers has pages of one token unless it "
            "keeps states of earlier tokens, and the policy reads pages; add "
            "--mamba-radix-cache-strategy extra_buffer, --disable-radix-cache, or --page-size 1, "
            "whose digests are twice its keys"
        )


def too_narrow(settings: Settings, model: Any, window: int, page_size: int) -> Iterator[str]:
    """A policy that would take from the model's windowed layers what they still see."""
    policy, budget = settings.policy, None
    if not policy.uniform:
        budget = max(policy.layer_budgets(model.num_hidden_layers))
    try:
        windows.check(Planner(settings, page_size, budget), window, model.context_len)
    except Refused as error:
        yield str(error)


def unsupported(offer: Offer) -> Iterator[str]:
    """Policies of a kind that this adapter does not know how to carry out."""
    policy: Composition = offer.settings.policy
    for part in policy:
        if isinstance(part, LocalLayers):
            yield (
                f"{part} lets layers see a window, and SGLang lays out its pools, and frees their "
                "slots, by the windows of a model's configuration alone; serve it in vLLM, or use "
                "streaming_llm, whose window is every layer's"
            )
        elif isinstance(part, ScoredEviction) and part.appends:
            instead = f"write a budget in tokens, such as {part.name}(budget=1024, chunk="
            instead = "serve it in vLLM" if part.compiles else f"{instead}{part.chunk})"
            yield (
                f"{part} leaves fewer slots than tokens of a chunk, and SGLang's tree counts one "
                f"slot a token; {instead}"
            )
        elif isinstance(part, Placement):
            yield (
                f"{part} keeps what pages on the host say in pages of the engine's own pool, and "
                "was never brought to SGLang's; serve it in vLLM"
            )
        elif not isinstance(part, KNOWN):
            yield (
                f"{part.name} is a policy of the stage {part.stage.value!r} that the SGLang "
                "adapter cannot carry out; subclass PositionalPrefill, BlockSelector, "
                "PositionalEviction, ScoredEviction, LayerBudgets or Selector"
            )
