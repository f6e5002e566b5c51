"""What the extra configuration of vLLM's OffloadingConnector says to ``kvplug_vllm.host``, and
what would be wrong with it. Needs no engine: every front end reads it before anything loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from kvplug import PageFormat, parse
from kvplug_vllm import eight_bits

MODULE = "kvplug_vllm.host"
SPEC = "HostPages"
CONNECTOR = "OffloadingConnector"
FORMAT = "format"
PLAIN = "plain"
DEFAULT = "kivi(bits=8)"
HEADS = "kvplug_heads"
"""KV heads of a rank and channels of a head, which vLLM tells no specification."""
EXAMPLE = (
    f'{{"spec_name": "{SPEC}", "spec_module_path": "{MODULE}", "{FORMAT}": "{DEFAULT}", '
    '"cpu_bytes_to_use": 8589934592}'
)
KNOWN = (
    "spec_name", "spec_module_path", FORMAT, "cpu_bytes_to_use", "eviction_policy",
    "cache_policy_module_path", "store_threshold", "max_tracker_size", "offload_prompt_only",
    "blocks_per_chunk", "block_size", "self_describing_kv_events", HEADS,
)  # fmt: skip
"""vLLM's own, for memory of one tier, and ours."""


def chosen(vllm_config: Any) -> Mapping[str, Any] | None:
    """The extra configuration, where it names ours."""
    transfer = vllm_config.kv_transfer_config
    extra = {} if transfer is None else transfer.kv_connector_extra_config
    return extra if extra.get("spec_module_path") == MODULE else None


def format_of(extra: Mapping[str, Any]) -> PageFormat | None:
    """Of pages on the host; None for plain ones. Raises ValueError."""
    line = extra.get(FORMAT, DEFAULT)
    if line == PLAIN:
        return None
    instead = f'write "{FORMAT}": "{DEFAULT}", or "{PLAIN}" for pages as they are'
    try:
        policy = parse(line)
    except ValueError as error:
        raise ValueError(f"{SPEC}: {error}; {instead}") from None
    if policy.format is None or str(policy) != str(policy.format):
        raise ValueError(f"{SPEC}: {FORMAT} must be the format of a page, got {line!r}; {instead}")
    if policy.format.apart:
        raise ValueError(f"{SPEC}: pages of all layers are kept alike, got {line!r}; {instead}")
    return policy.format


def refusals(vllm_config: Any) -> Iterator[str]:
    """Why host memory cannot be served as it is asked for, each with what to do instead."""
    extra = chosen(vllm_config)
    if extra is None:
        return
    transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
    if extra.get("spec_name") != SPEC or transfer.kv_connector != CONNECTOR:
        yield (
            f"{MODULE} has the specification {SPEC} of {CONNECTOR}, got "
            f"{extra.get('spec_name')!r} of {transfer.kv_connector}; write "
            f'{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_both", '
            f'"kv_connector_extra_config": {EXAMPLE}}}'
        )
    for key in extra:
        if key not in KNOWN:
            near = get_close_matches(key, KNOWN, 1)
            did = f"; did you mean {near[0]!r}?" if near else f"; write, for example, {EXAMPLE}"
            yield f"{SPEC} has no option {key!r}{did}"
    size = extra.get("cpu_bytes_to_use")
    if isinstance(size, bool) or not isinstance(size, int | float) or size < 1:
        yield (
            f"{SPEC}: cpu_bytes_to_use must be a number of bytes, got {size!r}; write "
            '"cpu_bytes_to_use": 8589934592'
        )
    if vllm_config.parallel_config.world_size > 1:
        yield f"{SPEC} was never run on several ranks; use one, or vLLM's CPUOffloadingSpec"
    try:
        format = format_of(extra)
    except ValueError as error:
        yield str(error)
        return
    if format is not None and model is not None:
        yield from _coded(format, vllm_config)


def _coded(format: PageFormat, vllm_config: Any) -> Iterator[str]:
    """What has pages that are no plain keys and values of heads that are alike."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    text, plain = model.hf_text_config, f'write "{FORMAT}": "{PLAIN}"'
    for what, has in (
        ("latent attention (MLA)", getattr(model, "use_mla", False)),
        ("recurrent layers", getattr(model, "is_hybrid", False)),
        ("layers that share a cache", getattr(text, "num_kv_shared_layers", 0)),
        ("speculative decoding", vllm_config.speculative_config is not None),
        (f"a KV cache {cache.cache_dtype}", cache.cache_dtype not in eight_bits.PLAIN),
    ):
        if has:
            yield f"{SPEC}: {format} was never run beside {what}; {plain}"
    if cache.block_size is not None:
        try:
            format.layout(cache.block_size, model.get_head_size(), model.dtype)
        except ValueError as error:
            yield f"{SPEC}: {error}; or {plain}"


def tell(vllm_config: Any) -> None:
    """Write what a specification must know of the model where it will find it: of a scheduler's
    process as of a worker's."""
    extra = chosen(vllm_config)
    model = vllm_config.model_config
    if extra is None or model is None or format_of(extra) is None:
        return
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    told = {**extra, HEADS: [heads, model.get_head_size()]}
    vllm_config.kv_transfer_config.kv_connector_extra_config = told
