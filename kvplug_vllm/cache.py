"""Where a policy meets the pool: the cache spec of each layer, and which layers are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

from kvplug import LocalLayers, PageFormat, Placement, Planner, digest_bytes
from kvplug_vllm import compat
from kvplug_vllm.announce import say
from kvplug_vllm.appending import AppendingSpec
from kvplug_vllm.blending import BlendingSpec
from kvplug_vllm.compiling import CompilingSpec
from kvplug_vllm.open_pages import add_open_layers
from kvplug_vllm.packing import PackingSpec
from kvplug_vllm.placing import PlacingSpec
from kvplug_vllm.settings import Engine, EvictionSettings
from kvplug_vllm.streaming import EvictingSpec


@dataclass(frozen=True, kw_only=True)
class DigestedSpec(FullAttentionSpec):
    """Full attention whose pages end in digests. They are content, not padding: a connector moves
    what is not padding, and a page that comes back without its digest is chosen by another's."""

    digest_bytes: int = 0

    @property
    def unpadded_page_size_bytes(self) -> int:
        return super().unpadded_page_size_bytes + self.digest_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return replace(super().merge(specs), digest_bytes=specs[0].digest_bytes)


def customize_spec(spec: Any, layer_class: int | None = 0) -> Any:
    """The cache spec of one layer under the engine's policy; windowed layers stay stock, and so
    do those of a drafter.

    A selector with a digest grows the page by it; an eviction brings its own manager.
    layer_class: which of the layers' different budgets this one has (``layer_classes``), or which
    of their formats (``layer_formats``); None for a drafter's.
    """
    engine = Engine.current
    if layer_class is None:
        return spec
    if spec.block_size == 1:  # vLLM asks for the bytes of a token, before it sets the block's size
        return spec
    if engine is None or type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
        return spec
    offer, policy = engine.offer, engine.settings.policy
    digest = 0
    if offer.format is not None:
        format = list(dict.fromkeys(layer_formats(engine).values()))[layer_class]
        layout = format.layout(spec.block_size, spec.head_size, spec.dtype)
        spec = replace(spec, dtype=torch.uint8, state_content_bytes=layout.token_bytes)
    if offer.digest is not None:
        item = spec.dtype.itemsize
        pages, rows = offer.digest_rows(spec.block_size, item)
        digest = digest_bytes(pages * rows, spec.num_kv_heads, spec.head_size, item)
        spec = replace(spec, page_size_padded=spec.unpadded_page_size_bytes + digest)
    scored, evicting = policy.scored, EvictingSpec if policy.eviction is not None else None
    if scored is not None and scored.appends:
        evicting = CompilingSpec if scored.compiles else AppendingSpec
    if evicting is not None:
        spec = replace_as(
            spec,
            evicting,
            drop=("sliding_window", "attention_chunk_size", "non_causal"),
            settings=EvictionSettings.of(offer),
            in_flight=engine.vllm_config.max_in_flight_tokens,
        )
    elif policy.placement is not None:
        spec = placing_spec(spec, engine, policy.placement)
    elif scored is not None or offer.mixed:
        budget = layer_classes(engine)[layer_class] if not policy.uniform else None
        tokens = offer.max_tokens if budget is None else budget
        spec = replace_as(
            spec,
            PackingSpec,
            settings=EvictionSettings.of(offer),
            private_blocks=-(-tokens // spec.block_size),
            budget=budget,
            in_flight=engine.vllm_config.max_in_flight_tokens,
        )
    elif policy.reuse is not None:
        spec = replace_as(spec, BlendingSpec, settings=EvictionSettings.of(offer))
    elif digest:
        spec = replace_as(spec, DigestedSpec, digest_bytes=digest)
    return spec


def placing_spec(spec: Any, engine: Engine, placement: Placement) -> PlacingSpec:
    """Of layers whose prompts go to the host. Says what that takes, of the host and of the cache:
    vLLM refuses a cache that is too small without saying what asks for how much of it."""
    schedule = Planner(engine.settings, spec.block_size).schedule
    placing: PlacingSpec = replace_as(
        spec,
        PlacingSpec,
        settings=EvictionSettings.of(engine.offer),
        private_blocks=placement.pages,
        directory=schedule.directory,
        in_flight=engine.vllm_config.max_in_flight_tokens,
    )
    if engine.vllm_config.parallel_config.rank == 0:
        layers, page = len(planned_layers(engine.vllm_config)), spec.unpadded_page_size_bytes
        rows, MiB = schedule.directory * schedule.digests, 1 << 20
        say(
            engine,
            f"kvplug: {placement} takes {layers * rows * page / MiB:,.0f} MiB of host memory for "
            f"prompts of {rows * spec.block_size:,} tokens, and for what their pages say "
            f"{layers * schedule.directory * spec.page_size_bytes / MiB:,.0f} MiB of the cache, "
            f"{schedule.directory:,} blocks; where those are too many, write a smaller room.",
        )
    return placing


def layer_classes(engine: Engine) -> list[int]:
    """The different budgets of the planned layers, first to last: a cache group for each."""
    return sorted(set(layer_budgets(engine).values()), reverse=True)


def layer_budgets(engine: Engine) -> dict[str, int]:
    """Tokens that each planned layer keeps of a prompt, by the layer's name."""
    planned = planned_layers(engine.vllm_config)
    budgets = engine.settings.policy.layer_budgets(len(planned))
    return dict(zip(planned, budgets, strict=True))


def layer_formats(engine: Engine) -> dict[str, PageFormat]:
    """What the pages of each layer are kept in, by the layer's name; first to last."""
    format = engine.offer.format
    assert format is not None
    names = attention_layers(engine.vllm_config)
    return {name: format.in_layer(compat.layer_index(name)) for name in names}


def planned_layers(vllm_config: Any) -> list[str]:
    """Names of the attention layers that the policy plans, first to last."""
    layers = vllm_config.compilation_config.static_forward_context
    planned = [
        name
        for name, layer in layers.items()
        if getattr(getattr(layer, "impl", None), "planned", False)
    ]
    return sorted(planned, key=compat.layer_index)


def attention_layers(vllm_config: Any) -> list[str]:
    """Names of the model's layers that attend to a request's own tokens, first to last."""
    layers = vllm_config.compilation_config.static_forward_context
    found = [
        name
        for name, layer in layers.items()
        if hasattr(getattr(layer, "impl", None), "planned")
        and layer.impl.attn_type == AttentionType.DECODER
        and not layer.impl.drafts
    ]
    return sorted(found, key=compat.layer_index)


def split_layers(engine: Engine) -> None:
    """Once all layers are there, and before vLLM asks for their specs: what tells them apart.
    Raises ValueError where no layer is left that the policy could plan."""
    compat.hear_with_steps()
    set_drafter_apart(engine)
    leave_chunks(engine.vllm_config)
    if engine.settings.policy.local is not None:
        make_local(engine, engine.settings.policy.local)
    if engine.settings.policy.plans and not planned_layers(engine.vllm_config):
        raise ValueError(
            f"kvplug: every layer of the model sees a window or a chunk, so that "
            f"{engine.settings.policy} has nothing to plan; leave some layers out of local, or "
            "use the policy 'dense'"
        )
    _check_alike(engine)
    if engine.offer.format is not None:
        code_layers(engine)
    if engine.settings.policy.placement is not None:
        context = engine.vllm_config.compilation_config.static_forward_context
        for name in planned_layers(engine.vllm_config):
            compat.set_backend(context[name], "placed")
    split_budgets(engine)


def code_layers(engine: Engine) -> None:
    """Layers that keep their pages in a format write and read them, and have open pages beside."""
    context = engine.vllm_config.compilation_config.static_forward_context
    formats = layer_formats(engine)
    kinds = list(dict.fromkeys(formats.values()))
    for name, format in formats.items():
        compat.set_backend(context[name], "coded")
        compat.set_layer_class(context[name], kinds.index(format))
    add_open_layers(list(formats), engine.vllm_config)


def _check_alike(engine: Engine) -> None:
    """Raises ValueError where layers of another kind keep blocks behind a compiled context, which
    vLLM would take for those behind the whole one."""
    scored = engine.settings.policy.scored
    if scored is None or not scored.compiles:
        return
    planned, all_ = planned_layers(engine.vllm_config), attention_layers(engine.vllm_config)
    if others := sorted(set(all_) - set(planned)):
        raise ValueError(
            f"kvplug: {scored} needs layers that all see the whole context, and {others[0]} sees "
            "a window; use keydiff(budget=1024)"
        )


def set_drafter_apart(engine: Engine) -> None:
    """Once the model's layers are known, those of its drafter keep the cache that vLLM gives them:
    a drafter that loses what it read drafts worse, and saves what is little beside the model's."""
    context = engine.vllm_config.compilation_config.static_forward_context
    if not engine.layers:
        engine.layers.update(context)
        compat.give_draft_models_their_blocks()
    for name in context.keys() - engine.layers:
        if hasattr(getattr(context[name], "impl", None), "planned"):
            compat.set_layer_class(context[name], None)


def leave_chunks(vllm_config: Any) -> None:
    """Leave layers that attend within chunks of the context to vLLM, whose builder makes each
    chunk a sequence of its own: what an implementation is told does not show which it is."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if compat.attention_chunk(layer) is not None and hasattr(layer.impl, "planned"):
            layer.impl.leave()


def make_local(engine: Engine, local: LocalLayers) -> None:
    """Give the layers that a policy names its window; the engine then treats them as those that
    have one by the model's configuration. Raises ValueError for layers that cannot have it."""
    context = engine.vllm_config.compilation_config.static_forward_context
    names = attention_layers(engine.vllm_config)
    impls = [context[name].impl for name in names]
    chosen = local.local_layers(len(names))
    own = [number for number in chosen if impls[number].planned or impls[number].local]
    if len(own) < len(chosen):
        see = sorted({compat.sees(context[names[n]]) for n in chosen if n not in own})
        instead = f'write layers="{_listed(own)}"' if own else "drop local"
        raise ValueError(
            f"kvplug: {local} names layers that see {' or '.join(map(str, see))} tokens by the "
            f"model's configuration; {instead}"
        )
    read = {impl.kv_sharing_target_layer_name for impl in impls}
    sharing = [n for n in chosen if names[n] in read or impls[n].kv_sharing_target_layer_name]
    if sharing:
        raise ValueError(
            f"kvplug: layers {_listed(sharing)} of the model share a cache with others, which "
            f"would miss what {local} lets go of; name other layers"
        )
    for number in chosen:
        if not impls[number].local:
            compat.set_window(context[names[number]], local.window)
            impls[number].become_local()
    if engine.vllm_config.parallel_config.rank == 0:
        say(
            engine,
            f"kvplug: attention layers {_listed(chosen)} of {len(names)} see the last "
            f"{local.window:,} tokens and return their other blocks.",
        )


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def split_budgets(engine: Engine) -> None:
    """Give layers of different budgets backends of their own: vLLM asks those for the spec."""
    if engine.settings.policy.uniform:
        return
    context = engine.vllm_config.compilation_config.static_forward_context
    classes = layer_classes(engine)
    for name, budget in layer_budgets(engine).items():
        compat.set_layer_class(context[name], classes.index(budget))
