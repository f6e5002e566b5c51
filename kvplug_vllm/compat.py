"""Everything that leans on what vLLM does not promise, one function each.

Written for vLLM 0.32 and 0.33 (``register_backend`` takes names of one's own from 0.32 on). Each
function says which version ends it; ``tests/vllm/test_contract.py`` fails loudly when upstream
moves, and ``tools/vllm_drift.py`` says beforehand what a new version would move.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvplug_kernels.fp8 import widened

FIRST, END = (0, 32), (0, 34)
"""vLLM versions [first, end) that kvplug was tested with."""


def supported() -> bool:
    """Whether this vLLM is one that kvplug knows; beside another it must do nothing at all."""
    import vllm

    major, minor = vllm.__version__.split(".")[:2]
    return FIRST <= (int(major), int(minor)) < END


def warn_unsupported() -> None:
    """Say why ``--attention-backend kvplug`` is an unknown name here."""
    import vllm
    from vllm.logger import init_logger

    init_logger("vllm.kvplug").warning_once(
        "kvplug knows vLLM 0.32 and 0.33, this is %s: it stays inactive. Install "
        "'vllm>=0.32,<0.34', or a kvplug that knows this one.",
        vllm.__version__,
    )


def logits_processors() -> tuple[type, ...]:
    """The interfaces of Model Runner V1 and V2, as far as this vLLM has them.

    vLLM loads the router for every user, so a version without V2 must not fail here.
    """
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor

    if not supported():
        return (LogitsProcessor,)
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Second

    return LogitsProcessor, Second


def honour_selection() -> None:
    """Make a platform that ignores ``--attention-backend kvplug`` either honour it or refuse.

    Needed where our platform plugin is not active: with VLLM_TARGET_DEVICE=cpu, which bypasses
    platform plugins, or beside another out-of-tree platform. Until
    CpuPlatform.get_attn_backend_cls honours the selected backend (0.32 logs "Cannot use ..." and
    goes on without it).
    """
    from vllm.platforms import current_platform

    cls = type(current_platform)
    if current_platform.is_cuda() or getattr(cls.get_attn_backend_cls, "_kvplug", False):
        return
    stock = cls.get_attn_backend_cls.__func__  # type: ignore[attr-defined]

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is None or selected_backend.name != "KVPLUG":
            return stock(cls, selected_backend, attn_selector_config, num_heads)
        if not cls._enum.name == "CPU":
            raise ValueError(
                f"kvplug runs on CUDA and on the CPU, not on the platform {cls.__name__}; "
                "start without --attention-backend kvplug"
            )
        return select_backend(selected_backend, attn_selector_config)

    get_attn_backend_cls._kvplug = True  # type: ignore[attr-defined]
    cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def announce_configurations(tell: Callable[[Any], None]) -> None:
    """Call ``tell`` with each configuration that vLLM makes, once it is complete.

    The process that admits requests builds no attention layer, and a logits processor's
    ``validate_params`` is given no configuration. Until it is (0.32 calls it on the class).
    """
    from vllm.config import VllmConfig

    stock = VllmConfig.__post_init__
    if getattr(stock, "_kvplug", False):
        return

    @functools.wraps(stock)
    def __post_init__(self: Any) -> None:
        stock(self)
        tell(self)

    __post_init__._kvplug = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = __post_init__


def announce_sessions(tell: Callable[[Any], None]) -> None:
    """Call ``tell`` with the configuration when a request comes whose prompt will grow turn by
    turn (an input stream of ``AsyncLLM.generate``).

    ``validate_params`` is not told. Until it is.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    stock = InputProcessor.process_inputs
    if getattr(stock, "_kvplug", False):
        return

    @functools.wraps(stock)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("resumable"):
            tell(self.vllm_config)
        return stock(self, *args, **kwargs)

    process_inputs._kvplug = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def announce_lookups(tell: Callable[[Sequence[Any], Any], None]) -> None:
    """Call ``tell`` with the managers and the request before its cached prefix is looked up.

    ``find_longest_cache_hit`` is a class method that is given hashes alone, and what a request
    may hit depends on the policy it asked for. Until it is given the request.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    stock = KVCacheManager.get_computed_blocks

    @functools.wraps(stock)
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        tell(self.coordinator.single_type_managers, request)
        return stock(self, request, *args, **kwargs)

    KVCacheManager.get_computed_blocks = get_computed_blocks


def select_backend(selected: Any, selector_config: Any) -> str:
    """What CudaPlatform does for a backend that was asked for, for platforms that do not."""
    reasons = selected.get_class().validate_configuration(
        device_capability=None, **selector_config._asdict()
    )
    if reasons:
        raise ValueError(f"kvplug cannot serve this model: {'; '.join(reasons)}")
    return selected.get_path()


def ensure_builtin_specs() -> None:
    """Register vLLM's own KV cache specs before ours.

    ``KVCacheSpecRegistry`` registers them lazily and only into an empty list, so a plugin that
    comes first leaves vLLM without any. Until the registry tracks its own registration.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def name_block(pool: Any, name: bytes, group: int, block: Any, tokens: int) -> None:
    """Let a prefix cache's look-ups find a block of a request that lives on by a name of our own.

    tokens: of the prefix that it belongs to. Until BlockPool offers it in public.
    """
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    named = make_block_hash_with_group_id(BlockHash(name), group)
    pool._insert_block_hash(named, block, num_tokens=tokens)


def tell_with_steps() -> None:
    """Let a scheduler of Model Runner V1 say with each step what the parameters of the requests
    that come back in it say by now, and in which order their prompts lie: workers have copies of
    both (``hear_with_steps``). V2 sends those requests anew, V1 once.

    Until V1 is removed (0.32 calls it deprecated).
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    stock = Scheduler.schedule
    if getattr(stock, "_kvplug", False):
        return

    @functools.wraps(stock)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = stock(self, *args, **kwargs)
        back = step.scheduled_cached_reqs.resumed_req_ids
        if back and not self.use_v2_model_runner:
            requests = {name: self.requests[name] for name in back}
            step.kvplug = {
                name: (each.sampling_params.extra_args, each.prompt_token_ids)
                for name, each in requests.items()
                if each.sampling_params is not None
            }
        return step

    schedule._kvplug = True  # type: ignore[attr-defined]
    Scheduler.schedule = schedule


def hear_with_steps() -> None:
    """The worker's part of ``tell_with_steps``."""
    module: Any = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if module is None:  # V2
        return
    stock = module.GPUModelRunner._update_states
    if getattr(stock, "_kvplug", False):
        return

    @functools.wraps(stock)
    def _update_states(self: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
        for name, (extra_args, prompt) in getattr(step, "kvplug", {}).items():
            state = self.requests[name]
            state.sampling_params.extra_args, state.prompt_token_ids = extra_args, prompt
        return stock(self, step, *args, **kwargs)

    _update_states._kvplug = True  # type: ignore[attr-defined]
    module.GPUModelRunner._update_states = _update_states


def names_alone(request: Any, tokens: Sequence[int]) -> list[bytes]:
    """What a prefix cache calls the whole blocks of a prompt of these tokens alone, sent as a
    request was: with its salt and its adapter. Before the request was reordered."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    alone = Request(
        request.request_id,
        list(tokens),
        SamplingParams(max_tokens=1),
        None,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        block_hasher=request._block_hasher,
    )
    return list(alone.block_hashes)


def reorder(request: Any, prompt: list[int], salt: str | None, names: list[bytes]) -> None:
    """Let a request that no worker serves have its prompt's tokens in another order, and its
    blocks names that go with it: those, and behind them what follows from the last, or the salt.

    Until a request may name its blocks itself.
    """
    request.prompt_token_ids = prompt
    request._all_token_ids[: len(prompt)] = prompt
    request.cache_salt, request.block_hashes = salt, names
    request.update_block_hashes()


def show_rows_beside_drafts(seen_by: Callable[..., Any]) -> None:
    """Let Model Runner V1 show its rows to ``seen_by(vllm_config, device, is_pin_memory)``, a
    logits processor, also where it speculates.

    Until its ``build_logitsprocs`` loads the entry points beside a speculative_config (0.33 loads
    none there; V2 loads them all).
    """
    from vllm.v1.sample import logits_processor as package

    stock = package.build_logitsprocs
    if getattr(stock, "_kvplug", False):
        return

    @functools.wraps(stock)
    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, *args: Any, **kwargs: Any
    ) -> Any:
        built = stock(vllm_config, device, is_pin_memory, *args, **kwargs)
        if vllm_config.speculative_config is None:
            return built
        return type(built)([*built.all, seen_by(vllm_config, device, is_pin_memory)])

    build_logitsprocs._kvplug = True  # type: ignore[attr-defined]
    package.build_logitsprocs = build_logitsprocs
    runner = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if runner is not None:  # it has taken the name already
        runner.build_logitsprocs = build_logitsprocs  # type: ignore[attr-defined]


def give_draft_models_their_blocks() -> None:
    """Let the draft model of Model Runner V1 find the blocks of its own cache group in a step's
    metadata: where it is to write its keys it computes from those.

    Until GPUModelRunner._build_attention_metadata asks for a DraftModelProposer's group as it does
    for an EagleProposer's (0.33 hands it the first group's blocks, which the model writes to).
    """
    module: Any = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if module is None:  # V2, which has no such fault
        return
    stock = module.GPUModelRunner._build_attention_metadata
    if getattr(stock, "_kvplug", False):
        return

    @functools.wraps(stock)
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata, drafting = stock(self, *args, **kwargs)
        drafter = getattr(self, "drafter", None)
        if drafting is not None and isinstance(drafter, module.DraftModelProposer):
            blocks = self.input_batch.block_table[drafter.kv_cache_gid]
            table = blocks.get_device_tensor(drafting.num_reqs)
            drafting = drafting.replace(block_table_tensor=table)
        return metadata, drafting

    _build_attention_metadata._kvplug = True  # type: ignore[attr-defined]
    module.GPUModelRunner._build_attention_metadata = _build_attention_metadata


def name_requests() -> None:
    """Let Model Runner V2 name each row's slot for models with recurrent layers too.

    Until MambaHybridModelState.prepare_attn hands ``req_idx`` to the metadata, as all others do.
    """
    from vllm.v1.worker.gpu.model_states import mamba_hybrid

    prepare, build = (
        mamba_hybrid.MambaHybridModelState.prepare_attn,
        mamba_hybrid.build_attn_metadata,
    )
    if getattr(prepare, "_kvplug", False):
        return
    named: list[Any] = []

    @functools.wraps(prepare)
    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        named.append(input_batch.idx_mapping_np)
        try:
            return prepare(self, input_batch, *args, **kwargs)
        finally:
            named.pop()

    def build_attn_metadata(*args: Any, **kwargs: Any) -> Any:
        return build(*args, **{"req_idx": named[-1], **kwargs})

    prepare_attn._kvplug = True  # type: ignore[attr-defined]
    mamba_hybrid.MambaHybridModelState.prepare_attn = prepare_attn
    mamba_hybrid.build_attn_metadata = build_attn_metadata


def request_rows(common: Any, slots: bool) -> NDArray[np.int64]:
    """Where the router knows each row of the batch: Model Runner V2 names the request's slot,
    V1's rows are the slots. Until V1 is removed (0.32 calls it deprecated).

    slots: of V2. -> [B]; -1 for rows that pad the batch to a captured size, which V2 names no slot
    for, and for all where it names none.
    """
    if common.req_idx is None:
        return np.full(common.num_reqs, -1) if slots else np.arange(common.num_reqs)
    rows = np.full(common.num_reqs, -1, np.int64)
    named = np.asarray(common.req_idx[: common.num_reqs], np.int64)
    rows[: len(named)] = named
    return rows


def host_lengths(common: Any) -> NDArray[np.int64]:
    """Cached tokens of each row after this step, drafts included, on the host: exact where each
    step is scheduled after the one before has ended, as it is beside drafts. -> [B]
    """
    lengths = common.seq_lens_cpu_upper_bound
    assert lengths is not None, "this model runner sends no host copy of the sequence lengths"
    return lengths[: common.num_reqs].numpy().astype(np.int64)


def second_builder(builder: Any) -> Any:
    """A copy of a stock metadata builder, for other sequences of the same step.

    What FlashAttentionMetadataBuilder keeps of a step is its FlashAttention 3 schedule, in one
    buffer for as many sequences as a batch has requests: without a schedule made ahead the kernel
    makes its own. Until the schedule is no buffer of the builder's.
    """
    second = copy.copy(builder)
    if hasattr(second, "aot_schedule"):
        second.aot_schedule, second.scheduler_metadata = False, None
    return second


def single_head_builder(builder: Any, heads: int) -> Any:
    """``second_builder`` for batches of one KV head and ``heads`` query heads.

    The names are attributes of CPUAttentionMetadataBuilder and FlashAttentionMetadataBuilder.
    """
    single = second_builder(builder)
    for name, value in (
        ("num_heads", heads),
        ("num_kv_heads", 1),
        ("num_heads_q", heads),
        ("num_heads_kv", 1),
    ):
        if hasattr(single, name):
            setattr(single, name, value)
    return single


def single_head_impl(impl: Any) -> Any:
    """A copy of a stock attention implementation for one KV head and its group of query heads."""
    single = copy.copy(impl)
    single.num_heads = impl.num_heads // impl.num_kv_heads
    single.num_kv_heads = 1
    return single


def first_kv_head(layer_name: str, kv_heads: int) -> int:
    """Number of this rank's first KV head of a layer, counted through the whole model."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    ranks = get_tensor_model_parallel_world_size()
    return (layer_index(layer_name) * ranks + get_tensor_model_parallel_rank()) * kv_heads


@functools.cache
def cpu_page_order(isa: str, size: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Where the CPU kernel puts keys and values within one head's page, found by writing some.

    -> [2 * S * D] int64: element i of (keys [S, D], values [S, D]) stands at [i] of the page.
    Until the kernel names its packing; it differs by instruction set and dtype.
    """
    from vllm import _custom_ops as ops

    numbers = torch.arange(2 * size * head_size).view(2, size, 1, head_size)
    found = torch.zeros(2 * size * head_size, dtype=torch.int64)
    cached = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}.get(dtype, "auto")
    base = 128 if cached == "auto" else 8  # bfloat16 counts to 256 exactly, e5m2 to 8
    digit = 1
    while digit < len(found):
        page = torch.zeros(1, 1, 2 * size, head_size, dtype=dtype)
        keys, values = widened((numbers // digit % base).to(dtype))
        kept = page if cached == "auto" else page.view(torch.uint8)
        ops.cpu_attn_reshape_and_cache(
            keys, values, *kept.chunk(2, dim=2), torch.arange(size), isa,
            k_scale=1.0, v_scale=1.0, kv_cache_dtype=cached,
        )  # fmt: skip
        found += page.flatten().long() * digit
        digit *= base
    order = torch.empty_like(found)
    order[found] = torch.arange(len(found))
    return order


@functools.cache
def cpu_page_strides(
    isa: str, size: int, head_size: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int], ...]:
    """Of keys and of values in a head's page as the CPU kernel fills it: where they begin, and
    from token to token, and from channel to channel.

    Raises ValueError where no strides describe its packing.
    """
    found = []
    for place in cpu_page_order(isa, size, head_size, dtype).view(2, size, head_size):
        start = int(place[0, 0])
        token, channel = int(place[1, 0]) - start, int(place[0, 1]) - start
        lines = torch.arange(size)[:, None] * token + torch.arange(head_size) * channel
        if not torch.equal(place, lines + start):
            raise ValueError(
                f"kvplug cannot read parts of the blocks of vLLM's CPU kernel {isa!r}, which "
                "packs keys in tiles; use quest(budget=2048) with --block-size 64, or --dtype "
                "float32"
            )
        found.append((start, token, channel))
    return tuple(found)


def cpu_keys_and_values(isa: str, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_cache [N, H, S, 2D] as the CPU kernel fills it -> [N, S, H, D] twice, by strides."""
    pages, heads, size, width = kv_cache.shape
    page, head, _, _ = kv_cache.stride()
    keys, values = (
        kv_cache.as_strided(
            (pages, size, heads, width // 2),
            (page, token, head, channel),
            int(kv_cache.storage_offset()) + start,
        )
        for start, token, channel in cpu_page_strides(isa, size, width // 2, kv_cache.dtype)
    )
    return keys, values


@functools.cache
def layer_index(layer_name: str) -> int:
    """``model.layers.7.self_attn.attn`` -> 7."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


def set_layer_class(layer: Any, layer_class: int | None) -> None:
    """Let the backend that a layer shows to vLLM know which class of layers it belongs to.

    Until ``customize_spec`` is given the layer: it is called on ``get_attn_backend()`` alone.
    """
    if layer.attn_backend.layer_class != layer_class:
        layer.attn_backend = _with_layer_class(layer.attn_backend, layer_class)


def attention_chunk(layer: Any) -> int | None:
    """Tokens of the chunks that a layer attends within, as Llama 4's local ones; None for others.

    Until an implementation is told: ChunkedLocalAttention wraps its backend's builder alone.
    """
    tokens: int | None = getattr(layer, "attention_chunk_size", None)
    return tokens


def sees(layer: Any) -> int:
    """Tokens that a layer of those which do not see all sees at most."""
    return int(attention_chunk(layer) or layer.sliding_window)


def set_backend(layer: Any, kind: str) -> None:
    """Let a layer show vLLM the backend of another kind, ``coded`` or ``placed``: which builder it
    has, and whether it writes and reads its pages itself, is asked of the class. Until the layer's
    own says so."""
    other = getattr(layer.attn_backend, kind)
    if other is not None:
        layer.attn_backend = other


def take_first_blocks(pool: Any, count: int) -> list[Any]:
    """Blocks 1 to ``count`` of a pool that has handed out none, which from now on is that much
    smaller. Nobody has them yet.

    BlockPool counts what is free, in use and to be reset by ``num_gpu_blocks``. Until it takes a
    reservation.
    """
    blocks = list(pool.get_new_blocks(count))
    assert [block.block_id for block in blocks] == list(range(1, count + 1)), "not the first"
    pool.num_gpu_blocks -= count
    for block in blocks:
        block.ref_cnt = 0
    return blocks


def set_window(layer: Any, window: int) -> None:
    """Let an attention layer see so many tokens, the current one included, as its constructor does
    where a model's configuration says so: the specification that it gives vLLM says so too.

    Implementations hold a window as FlashAttention takes it, tokens before the query and behind
    it, or in tokens. Until vLLM takes windows for layers from outside a model's configuration.
    Raises ValueError for layers that keep another cache than plain attention's.
    """
    from vllm.model_executor.layers.attention import Attention

    if type(layer).get_kv_cache_spec is not Attention.get_kv_cache_spec:
        raise ValueError(
            f"kvplug: {layer.layer_name} is a {type(layer).__name__}, which was never run with a "
            "window of ours; leave it out of local"
        )
    pair = isinstance(layer.impl.sliding_window, tuple)
    layer.sliding_window = window
    layer.impl.sliding_window = (window - 1, 0) if pair else window


@functools.cache
def _with_layer_class(backend: type, layer_class: int | None) -> type:
    return type(f"{backend.__name__}{layer_class}", (backend,), {"layer_class": layer_class})


def page_tail(kv_cache: torch.Tensor, parts: int, rows: int, head_size: int) -> torch.Tensor:
    """The digests of so many parts of a block behind its tokens.

    kv_cache [N, H, S, C] LBHNC -> [N, H, rows, D] of one part, [N, parts, H, rows, D] of several.

    Leans on ``page_size_padded`` leaving its bytes at the end of the page.
    """
    pages, heads, _, _ = kv_cache.shape
    page, head, _, last = kv_cache.stride()
    assert last == 1 and page >= heads * (head + parts * rows * head_size), (
        f"the page has no room for its digest: shape {tuple(kv_cache.shape)}, "
        f"strides {kv_cache.stride()}, {parts} times {rows} rows of {head_size}"
    )
    tail = kv_cache.as_strided(
        (pages, parts, heads, rows, head_size),
        (page, heads * rows * head_size, rows * head_size, head_size, 1),
        kv_cache.storage_offset() + heads * head,
    )
    return tail if parts > 1 else tail[:, 0]


def announce_requests(
    tell: Callable[[Any, Any], None], salt: Callable[[Any, Any, str | None], str | None],
    show: Callable[[Any, Any], None],
) -> None:  # fmt: skip
    """Call ``tell`` with an engine's configuration and a request's sampling parameters, and
    ``show`` with the request that became of them: when the request is admitted, and when the
    engine's core receives it. A ValueError of either fails that request alone; what a core cannot
    carry out would end it in a step. What is admitted has the salt of its pages' hashes from
    ``salt``, which is given the user's too.

    ``validate_params`` is called on a class that all engines of a process share. Until it is
    given the configuration.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    admit, receive = InputProcessor.process_inputs, EngineCore.preprocess_add_request
    if getattr(receive, "_kvplug", False):
        return

    @functools.wraps(admit)
    def process_inputs(
        self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            tell(self.vllm_config, params)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        request = admit(self, request_id, prompt, params, *args, **kwargs)
        try:
            show(self.vllm_config, request)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        request.cache_salt = salt(self.vllm_config, params, request.cache_salt)
        return request

    @functools.wraps(receive)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        tell(self.vllm_config, request.sampling_params)
        show(self.vllm_config, request)
        return receive(self, request)

    preprocess_add_request._kvplug = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
    EngineCore.preprocess_add_request = preprocess_add_request


def announce_beams(tell: Callable[[Any, Any, Sequence[Any]], None]) -> None:
    """Call ``tell`` with the configuration, the parameters and the prompts of a beam search before
    its first step. A ValueError of ``tell`` refuses it.

    Each step of a beam is a request whose parameters vLLM makes itself, without what the user
    said in ``vllm_xargs``. Until ``BeamSearchParams`` has ``extra_args``.
    """
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
    from vllm.exceptions import VLLMValidationError

    online, offline = BeamSearchOnlineMixin.beam_search, BeamSearchOfflineMixin.beam_search
    if getattr(online, "_kvplug", False):
        return

    def judge(vllm_config: Any, params: Any, prompts: Sequence[Any]) -> None:
        inner = [prompt.get("decoder_prompt", prompt) for prompt in prompts]
        try:
            tell(vllm_config, params, [each.get("prompt_token_ids") or () for each in inner])
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error

    @functools.wraps(online)
    def beam_search(self: Any, prompt: Any, request_id: Any, params: Any, **kwargs: Any) -> Any:
        judge(self.engine_client.vllm_config, params, [prompt])
        return online(self, prompt=prompt, request_id=request_id, params=params, **kwargs)

    @functools.wraps(offline)
    def offline_beam_search(
        self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        judge(self.llm_engine.vllm_config, params, self._preprocess_cmpl(prompts))
        return offline(self, prompts, params, *args, **kwargs)

    def keep_extra_args(stock: Any) -> Any:
        @functools.wraps(stock)
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            params = stock(self, *args, **kwargs)
            params.extra_args = self.vllm_xargs
            return params

        return to_beam_search_params

    for request in (
        ChatCompletionRequest, CompletionRequest, TranscriptionRequest, TranslationRequest,
    ):  # fmt: skip
        request.to_beam_search_params = keep_extra_args(request.to_beam_search_params)
    beam_search._kvplug = True  # type: ignore[attr-defined]
    BeamSearchOnlineMixin.beam_search = beam_search
    BeamSearchOfflineMixin.beam_search = offline_beam_search
