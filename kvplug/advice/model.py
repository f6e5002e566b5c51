"""A model's ``config.json`` -> what its cache and its weights weigh.

Read as far as the configuration says: grouped heads, head_dim, windows between layers, recurrent
layers, layers that read another one's cache, experts. Sizes of weights are those of the files
where a folder has them, else an estimate from the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1}
WINDOWED, RECURRENT = "sliding", ("mamba", "linear_attention", "recurrent")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One of a model's layers that keep something of a request."""

    number: int
    """Counted from 0 over all of the model's layers."""
    kv_heads: int = 0
    """0 where the layer does not attend."""
    head_dim: int = 0
    window: int | None = None
    """Most recent tokens that it sees; None for all."""
    owns: bool = True
    """Whether it has a cache of its own, and does not read another layer's."""
    state: int = 0
    """Bytes that a request's recurrent state has, whatever its length."""

    @property
    def attends(self) -> bool:
        return self.kv_heads > 0

    @property
    def planned(self) -> bool:
        """Whether policies plan it: it sees everything."""
        return self.attends and self.window is None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a policy's gain depends on, for one rank of tensor parallelism."""

    name: str
    layers: tuple[Layer, ...]
    heads: int
    """Query heads of a layer."""
    itemsize: int
    """Bytes of a number in the cache, where nobody sets another type."""
    weights: int
    """Bytes of all of them."""
    shared: int
    """Bytes of those that every step reads."""
    weight_size: float = 2.0
    """Bytes of one."""
    experts: int = 0
    """Of a layer; 0 without."""
    chosen: int = 0
    """Experts that a token asks."""
    estimated: bool = False
    """Whether the weights were reckoned from shapes."""
    longest: int | None = None
    """Tokens that the model was made for."""
    sinks: bool = False
    """Whether its attention has sinks of its own."""
    ranks: int = 1
    """Of tensor parallelism."""
    refused: str | None = None
    """Why kvplug does not serve it."""

    @property
    def attention(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.attends]

    @property
    def planned(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.planned]

    def token_bytes(self, layer: Layer, itemsize: int | None = None) -> int:
        """Of a token's keys and values in a layer: 2 H D itemsize."""
        return 2 * layer.kv_heads * layer.head_dim * (itemsize or self.itemsize)

    def cache_token(self, itemsize: int | None = None) -> int:
        """Bytes of a token in all layers that keep it for good."""
        return sum(self.token_bytes(x, itemsize) for x in self.planned if x.owns)

    def read_weights(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads: those of all experts that any of
        them asks, E (1 - (1 - k / E) ** tokens) of E in the mean."""
        if not self.experts:
            return self.shared
        asked = 1 - (1 - self.chosen / self.experts) ** tokens
        return self.shared + (self.weights - self.shared) * asked

    @property
    def token_weights(self) -> float:
        """Bytes of the weights that one token is multiplied by."""
        return self.read_weights(1)


def read_model(given: str | Path, ranks: int = 1, weights: int | None = None) -> Model:
    """A folder with a config.json, or the file. ranks: of tensor parallelism, of which the result
    is one. weights: bytes of all, where the folder has no files of them. Raises ValueError with
    what was wanted, what came and what to write instead."""
    path = Path(given)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"kvplug plan reads a model's config.json, and there is none at {file}; write the "
            "folder of a model, or the file (nothing is fetched from a hub)"
        )
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file} as JSON: {error}; write a config.json") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{file} holds no JSON object; write a model's config.json")
    if weights is None and path.is_dir():
        weights = _size_on_disk(file.parent)
    return model_of(config, name=str(given), weights=weights, ranks=ranks)


def model_of(
    config: Mapping[str, Any], *, name: str = "model", weights: int | None = None, ranks: int = 1
) -> Model:
    """config: of transformers. weights: bytes of the files, where they are known."""
    inner = config.get("text_config") or config.get("llm_config")
    text = {**config, **inner} if isinstance(inner, Mapping) else dict(config)
    count = _layer_count(text)
    heads = _whole(text, "num_attention_heads")
    hidden = _whole(text, "hidden_size")
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in BYTES:
        raise ValueError(
            f"the configuration's dtype is {dtype!r}; known: {', '.join(sorted(BYTES))}"
        )
    size = BYTES[dtype]
    layers = tuple(_layers(text, count, heads, hidden, size, ranks))
    whole_layers = layers if ranks == 1 else _layers(text, count, heads, hidden, size, 1)
    each, shared, expert = _parameters(text, whole_layers, heads, hidden)
    bits = _bits(text, 8 * size)
    whole = weights or int(each * bits / 8)
    lasting = whole * (shared / each)
    return Model(
        name=name,
        layers=layers,
        heads=max(1, heads // ranks),
        itemsize=size,
        weights=whole // ranks,
        shared=int(lasting) // ranks,
        weight_size=whole / each,
        experts=expert,
        chosen=_first(text, CHOSEN) if expert else 0,
        estimated=weights is None,
        longest=text.get("max_position_embeddings"),
        sinks=text.get("model_type") == "gpt_oss",
        ranks=ranks,
        refused=_refused(text),
    )


def _refused(text: Mapping[str, Any]) -> str | None:
    if text.get("kv_lora_rank"):
        return "its attention is latent (MLA), which kvplug refuses"
    if "chunked_attention" in (text.get("layer_types") or ()) or text.get("attention_chunk_size"):
        return "its layers attend in chunks, which this arithmetic does not know"
    return None


def _layers(
    text: Mapping[str, Any], count: int, heads: int, hidden: int, size: int, ranks: int
) -> list[Layer]:
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text.get("attention_head_dim") or hidden // heads
    kinds = _kinds(text, count)
    both = text.get("model_type") == "falcon_h1"
    state = _state(text, hidden, size) // ranks
    first_shared = count - int(text.get("num_kv_shared_layers") or 0)
    window = text.get("sliding_window")
    found = []
    for number, kind in enumerate(kinds):
        if kind in RECURRENT:
            found.append(Layer(number=number, state=state))
        elif kind is not None:
            local = kind == WINDOWED
            own_heads, own_dim = kv_heads, head_dim
            if not local:  # Gemma 4's layers that see all have heads of another shape
                own_dim = text.get("global_head_dim") or head_dim
                own_heads = text.get("num_global_key_value_heads") or kv_heads
            found.append(
                Layer(
                    number=number, kv_heads=max(1, own_heads // ranks), head_dim=own_dim,
                    window=window if local else None, owns=number < first_shared,
                    state=state if both else 0,
                )
            )  # fmt: skip
    if not any(layer.attends for layer in found):
        raise ValueError("the configuration names no layer that attends; nothing is cached")
    return found


def _kinds(text: Mapping[str, Any], count: int) -> list[str | None]:
    """Of each layer: full, sliding, one of RECURRENT, or None for one that keeps nothing."""
    stated = text.get("layer_types") or text.get("layers_block_type")
    if stated is None and isinstance(text.get("hybrid_override_pattern"), str):
        stated = [
            {"M": "mamba", "*": "full"}.get(c, "mlp") for c in text["hybrid_override_pattern"]
        ]
    if stated is not None:
        return [_kind(str(each)) for each in stated]
    numbers = range(count)
    if (every := text.get("full_attention_interval")) and "linear_num_key_heads" in text:
        return ["full" if (n + 1) % every == 0 else "linear_attention" for n in numbers]
    if every := text.get("attn_layer_period"):
        offset = text.get("attn_layer_offset") or 0
        return ["full" if n % every == offset else "mamba" for n in numbers]
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return ["full"] * count
    if every := text.get("sliding_window_pattern") or text.get("_sliding_window_pattern"):
        return ["full" if (n + 1) % every == 0 else WINDOWED for n in numbers]
    if text.get("model_type") == "gemma2":
        return ["full" if n % 2 else WINDOWED for n in numbers]
    first = text.get("max_window_layers") if text.get("use_sliding_window") else 0
    return ["full" if n < (first or 0) else WINDOWED for n in numbers]


def _kind(stated: str) -> str | None:
    if "sliding" in stated or stated in ("local", "local_attention"):
        return WINDOWED
    if stated in ("mlp", "moe", "-", "E"):
        return None
    return next((kind for kind in RECURRENT if kind in stated), "full")


def _state(text: Mapping[str, Any], hidden: int, size: int) -> int:
    """Bytes of a layer's recurrent state and of the last inputs of its convolution."""
    if "linear_num_value_heads" in text:
        k, v = text["linear_key_head_dim"], text["linear_value_head_dim"]
        values, keys = text["linear_num_value_heads"], text["linear_num_key_heads"]
        held = (2 * keys * k + values * v) * (text.get("linear_conv_kernel_dim", 4) - 1)
        return int((held + values * k * v) * size)
    states = text.get("mamba_d_state") or text.get("ssm_state_size")
    if not states:
        return 0
    inner = text.get("mamba_d_ssm") or int((text.get("mamba_expand") or 2) * hidden)
    if text.get("mamba_num_heads"):
        inner = text["mamba_num_heads"] * text.get("mamba_head_dim", 64)
    groups = text.get("mamba_n_groups") or text.get("n_groups") or 1
    kernel = text.get("mamba_d_conv") or text.get("conv_kernel") or 4
    return int(((inner + 2 * groups * states) * (kernel - 1) + inner * states) * size)


def _parameters(
    text: Mapping[str, Any], layers: Sequence[Layer], heads: int, hidden: int
) -> tuple[float, float, int]:
    """All of a model's, those of them that every step multiplies by, and a layer's experts."""
    table = _whole(text, "vocab_size") * hidden
    inner = text.get("intermediate_size") or 4 * hidden
    experts = _first(text, EXPERTS)
    wide = text.get("moe_intermediate_size") or inner
    attend = sum(2 * hidden * x.head_dim * (heads + x.kv_heads) for x in layers if x.attends)
    recur = sum(3 * 2 * hidden * hidden for x in layers if x.state)
    lasting = float(attend + recur + table)
    count = _layer_count(text)
    asked = 0.0
    if experts:
        asked = 3.0 * hidden * wide * experts * count
        also = text.get("shared_expert_intermediate_size") or (
            (text.get("n_shared_experts") or 0) * wide
        )
        lasting += 3.0 * hidden * also * count
    else:
        lasting += 3.0 * hidden * inner * count
    # The table of the input is looked up, one row a token; a tied one is multiplied by, too.
    looked_up = 0 if text.get("tie_word_embeddings", False) else table
    return lasting + asked + looked_up, lasting, experts


def _bits(text: Mapping[str, Any], own: int) -> float:
    given = text.get("quantization_config")
    if not isinstance(given, Mapping):
        return own
    method = str(given.get("quant_method", ""))
    if "fp8" in method:
        return 8
    if method == "mxfp4":
        return 4.25
    return float(given.get("bits") or own)


def _size_on_disk(folder: Path) -> int | None:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files) or None


def _layer_count(text: Mapping[str, Any]) -> int:
    stated = text.get("layer_types") or text.get("layers_block_type")
    return len(stated) if stated else _whole(text, "num_hidden_layers")


def _first(text: Mapping[str, Any], names: Sequence[str]) -> int:
    return next((int(text[name]) for name in names if text.get(name)), 0)


def _whole(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"the configuration's {key} must be a whole number, at least 1, got {value!r}; is it "
            "the config.json of a language model?"
        )
    return value
