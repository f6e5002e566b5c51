"""What would be wrong, refused at start with the reason and the nearest thing that works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.platforms import current_platform

from kvplug import (
    ChunkReuse,
    HeadBudgets,
    LayerBudgets,
    LocalLayers,
    Offer,
    PageFormat,
    Placement,
    Planner,
    Policy,
    PositionalEviction,
    Rotation,
    ScoredEviction,
    Selector,
    Settings,
    SparsePrefill,
    TokenSelector,
    policy_class,
    sharing,
)
from kvplug_vllm import host_settings
from kvplug_vllm.eight_bits import PLAIN, numbers
from kvplug_vllm.settings import offer_of


def refuse(vllm_config: Any) -> None:
    """Raises ValueError with every reason why kvplug cannot serve this configuration right."""
    reasons = list(refusals(vllm_config))
    if reasons:
        raise ValueError("kvplug cannot serve this configuration:\n- " + "\n- ".join(reasons))


def refusals(vllm_config: Any) -> Iterator[str]:
    """The reasons, each saying what to do instead. A bad policy line is one of them."""
    try:
        offer = offer_of(vllm_config)
    except ValueError as error:
        yield str(error)
        return
    policy = offer.settings.policy
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model is not None and getattr(model, "use_mla", False):
        yield (
            "the model uses multi-head latent attention (MLA), whose cache has no keys to score; "
            "serve it without --attention-backend kvplug (the engine has its own sparse paths)"
        )
    yield from host_settings.refusals(vllm_config)
    if policy.is_dense and not offer.mixed:
        return
    if policy.scored is not None and policy.scored.compiles:
        yield from _compiling(policy.scored, vllm_config)
    if policy.placement is not None:
        yield from _placing(offer, vllm_config)
    if policy.reuse is not None:
        yield from _reusing(policy.reuse, vllm_config)
    if offer.format is not None:
        yield from _with_format(offer.format, offer, vllm_config)
    if isinstance(policy.scored, HeadBudgets):
        yield from _by_head(policy.scored, vllm_config)
    yield from unsupported(offer)
    yield from _with_drafts(offer, vllm_config)
    yield from (reason for _, reason in beside(offer.settings, vllm_config))
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if getattr(parallel, name, 1) > 1:
            yield f"context parallelism splits a request's pages over ranks; drop {flag}"
    plans = policy.plans or offer.mixed
    if parallel.pipeline_parallel_size > 1:
        reason = (
            "later ranks are not told which row is which request"
            if plans
            else "a rank has some of the layers, and cannot count the model's"
        )
        yield (
            f"pipeline parallelism: {reason}; use --tensor-parallel-size, or the policy 'dense'"
        )
    if vllm_config.kv_transfer_config is not None:
        yield from _with_connector(offer, vllm_config)
    if plans:
        yield from _of_planned_layers(vllm_config)
    if model is None:
        return
    yield from policy.misfits(model.hf_text_config)
    if model.runner_type == "pooling":
        yield (
            "a pooling model decodes nothing that a policy could spare; serve it without "
            "--attention-backend kvplug"
        )
    if getattr(model.hf_text_config, "num_kv_shared_layers", 0):
        yield from _with_shared_caches(offer, vllm_config.cache_config)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        if policy.local is not None:
            yield (
                f"{policy.local} needs the hybrid KV cache manager, without which no layer "
                "returns what it does not see; drop --disable-hybrid-kv-cache-manager"
            )
        if not policy.uniform:
            yield (
                f"{policy} gives layers different budgets, which needs the hybrid KV cache "
                "manager; drop --disable-hybrid-kv-cache-manager"
            )
        evicts = policy.eviction or (policy.scored and policy.scored.appends and policy.scored)
        if evicts and _has_local_layers(model):
            yield (
                f"{evicts.name} beside the model's own windowed layers needs the hybrid "
                "KV cache manager; drop --disable-hybrid-kv-cache-manager"
            )


def _has_local_layers(model: Any) -> bool:
    """Whether some see a window of the context, or a chunk."""
    text = model.hf_text_config
    return any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _never_run(who: object, instead: str, vllm_config: Any, *besides: str) -> Iterator[str]:
    """Of what it was never run with, what is there."""
    model = vllm_config.model_config
    text = getattr(model, "hf_text_config", None)
    of_the_model = {
        "recurrent layers": getattr(model, "is_hybrid", False),
        "layers that see a window": model is not None and _has_local_layers(model),
        "layers that share a cache": getattr(text, "num_kv_shared_layers", 0),
        "images or audio in its prompts": getattr(model, "is_multimodal_model", False),
    }
    by_flag = {
        "a quantised cache": (
            "--kv-cache-dtype", vllm_config.cache_config.cache_dtype not in PLAIN,
        ),
        "speculative decoding": ("--speculative-config", vllm_config.speculative_config),
        "a KV connector": ("--kv-transfer-config", vllm_config.kv_transfer_config),
        "adapters": ("--enable-lora", vllm_config.lora_config),
        "tensor parallelism": (
            "--tensor-parallel-size", vllm_config.parallel_config.tensor_parallel_size > 1,
        ),
    }  # fmt: skip
    for what in besides:
        if what in of_the_model:
            if of_the_model[what]:
                yield f"the model has {what}, beside which {who} was never run; {instead}"
            continue
        flag, there = by_flag[what]
        if there:
            yield f"{what} beside {who} was never run; drop {flag}, or {instead}"


def _compiling(scored: ScoredEviction, vllm_config: Any) -> Iterator[str]:
    """What keeps a compiled context from those that come with it."""
    if vllm_config.cache_config.enable_prefix_caching is False:
        yield (
            f"{scored} keeps what it compiles in the prefix cache; drop "
            "--no-enable-prefix-caching, or use the policy 'dense'"
        )
    if getattr(vllm_config.model_config, "is_hybrid", False):
        yield (
            f"{scored} on a model with recurrent layers, whose states behind a compiled context "
            "would be taken for those behind the whole one; use keydiff(budget=1024)"
        )
    if vllm_config.model_config is not None and _has_local_layers(vllm_config.model_config):
        yield (
            f"{scored} needs layers that all see the whole context, and some of the model's see a "
            "window or a chunk; use keydiff(budget=1024)"
        )
    several = vllm_config.parallel_config.world_size > 1
    if several and not vllm_config.use_v2_model_runner:
        yield (
            f"{scored} on several ranks: Model Runner V1 does not tell them what a preempted "
            "request finds when it comes back; use one rank, or VLLM_USE_V2_MODEL_RUNNER=1"
        )


def _by_head(scored: HeadBudgets, vllm_config: Any) -> Iterator[str]:
    """What heads of a layer that keep different numbers of pages were never run with."""
    without = f"use {scored.base}"
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        yield (
            "tensor parallelism gives each rank some heads of a layer, whose shares "
            f"{scored.name} takes of them all together; drop --tensor-parallel-size, or {without}"
        )
    yield from _never_run(
        scored.name, without, vllm_config,
        *("recurrent layers", "layers that see a window", "layers that share a cache"),
        *("speculative decoding", "a quantised cache"),
    )  # fmt: skip


def _reusing(reuse: ChunkReuse, vllm_config: Any) -> Iterator[str]:
    """What keeps chunks from being found, moved or seen, and what was never run with them."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if cache.enable_prefix_caching is False:
        yield (
            f"{reuse} finds chunks in the prefix cache; drop --no-enable-prefix-caching, or use "
            "the policy 'dense'"
        )
    if model is not None:
        try:
            Rotation.of(model.hf_text_config, model.get_head_size())
        except ValueError as error:
            yield f"{reuse} moves keys: {error}; use the policy 'dense'"
    yield from _never_run(
        reuse, "use the policy 'dense'", vllm_config,
        *("recurrent layers", "layers that see a window", "layers that share a cache"),
        *("images or audio in its prompts", "a quantised cache", "speculative decoding"),
        *("a KV connector", "adapters"),
    )  # fmt: skip


def _placing(offer: Offer, vllm_config: Any) -> Iterator[str]:
    """What keeps a prompt's pages from the host, and what was never run with them there."""
    policy, cache = offer.settings.policy, vllm_config.cache_config
    assert policy.placement is not None
    without = f"leave {policy.placement.name} out"
    if cache.block_size is not None:
        try:
            Planner(offer.settings, cache.block_size)
        except ValueError as error:
            yield str(error)
    yield from _never_run(
        policy.placement.name, without, vllm_config,
        *("recurrent layers", "layers that see a window", "layers that share a cache"),
        *("images or audio in its prompts", "a quantised cache", "speculative decoding"),
        *("a KV connector", "adapters", "tensor parallelism"),
    )  # fmt: skip


def _with_format(format: PageFormat, offer: Offer, vllm_config: Any) -> Iterator[str]:
    """What writes or reads pages past the layers that code them, or was never run with them."""
    model, cache, policy = (
        vllm_config.model_config, vllm_config.cache_config, offer.settings.policy,
    )  # fmt: skip
    without = f"leave {format.name} out"
    if cache.cache_dtype not in PLAIN:
        yield f"{format} codes plain pages, got --kv-cache-dtype {cache.cache_dtype}; drop it"
    elif model is not None and cache.block_size is not None:
        try:
            layers = model.hf_text_config.num_hidden_layers
            format.layouts(layers, cache.block_size, model.get_head_size(), model.dtype)
        except ValueError as error:
            yield str(error)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            f"{format} keeps the page that a request is filling in a cache group of its own, "
            "which needs the hybrid KV cache manager; drop --disable-hybrid-kv-cache-manager"
        )
    yield from _never_run(
        format, without, vllm_config,
        *("recurrent layers", "layers that see a window", "layers that share a cache"),
        *("speculative decoding", "a KV connector"),
    )  # fmt: skip
    for what, has in (
        ("layers of different budgets", not policy.uniform),
        ("layers that see a window by the policy", policy.local is not None),
        ("sparse prefill", offer.generates),
    ):
        if has:
            yield f"{what} beside {format} was never run; drop it, or {without}"


def _of_planned_layers(vllm_config: Any) -> Iterator[str]:
    """What hides from a plan which requests a step has, or from a page its digest."""
    if vllm_config.parallel_config.use_ubatching:
        yield (
            "micro-batches split a step without saying whose rows are whose; drop --enable-dbo "
            "and --ubatch-size, or use the policy 'dense'"
        )
    yield from _with_quantised_cache(vllm_config)
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        yield "prompt embeddings hide the prompt's length; drop --enable-prompt-embeds"


PAGES = (
    ("per_token_head", "keeps a scale beside each token of a head"),
    ("nvfp4", "packs two numbers into a byte and keeps scales of their blocks"),
    ("turboquant", "keeps codes of rotated keys"),
    ("ultraquant", "keeps codes of four bits and their scales"),
)
"""How other caches' pages differ from keys and values alone, by a part of the dtype's name."""


def _with_quantised_cache(vllm_config: Any) -> Iterator[str]:
    """Where pages hold other numbers than a model computes in."""
    cache, quantised = vllm_config.cache_config, vllm_config.quant_config
    dtype = cache.cache_dtype
    instead = "use --kv-cache-dtype fp8 or auto, or the policy 'dense'"
    if dtype in PLAIN:
        return
    if numbers(dtype) is None:
        differs = (how for part, how in PAGES if part in dtype)
        how = next(differs, "is laid out for a kernel that kvplug does not plan")
        yield f"a page of the KV cache {dtype} {how}, and no policy can read it; {instead}"
        return
    if dtype == "fp8_e5m2" and current_platform.is_cuda():
        yield (
            "FlashAttention, which kvplug plans on a GPU, reads no KV cache fp8_e5m2; use "
            "--kv-cache-dtype fp8_e4m3"
        )
    if cache.kv_cache_dtype_skip_layers:
        yield (
            f"a page of the KV cache {dtype} has another size in the layers that "
            "--kv-cache-dtype-skip-layers names, and so have its digests; drop it, or use the "
            "policy 'dense'"
        )
    scheme = getattr(quantised, "kv_cache_scheme", None)
    if scheme is not None and scheme.get("strategy") == "attn_head":
        yield (
            f"the checkpoint has scales of the KV cache {dtype} for each head, and policies know "
            "one for a layer; use --kv-cache-dtype bfloat16, or the policy 'dense'"
        )


def _with_connector(offer: Offer, vllm_config: Any) -> Iterator[str]:
    """Where pages leave the pool and come back."""
    transfer, policy = vllm_config.kv_transfer_config, offer.settings.policy
    offloads = vllm_config.cache_config.kv_offloading_size is not None
    flag = "--kv-offloading-size" if offloads else "--kv-transfer-config"
    instead = f"drop {flag}, or use the policy 'dense'"
    tier = transfer.kv_connector_extra_config.get("spec_name", "CPUOffloadingSpec")
    if transfer.kv_connector != "OffloadingConnector":
        yield (
            f"the KV connector {transfer.kv_connector} is not known to move whole pages with "
            "their digests, nor to keep them from engines of another policy; use "
            f"OffloadingConnector, {instead}"
        )
    elif tier == "TieringOffloadingSpec":
        yield (
            f"the tiers of {tier} serve other engines too, which know neither this one's policy "
            f"nor its digests; use CPUOffloadingSpec, {instead}"
        )
    if offer.mixed:
        yield (
            "requests choose their policies, and a KV connector would serve one's answer to "
            f"another of another policy; {instead}"
        )
    elif policy.eviction is not None or policy.scored is not None:
        yield (
            f"a KV connector moves a request's pages in the order of its tokens, and {policy} "
            f"leaves holes among them or packs them; use twilight or quest, {instead}"
        )


DRAFTERS = ("ngram", "draft_model", "eagle")
"""Methods of speculative decoding that were seen to answer as without drafts."""


def _with_drafts(offer: Offer, vllm_config: Any) -> Iterator[str]:
    """Where several queries of a request are verified in a step."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method not in DRAFTERS:
        yield (
            f"speculative decoding by {speculative.method!r} with {offer.settings.policy} was "
            "never seen to answer as without drafts; use --speculative-config "
            '\'{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}\' or '
            '\'{"method": "draft_model", "model": "…", "num_speculative_tokens": 3}\', or the '
            "policy 'dense'"
        )
    elif vllm_config.scheduler_config.async_scheduling and (
        offer.settings.policy.plans or offer.mixed
    ):
        yield (
            f"speculative decoding with {offer.settings.policy} and asynchronous scheduling: a "
            "step is planned before it is known how many drafts of the last one were accepted; "
            "add --no-async-scheduling"
        )
    if getattr(vllm_config.model_config, "is_hybrid", False):
        yield (
            f"speculative decoding with {offer.settings.policy} on a model with recurrent layers, "
            "whose states rejected drafts change too: it was never seen to answer as without "
            "drafts; drop --speculative-config, or use the policy 'dense'"
        )
    if speculative.uses_draft_kv_cache():
        yield from _with_drafter(offer, vllm_config)


def _with_drafter(offer: Offer, vllm_config: Any) -> Iterator[str]:
    """Where a drafter has layers, and caches, of its own."""
    policy, speculative = offer.settings.policy, vllm_config.speculative_config
    layers = speculative.draft_model_config.get_num_layers(speculative.draft_parallel_config)
    parts = not policy.uniform or policy.local is not None
    if parts and layers > 1 and not vllm_config.use_v2_model_runner:
        yield (
            f"speculative decoding with {policy}: layers that keep different tokens make groups "
            f"of a few layers each, and the drafter has {layers}, which Model Runner V1 wants in "
            "one; use a drafter of one layer, n-grams, or Model Runner V2"
        )
    evicts = policy.eviction is not None or policy.scored is not None or offer.mixed
    if evicts and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "a drafter keeps what the model's layers let go of, which needs the hybrid KV cache "
            "manager; drop --disable-hybrid-kv-cache-manager, or use n-grams"
        )


def beside(settings: Settings, vllm_config: Any) -> Iterator[tuple[str, str]]:
    """What the engine keeps from the server's own settings, or from a request's: one of a few
    words, and the reason."""
    for reason in _beside_drafts(settings, vllm_config):
        yield "drafts", reason
    generate, size = settings.policy.generate, vllm_config.cache_config.block_size
    hybrid = getattr(vllm_config.model_config, "is_hybrid", False)  # gets its blocks later
    if generate is not None and size is not None and not hybrid:
        try:
            generate.check_page(size)
        except ValueError as error:
            yield "other pages", str(error)
    text = getattr(vllm_config.model_config, "hf_text_config", None)
    if getattr(text, "num_kv_shared_layers", 0):
        for reason in sharing.beside(settings):
            yield "shared caches", reason


def _beside_drafts(settings: Settings, vllm_config: Any) -> Iterator[str]:
    if vllm_config.speculative_config is None:
        return
    selector, scored = settings.policy.selector, settings.policy.scored
    if scored is not None and scored.compiles:
        yield (
            f"speculative decoding with {scored}, which was never run with drafts; drop "
            "--speculative-config"
        )
    elif scored is not None and scored.every is not None:
        yield (
            f"speculative decoding with {scored}: an answer would be packed with drafts that may "
            "be rejected; leave interval and chunk out, or drop --speculative-config"
        )
    if selector is None:
        return
    if selector.mass is not None and not isinstance(selector, TokenSelector):
        yield (
            f"speculative decoding with {selector}: the mass of the newest page, of which its "
            "digest speaks, would count drafts that a query does not see; leave top_p out, or use "
            "twilight, which weighs the pages before it"
        )


def _with_shared_caches(offer: Offer, cache_config: Any) -> Iterator[str]:
    """Where layers read another layer's cache."""
    yield from sharing.refusals(offer)
    if offer.settings.policy.local is not None:
        yield (
            f"{sharing.SHARED}, which would miss what {offer.settings.policy.local} lets go of; "
            "use a policy that selects, or the policy 'dense'"
        )
    if cache_config.kv_sharing_fast_prefill:
        yield (
            f"{sharing.SHARED}, and --kv-sharing-fast-prefill hides most of a prompt from them; "
            "drop it, or use the policy 'dense'"
        )


def unsupported(offer: Offer) -> Iterator[str]:
    """Policies of a kind that this adapter does not know how to carry out."""
    known = (
        SparsePrefill, PositionalEviction, ScoredEviction, LayerBudgets, LocalLayers, Selector,
        PageFormat, ChunkReuse, Placement,
    )  # fmt: skip
    own: list[type[Policy]] = [type(policy) for policy in offer.settings.policy]
    for cls in [*own, *map(policy_class, offer.allow)]:
        if not issubclass(cls, known) and cls.name != "dense":
            yield (
                f"{cls.name} is a policy of the stage {cls.stage.value!r} that the vLLM adapter "
                "cannot carry out; subclass PositionalPrefill, BlockSelector, PositionalEviction, "
                "ScoredEviction or Selector"
            )
