"""Everything that leans on what SGLang does not promise: versions, hooks, private calls.

Written for SGLang 0.5.23. A hook that did not take would be a server that runs without the policy
it was asked for, so every one is looked up again once it is placed (``verify``) and used on the
idle pools (``doctor.canary``); a server that fails either stops.
"""

from __future__ import annotations

import functools
import inspect
import logging
import pkgutil
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvplug_sglang.settings import NAME, Engine

FIRST, END = (0, 5, 23), (0, 6)
"""SGLang versions [first, end) that kvplug was tested with."""

BY_NAME = (
    "SGLang 0.5.23 serves this model over attention backends that it knows by name, and {}, which "
    "kvplug wraps here, is none of them"
)
"""Of models with attention sinks (gpt-oss), Gemma 4 and EXAONE 4; asserted in ``model_hook``."""
WITHOUT_FLASH = (
    "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration",
)  # fmt: skip
"""Architectures that SGLang asserts not to serve over FlashAttention 3, the card's or not."""

MAMBA_2 = ("FalconH1Config", "GraniteMoeHybridConfig", "NemotronHConfig")
"""Configurations of models whose recurrent layers are ``MambaMixer2``."""

log = logging.getLogger("sglang.kvplug")


def supported() -> bool:
    """Whether this SGLang is one that kvplug knows; beside another it must do nothing at all."""
    return FIRST <= _version() < END


def _version() -> tuple[int, ...]:
    import sglang

    release = re.match(r"\d+(\.\d+)*", sglang.__version__)
    return tuple(map(int, release[0].split("."))) if release else ()


def warn_unsupported() -> None:
    """Say why ``--attention-backend kvplug`` is an unknown name here."""
    import sglang

    log.warning(
        "kvplug knows SGLang 0.5.23, this is %s: it stays inactive. Install sglang==0.5.23, or a "
        "kvplug that knows this one.",
        sglang.__version__,
    )


@dataclass(frozen=True)
class Hook:
    """One function of SGLang's that ours stands before, behind or around."""

    target: str
    kind: str
    """before, after or around, as ``sglang.srt.plugins.hook_registry.HookType`` means them."""
    ours: Callable[..., Any]
    parameters: tuple[str, ...]
    """Names that the function's parameters begin with: what ours was written against."""


def register(hooks: tuple[Hook, ...], build: Callable[[Any], Any]) -> None:
    """The backend's name, what builds it and the flag, in every process; the rest waits until
    kvplug is selected."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME in choices.ATTENTION_BACKEND_CHOICES:
        return
    for hook in hooks:
        _registry().register(hook.target, hook.ours, _kind(hook))
    register_attention_backend(NAME)(build)
    # Last: SGLang swallows what a plugin raises, and then this name must be unknown.
    choices.add_attention_backend_choices([NAME])


def place(hooks: tuple[Hook, ...]) -> None:
    """Wrap SGLang's functions in this process, now. Twice is once."""
    for hook in hooks:
        if not _placed(hook, _lookup(hook)[1]):
            _registry()._apply_target(hook.target, [(_kind(hook), _while_serving(hook), None)])


def _while_serving(hook: Hook) -> Callable[..., Any]:
    """Ours, which steps aside in a process that went on to serve without kvplug."""

    @functools.wraps(hook.ours)
    def ours(*args: Any, **kwargs: Any) -> Any:
        if Engine.current is not None:
            return hook.ours(*args, **kwargs)
        return args[0](*args[1:], **kwargs) if hook.kind == "around" else None

    return ours


def verify(hooks: tuple[Hook, ...]) -> None:
    """Raises RuntimeError that names the hook unless each one is in place and fits."""
    for hook in hooks:
        _, function = _lookup(hook)
        if not _placed(hook, function):
            raise RuntimeError(broken(hook.target, "kvplug's hook on it did not take"))
        names = tuple(inspect.signature(_innermost(function)).parameters)
        if names[: len(hook.parameters)] != hook.parameters:
            raise RuntimeError(
                broken(hook.target, f"it takes {names}, kvplug wants {hook.parameters}")
            )


def _lookup(hook: Hook) -> tuple[Any, Callable[..., Any]]:
    owner, _, name = hook.target.rpartition(".")
    try:
        found = pkgutil.resolve_name(owner)
        function = inspect.getattr_static(found, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(broken(hook.target, f"it is gone ({error})")) from None
    return found, getattr(function, "__func__", function)


def broken(target: str, why: str) -> str:
    """What to tell a user whose SGLang is not the one that a hook was written for."""
    import sglang

    return (
        f"kvplug cannot serve with SGLang {sglang.__version__}: {target}: {why}. Install "
        "sglang==0.5.23, or start without --attention-backend kvplug"
    )


def _chain(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _innermost(function: Any) -> Any:
    return list(_chain(function))[-1]


def _placed(hook: Hook, function: Any) -> bool:
    """Whether one of SGLang's wrappers around a function calls ours."""
    cells = (
        cell for each in _chain(function) for cell in getattr(each, "__closure__", None) or ()
    )
    called = [cell.cell_contents for cell in cells]
    return any(
        each is hook.ours or getattr(each, "__wrapped__", None) is hook.ours for each in called
    )


def _registry() -> Any:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return HookRegistry


def _kind(hook: Hook) -> Any:
    from sglang.srt.plugins.hook_registry import HookType

    return HookType(hook.kind)


def selected(server_args: Any) -> bool:
    """Whether a server was asked for kvplug, for prefill, decode or both."""
    from sglang.srt.arg_groups.model_override_base import attention_backends_of, resolved_view

    return NAME in attention_backends_of(resolved_view(server_args))


def first_kv_head(layer: Any) -> int:
    """Number of this rank's first KV head of a layer, counted through the whole model."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    ranks, rank = parallel.attn_tp_size, parallel.attn_tp_rank
    return (layer.layer_id * ranks + rank) * layer.tp_k_head_num


@contextmanager
def named(server_args: Any, backend: str) -> Iterator[None]:
    """For a while ``backend`` stands where kvplug was asked for."""
    fields = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    ours = [field for field in fields if getattr(view(server_args), field) == NAME]
    declare(server_args, dict.fromkeys(ours, backend))
    yield
    declare(server_args, dict.fromkeys(ours, NAME))


def declare(server_args: Any, decisions: dict[str, Any]) -> None:
    """Decide what the user left open, in the way SGLang's own handlers do."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    if decisions:
        declare_resolution(server_args, NAME, **decisions)


def page_size(server_args: Any) -> int:
    """As SGLang resolved it."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return int(resolved_view(server_args).page_size)


def rank() -> int:
    """Of this process, over all that serve the model."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def verify_bindings(scheduler: Any) -> None:
    """That the scheduler at hand goes through what was hooked, and counts as the hooks suppose.
    Raises RuntimeError.
    """
    from sglang.srt.managers import schedule_batch
    from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_tokens
    from sglang.srt.mem_cache import allocation
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    if schedule_batch.alloc_for_extend is not allocation.alloc_for_extend:
        raise RuntimeError(broken("allocation.alloc_for_extend", "its caller has another one"))
    tree = type(scheduler.tree_cache)
    for name in ("checkpoint", "on_release", "swa_reprefill_tail_tokens", "free_kv_row"):
        if getattr(tree, name) is not getattr(UnifiedRadixCache, name):
            raise RuntimeError(broken(f"UnifiedRadixCache.{name}", f"{tree} has its own"))
    attends = planned_backend(scheduler.tp_worker.model_runner.attn_backend)
    if not hasattr(attends, "steps"):
        raise RuntimeError(broken("attn_backend_wrapper", f"{type(attends)} attends in its place"))
    record = schedule_batch.ReqKvInfo(kv_allocated_len=100, cache_protected_len=60)
    if kv_private_tokens(record, 1) != 40:
        raise RuntimeError(broken("kv_private_tokens", "it is not allocated less protected"))


def view(server_args: Any) -> Any:
    """The arguments as far as SGLang has resolved them."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(server_args)


def resolved(server_args: Any) -> tuple[Any, Any]:
    """The arguments as far as SGLang has resolved them, and the model's configuration."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    return resolved_view(server_args), model_config_of(server_args)


def attention_backends(view: Any) -> tuple[str, str]:
    """For prefill and for decode."""
    from sglang.srt.arg_groups.model_override_base import attention_backends_of

    prefill, decode = attention_backends_of(view)
    return prefill, decode


def default_attention(server_args: Any) -> str:
    """The attention backend that SGLang would have chosen for the card and model."""
    from sglang.srt.arg_groups.model_override_base import (
        get_default_attn_backend,
        model_config_of,
        resolved_view,
    )

    model = model_config_of(server_args)
    if not set(WITHOUT_FLASH).isdisjoint(model.hf_config.architectures or ()):
        return "triton"
    return str(get_default_attn_backend(resolved_view(server_args), uses_mla(model), model))


def cache_dtype(view: Any, model: Any) -> torch.dtype:
    """Of the pool."""
    model_dtype: torch.dtype = model.dtype
    known = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
    return known.get(view.kv_cache_dtype, model_dtype)


def decode_batch(view: Any) -> int:
    """Requests of the largest decode graph; 0 where there is none."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    decode = view.cuda_graph_config.decode
    return 0 if decode.backend == Backend.DISABLED else int(decode.max_bs or 0)


def prefill_tokens(view: Any, model: Any) -> int:
    """Queries of prompts that a step has at most; without chunks a whole prompt's."""
    chunk = view.chunked_prefill_size or 0
    return int(chunk if chunk > 0 else max(view.max_prefill_tokens, model.context_len))


def charged_answer(adder: Any, req: Any, extend_input_len: int | None = None) -> int:
    """Tokens of an answer that a ``PrefillAdder`` adds to what it asks
    ``_request_slot_reserve_for_req`` for."""
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    answer = req.sampling_params.max_new_tokens
    if extend_input_len is None:
        if req.sampling_params.ignore_eos and getattr(adder.tree_cache, "disable", True):
            return 0  # it simulates all ends, answer by answer
        answer -= len(req.output_ids)
    elif extend_input_len < len(req.full_untruncated_fill_ids) - req.prefix_len:
        return 0  # of a chunk that is not the prompt's last
    return int(min(max(answer, 0), CLIP_MAX_NEW_TOKENS))


def captures_prefill(view: Any) -> bool:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    return bool(view.cuda_graph_config.prefill.backend != Backend.DISABLED)


def glues_metadata() -> bool:
    """Whether SGLang captures what plans a step together with the step."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get())


def graphs_of_decode_alone(view: Any) -> dict[str, Any]:
    """Prefill is planned on the host, in shapes that differ from step to step."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    config = with_phase(view.cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED)
    return {"cuda_graph_config": config}


def graphs(view: Any) -> dict[str, Any]:
    """Of decode alone, and none on a CPU."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    decided = graphs_of_decode_alone(view)
    if view.device == "cpu":
        config = with_phase(decided["cuda_graph_config"], Phase.DECODE, backend=Backend.DISABLED)
        return {"cuda_graph_config": config}
    return decided


def breaks_decode_graphs(view: Any) -> bool:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    return bool(view.cuda_graph_config.decode.backend == Backend.BREAKABLE)


def uses_mla(model: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch is AttentionArch.MLA


def cache_scales(layer: Any) -> tuple[float, float]:
    """What the numbers of a quantised cache stand for: a key is its number times the first, a
    value its times the second. Queries are not scaled."""
    return layer.k_scale_float or 1.0, layer.v_scale_float or 1.0


def logit_scale(layer: Any) -> float:
    """What q . k is multiplied by, of keys as they lie in the cache."""
    return float(layer.scaling * cache_scales(layer)[0])


def window(layer: Any) -> int:
    """Tokens that a query of a layer sees, its own included; 0 where it sees all."""
    before = layer.sliding_window_size
    return 0 if before is None or before < 0 else int(before) + 1


def attending(runner: Any) -> list[Any]:
    """The layers of a runner's model that attend, in order. One that reads another's cache has
    the number of its owner."""
    from sglang.srt.layers.radix_attention import RadixAttention

    model = getattr(runner, "model", None)  # SGLang's test kit runs layers without one
    layers = [] if model is None else model.modules()
    return [each for each in layers if isinstance(each, RadixAttention)]


def pool_layers(pool: Any) -> list[int]:
    """The numbers of the layers that a pool has caches of."""
    beside_recurrent = getattr(pool, "full_attention_layer_id_mapping", None)
    return list(beside_recurrent or range(pool.start_layer, pool.start_layer + pool.layer_num))


def windows(runner: Any) -> dict[int, int]:
    """Of the layers of a runner's model that see no more, by their number."""
    found = {each.layer_id: window(each) for each in attending(runner)}
    return {layer: seen for layer, seen in found.items() if seen}


def planned_layers(runner: Any) -> list[int]:
    """Of the layers that attend to all that is before them, in order: each as often as it is read
    in a step; where a runner has no model that shows them (SGLang's attention kit), its pool's."""
    windowed, found = windows(runner), [each.layer_id for each in attending(runner)]
    if not found:
        return pool_layers(runner.token_to_kv_pool)
    return [layer for layer in found if layer not in windowed]


def planned_backend(backend: Any) -> Any:
    """Ours in a runner's, which beside recurrent layers is a part of it."""
    return getattr(backend, "full_attn_backend", backend)


def declared_window(model: Any) -> int:
    """Tokens that a model's windowed layers will see, by its configuration; 0 where it names no
    such layer."""
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    return int(model.sliding_window_size or 0) if "sliding_attention" in kinds else 0


def windows_apart(model: Any) -> bool:
    """Whether the tokens of windowed layers lie in a pool of their own."""
    return bool(model.is_hybrid_swa)


def windows_of_other_heads(model: Any) -> bool:
    """Whether windowed layers keep heads of another number or size than the others (Gemma 4)."""
    if not windows_apart(model) and not declared_window(model):
        return False
    text, heads = model.hf_text_config, model.get_total_num_kv_heads()
    other = getattr(text, "swa_num_key_value_heads", None) or heads
    return bool(model.swa_head_dim != model.head_dim or other != heads)


def masks_images(model: Any) -> bool:
    """Whether a prompt's images see themselves both ways, by a mask that is made for the stock
    kernel (``gemma3_mm.prepare_attn_masks``)."""
    return "Gemma3ForConditionalGeneration" in (model.hf_config.architectures or ())


def attends_in_chunks(model: Any) -> bool:
    return bool(model.attention_chunk_size)


def attention_sinks(model: Any) -> bool:
    """Whether each query head has a learned logit beside those of the tokens."""
    return bool(model.has_attention_sinks)


def shares_caches(model: Any) -> bool:
    """Whether some layers read another layer's cache."""
    return bool(getattr(model.hf_text_config, "num_kv_shared_layers", 0))


def recurrent(model: Any) -> bool:
    """Whether some layers keep a state of a request."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model) is not None


def unknown_recurrence(model: Any) -> bool:
    """Whether some layers keep a state of a request, and not as Mamba-2 or a gated delta net."""
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config, mambaish_config

    config = mambaish_config(model)
    mamba_2 = type(config).__name__ in MAMBA_2
    return config is not None and not mamba_2 and hybrid_gdn_config(model) is None


def caches_last_states_alone(view: Any) -> bool:
    """Whether the prefix cache has a recurrent state where a request ended and nowhere else."""
    return bool(view.uses_mamba_radix_cache and view.mamba_radix_cache_strategy == "no_buffer")


def special_layers(model: Any) -> Iterator[str]:
    from sglang.srt.configs.model_config import is_minimax_sparse
    from sglang.srt.layers.attention.qsa.config import is_qwen_qsa

    if is_minimax_sparse(model.hf_config) or is_qwen_qsa(model.hf_config):
        yield "the model selects its own pages, with an index that was trained for it"
    if model.is_encoder_decoder:
        yield "the model has an encoder, whose keys stand before the prompt's"
    if unknown_recurrence(model):
        yield "the model has recurrent layers that are neither Mamba-2 nor gated delta nets"
    if not model.is_generation:
        yield "the model does not generate"


def keeps_prompts(tree: Any) -> bool:
    """Whether a prompt's whole pages stay in a tree once they are computed. With an extra buffer
    of recurrent states it keeps what comes before the last one that was tracked."""
    return bool(tree.supports_prefix_sharing() and not tree.enable_mamba_extra_buffer)


@dataclass(frozen=True)
class Match:
    """What a tree has of some tokens."""

    tokens: int
    """Of whole pages."""
    node: Any
    """Where they end."""


def match(tree: Any, tokens: array[int], extra_key: str | None, salt: str | None) -> Match:
    """The longest prefix of tokens that is cached under these names."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(tokens, extra_key, cache_salt=salt)
    found = tree.match_prefix(MatchPrefixParams(key=key))
    return Match(int(found.device_prefix_len), found.last_device_node)


def matched_slots(tree: Any, match: Match) -> torch.Tensor:
    """[tokens] int64, on the device."""
    slots: torch.Tensor = tree.path_device_indices(match.node)
    assert len(slots) == match.tokens
    return slots


def publish(
    tree: Any, tokens: array[int], slots: torch.Tensor, known: int, extra_key: str | None,
    salt: str | None,
) -> None:  # fmt: skip
    """Give a tree whole pages that nobody holds, under a name. known: tokens of which it has the
    slots already."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(tokens, extra_key, cache_salt=salt)
    result = tree.insert(InsertParams(key=key, value=slots, prev_prefix_len=known))
    assert result.prefix_len == known, "somebody else published the same pages"


def allocate(tree: Any, tokens: int, keep: Sequence[Match]) -> torch.Tensor | None:
    """Slots of whole pages, of what is free or evictable but for some matches; None where there
    are not so many."""
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    locks = [tree.lock(each.node) for each in keep]
    evict_from_tree_cache(tree, tokens)
    slots: torch.Tensor | None = tree.token_to_kv_pool_allocator.alloc(tokens)
    for lock in locks:
        tree.unlock(lock)
    return slots


def reorder(req: Any, tokens: array[int], salt: str | None) -> None:
    """Let the prompt of a request that holds nothing lie so, under this name."""
    assert not req.kv.holds_kv
    assert len(tokens) == len(req.origin_input_ids)
    req.origin_input_ids, req.cache_salt = tokens, salt
    req.full_untruncated_fill_ids = array("q")  # made anew when it is asked for


def head_major_cache() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_USE_HND_KVCACHE.get())
