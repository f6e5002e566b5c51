"""A Llama that recalls exactly, built by hand: no training, no download, 5 MB.

Its world is S symbols, each with a key token k and a value token v. A prompt hides pairs "k3 v7"
among filler; asked with the token k3, the model answers k7, and since that is a key again, it
goes on to what followed k7. So one question makes *every* decode step a look-up somewhere in the
context, which is what a sparse decode path has to be tested on: the first answer is computed by
the prompt's last token (prefill), all others by decode.

    residual = [token | token before | answer | 1]
    layer 0, head 0   finds the position before (a constant query against RoPE's own phase)
                      and copies its token into `token before`
    layer 1, head 0   q = token, k = token before: finds what followed this token earlier,
                      and copies that token into `answer`; its channels are the slowest-turning
                      ones of RoPE, so that distance does not matter
    lm_head           row of key token i = embedding of value token i

The other head is zero: an idle head, which spends its budget on nothing. With more heads
(`build_recall_model(kv_heads=8, group=4, live=(0, 5))`) each live one matches by itself and
copies its share of the answer's channels, so a policy must find the token in every live head; a
group's other query heads are idle. Token embeddings are random unit vectors, so keys are random
directions, the worst case for min/max page bounds: a policy that does well here does not owe it
to structure. What a page bound or a window *can* find is computed here from the model's own keys,
outside any engine: `promised_recall` and `reachable`. An engine that finds less has a bug; one
that finds more read more than it says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvplug_evals.models.folder import new_folder, write_json, write_word_tokenizer

SYMBOLS = 2048
VOCAB = 2 * SYMBOLS  # key tokens 0..S-1, value tokens S..2S-1
EMBED = 64
HIDDEN = 256  # three embeddings, the constant, and zeros
HEADS = 2
HEAD_DIM = 128
CONSTANT = 3 * EMBED
THETA = 1e12  # turns the slowest 32 channel pairs by < 0.15 rad over 128K tokens
PHASES = 20  # the fastest channel pairs, which tell positions apart
PREVIOUS_SHARPNESS = 25.0  # a neighbour of the previous token scores 20 less than it
MATCH_SHARPNESS = 30.0  # an equal token scores 30, another -15 to 15
LOGIT_SCALE = 10.0
NORM_EPS = 1e-6
PREVIOUS, MATCH = 0, 1  # layers


@dataclass(frozen=True, kw_only=True)
class RecallPrompt:
    """A context and its questions; each is asked alone, as `tokens + [question]`."""

    tokens: list[int]
    questions: list[int]
    """Key tokens."""
    answers: list[list[int]]
    """Per question, the key tokens that greedy decoding of `hops` tokens should give."""
    positions: list[list[int]]
    """Per question and hop, where in `tokens` the answer stands."""
    successor: Mapping[int, int]
    """Key token -> the answer to it, for every pair of the context that is no distractor."""

    @property
    def text(self) -> str:
        """The context in the tokenizer's words."""
        return " ".join(map(word, self.tokens))

    def hits(self, question: int, generated: Sequence[int]) -> list[bool]:
        """Per generated token: is it the answer to the token before it?

        Judged step by step, so that one miss is one miss when the chain goes on from there.
        """
        asked = [question, *generated]
        return [self.successor.get(k) == a for k, a in zip(asked, generated, strict=False)]


def recall_prompt(
    tokens: int,
    pairs: int,
    queries: int,
    seed: int,
    *,
    hops: int = 1,
    distractors: int = 0,
    disjoint: bool = False,
) -> RecallPrompt:
    """`tokens` of context with `pairs` pairs on one ring, and `queries` distinct ways into it.

    Pairs stand at random even positions, as do `distractors` pairs on a ring of their own, which
    nobody asks for. Filler is drawn from the tokens of unused symbols. `disjoint`: no two answers
    share a pair, so that what one turn quotes tells nothing of another's.
    """
    if not 0 < hops < pairs < SYMBOLS - distractors:
        raise ValueError(
            f"0 < hops < pairs < {SYMBOLS} symbols - distractors must hold, got hops={hops}, "
            f"pairs={pairs}, distractors={distractors}"
        )
    if tokens < 2 * (pairs + distractors):
        need = 2 * (pairs + distractors)
        raise ValueError(f"{pairs + distractors} pairs need {need} tokens, got tokens={tokens}")
    ways = pairs // (hops + 1) if disjoint else pairs
    if not 0 < queries <= ways:
        raise ValueError(
            f"queries must be between 1 and pairs{' // (hops + 1)' if disjoint else ''} = {ways}, "
            f"got {queries}"
        )

    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(SYMBOLS, generator=random)
    ring, decoys, unused = order.split([pairs, distractors, SYMBOLS - pairs - distractors])
    filler = torch.cat([unused, unused + SYMBOLS])
    context = filler[torch.randint(len(filler), (tokens,), generator=random)]
    places = 2 * torch.randperm(tokens // 2, generator=random)  # of a pair's key
    at = places[:pairs]
    context[at] = ring
    context[at + 1] = ring.roll(-1) + SYMBOLS
    beside = places[pairs : pairs + distractors]
    context[beside] = decoys
    context[beside + 1] = decoys.roll(-1) + SYMBOLS

    steps = torch.arange(hops)
    starts = torch.randperm(ways, generator=random)[:queries] * (hops + 1 if disjoint else 1)
    asked = (starts[:, None] + steps) % pairs  # [queries, hops]
    return RecallPrompt(
        tokens=context.tolist(),
        questions=ring[starts].tolist(),
        answers=ring[(asked + 1) % pairs].tolist(),
        positions=(at[asked] + 1).tolist(),
        successor=dict(zip(ring.tolist(), ring.roll(-1).tolist(), strict=True)),
    )


def word(token: int) -> str:
    """As the tokenizer writes it."""
    return f"{'kv'[token // SYMBOLS]}{token % SYMBOLS}"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """KV heads, query heads to each, and the KV heads of the match layer that do the matching."""

    kv_heads: int = HEADS
    group: int = 1
    live: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        inside = all(0 <= head < self.kv_heads for head in self.live)
        if not self.live or not inside or len(set(self.live)) < len(self.live):
            raise ValueError(
                f"live must name some of the {self.kv_heads} KV heads, each once, got {self.live}"
            )
        if HIDDEN % (self.kv_heads * self.group):
            raise ValueError(
                f"kv_heads * group must divide the hidden size {HIDDEN}, as transformers demands, "
                f"got {self.kv_heads} * {self.group}"
            )
        if EMBED % len(self.live):
            raise ValueError(
                f"the live heads must share {EMBED} channels evenly, got {len(self.live)} of them"
            )

    def share(self, place: int) -> slice:
        """Channels of the answer that the live head at this place copies."""
        size = EMBED // len(self.live)
        return slice(place * size, (place + 1) * size)


def build_recall_model(
    folder: Path,
    *,
    dtype: str = "float32",
    max_positions: int = 131072,
    seed: int = 0,
    kv_heads: int = HEADS,
    group: int = 1,
    live: Sequence[int] = (0,),
) -> None:
    """Save the model as a Hugging Face Llama folder. dtype: float32, bfloat16 or float16.

    Raises ValueError for `live` heads that are not there or cannot share the answer evenly.
    """
    from safetensors.torch import save_file

    heads = Heads(kv_heads=kv_heads, group=group, live=tuple(live))
    raw = _weights(seed, heads)
    weights = {n: w.to(getattr(torch, dtype)).contiguous() for n, w in raw.items()}
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": 2,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with new_folder(folder) as draft:
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        write_json(draft / "config.json", config)
        write_json(draft / "generation_config.json", {"do_sample": False})
        write_word_tokenizer(draft, [word(token) for token in range(VOCAB)])


def match_keys(tokens: Sequence[int], *, seed: int = 0) -> Tensor:
    """tokens [T] -> keys [T, D] fp32 of the match head after RoPE, as a cache holds them.

    Position 0 has no token before it: there the previous-token head sees itself.
    """
    table = _embeddings(seed)
    before = table[torch.tensor([tokens[0], *tokens[:-1]])]
    channels = torch.zeros(len(tokens), HEAD_DIM)
    channels[:, _slow_channels()] = _amplitude(MATCH_SHARPNESS) * before
    return _rotate(channels, torch.arange(len(tokens)))


def match_queries(tokens: Sequence[int], positions: Sequence[int], *, seed: int = 0) -> Tensor:
    """tokens [Q], positions [Q] -> queries [Q, D] fp32 of the match head after RoPE."""
    channels = torch.zeros(len(tokens), HEAD_DIM)
    table = _embeddings(seed)
    channels[:, _slow_channels()] = _amplitude(MATCH_SHARPNESS) * table[torch.tensor(tokens)]
    return _rotate(channels, torch.tensor(positions))


def promised_recall(
    prompt: RecallPrompt, *, page_size: int, budget: int, last_pages: int = 1, seed: int = 0
) -> Tensor:
    """bool [queries, hops]: does the best `budget` tokens by page bound hold the answer?

    The bound of a page is sum_d max(q_d lo_d, q_d hi_d) over its keys (Quest). Of the
    budget // page_size pages read, the last `last_pages` are read always. Hop h is asked at
    position T + h, when the keys of the tokens so far fill the pages behind the context.
    """
    pages_read = budget // page_size
    if pages_read <= last_pages:
        raise ValueError(
            f"budget must exceed last_pages * page_size = {last_pages * page_size}, got {budget}"
        )
    found = []
    for question, answers, positions in zip(
        prompt.questions, prompt.answers, prompt.positions, strict=True
    ):
        asked = [question, *answers[:-1]]
        at = [len(prompt.tokens) + hop for hop in range(len(asked))]
        keys = match_keys([*prompt.tokens, *asked], seed=seed)
        queries = match_queries(asked, at, seed=seed)
        row = []
        for query, now, answer in zip(queries, at, positions, strict=True):
            bounds = _page_bounds(query, keys[: now + 1], page_size)
            bounds[-last_pages:] = math.inf
            best = bounds.topk(min(pages_read, len(bounds))).indices
            row.append(bool((best == answer // page_size).any()))
        found.append(row)
    return torch.tensor(found)


def reachable(prompt: RecallPrompt, *, sinks: int, window: int) -> Tensor:
    """bool [queries, hops]: is the answer among the first `sinks` or the last `window` tokens?

    The window counts the token that asks. This is all that StreamingLLM can recall: the match
    head needs the answer's own row.
    """
    answers = torch.tensor(prompt.positions)
    now = len(prompt.tokens) + torch.arange(answers.shape[1])
    return (answers < sinks) | (answers > now - window)


def _weights(seed: int, heads: Heads) -> dict[str, Tensor]:
    """The state dict in fp32. Projections undo the RMS norm before them, whose scale is known:
    the residual holds unit vectors, two of them before layer 0 and three before layer 1."""
    table = _embeddings(seed)
    eye = torch.eye(EMBED)
    token, before, answer = (slice(i * EMBED, (i + 1) * EMBED) for i in range(3))
    weights = {
        "model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.zeros(VOCAB, HIDDEN),
    }
    weights["model.embed_tokens.weight"][:, token] = table
    weights["model.embed_tokens.weight"][:, CONSTANT] = 1.0
    weights["lm_head.weight"][:SYMBOLS, answer] = LOGIT_SCALE * table[SYMBOLS:]
    for layer in (PREVIOUS, MATCH):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, shape in (
            ("self_attn.q_proj", (heads.kv_heads * heads.group * HEAD_DIM, HIDDEN)),
            ("self_attn.k_proj", (heads.kv_heads * HEAD_DIM, HIDDEN)),
            ("self_attn.v_proj", (heads.kv_heads * HEAD_DIM, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, heads.kv_heads * heads.group * HEAD_DIM)),
            ("mlp.gate_proj", (2 * HEADS, HIDDEN)),
            ("mlp.up_proj", (2 * HEADS, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, 2 * HEADS)),
        ):
            weights[f"{prefix}.{name}.weight"] = torch.zeros(shape)

    q, k, v, o = (weights[f"model.layers.{PREVIOUS}.self_attn.{n}_proj.weight"] for n in "qkvo")
    unnorm = math.sqrt(2 / HIDDEN)  # token and constant
    fast = torch.arange(PHASES)
    amplitude = _amplitude(PREVIOUS_SHARPNESS) * unnorm
    q[fast, CONSTANT] = amplitude
    k[fast, CONSTANT] = amplitude * _frequencies()[fast].cos()  # turned by one position
    k[fast + HEAD_DIM // 2, CONSTANT] = amplitude * _frequencies()[fast].sin()
    v[:EMBED, token] = unnorm * eye
    o[before, :EMBED] = eye

    q, k, v, o = (weights[f"model.layers.{MATCH}.self_attn.{n}_proj.weight"] for n in "qkvo")
    unnorm = math.sqrt(3 / HIDDEN)  # token, token before and constant
    for place, head in enumerate(heads.live):
        row, column = head * HEAD_DIM, head * heads.group * HEAD_DIM  # KV head, its first query
        q[column + _slow_channels(), token] = _amplitude(MATCH_SHARPNESS) * unnorm * eye
        k[row + _slow_channels(), before] = _amplitude(MATCH_SHARPNESS) * unnorm * eye
        v[row : row + EMBED, token] = unnorm * eye
        copied = torch.zeros(EMBED, EMBED)
        copied[heads.share(place)] = eye[heads.share(place)]
        o[answer, column : column + EMBED] = copied
    return weights


def _embeddings(seed: int) -> Tensor:
    """[VOCAB, EMBED] random unit vectors."""
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(VOCAB, EMBED, generator=random), dim=-1)


def _amplitude(sharpness: float) -> float:
    """Of a query and a key alike, such that unit vectors that agree score `sharpness`."""
    return math.sqrt(sharpness * math.sqrt(HEAD_DIM))


def _frequencies() -> Tensor:
    """[D / 2] radians per position; Llama turns channel i together with i + D / 2."""
    half = HEAD_DIM // 2
    return THETA ** (-torch.arange(half) / half)


def _slow_channels() -> Tensor:
    """[EMBED] the slowest-turning channel pairs."""
    half, pairs = HEAD_DIM // 2, EMBED // 2
    return torch.cat([torch.arange(half - pairs, half), torch.arange(HEAD_DIM - pairs, HEAD_DIM)])


def _rotate(channels: Tensor, positions: Tensor) -> Tensor:
    """RoPE in the rotate-half convention: channels [N, D], positions [N] -> [N, D]."""
    angles = positions[:, None] * _frequencies()
    first, second = channels.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _page_bounds(query: Tensor, keys: Tensor, page_size: int) -> Tensor:
    """query [D], keys [T, D] -> [P] upper bounds of query . key, the last page perhaps partial."""
    missing = -len(keys) % page_size
    low = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=math.inf)
    high = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=-math.inf)
    low = low.view(-1, page_size, HEAD_DIM).amin(1)
    high = high.view(-1, page_size, HEAD_DIM).amax(1)
    return torch.maximum(query * low, query * high).sum(-1)
