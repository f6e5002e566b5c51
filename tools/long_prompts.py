"""What policies lose, and save, that read a prompt sparsely: real text through the engine.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/long_prompts.py

Two texts of Python's own as prompts of 7,936 tokens: source, and documentation that repeats itself
from far away. The loss is the -log p of the text's tokens from 1,536 on, in nats a token; the
seconds are those of the first token of an answer, in chunks of 2,048, each prompt alone; what is
read is a share of what stands before each query, a block's pages counted once. With a stride of 1
`xattention` weighs each page by its true attention: the best that pages and blocks of these sizes
can do. Float32, one thread for each core that the process may use; with `--clock cpu` the seconds
are what all threads took together, which other work beside them does not lengthen: set
OMP_NUM_THREADS=1 for those of one. Minutes for each policy.

`--lookups N --model .models/recall` counts answers instead: N prompts of one context, each with
one question at its end, of which the exact recall model knows the answer if its last queries find
the pair.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

TEXTS = {
    "source": Path(argparse.__file__).read_text(),
    "documentation": "\n".join(topics[name] for name in sorted(topics)),
}
SCORED_FROM = 1536
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}
POLICIES = (
    "dense",
    "a_shape(window=512)",
    "a_shape(window=1024)",
    "xattention",
    "xattention(stride=16)",
    "xattention(threshold=None, budget=704)",
    "xattention(threshold=None, budget=1216)",
    "xattention(stride=1, threshold=None, budget=704)",
    "block_quest(budget=704)",
    "block_quest(budget=1216)",
    "random_prefill(budget=704)",
    "random_prefill(budget=1216)",
)


class Read:
    """Of prompts' queries, tokens read and tokens before them: of blocks as they chose."""

    def __init__(self) -> None:
        self.read = self.cached = 0.0

    @property
    def share(self) -> float:
        return self.read / self.cached if self.cached else 1.0


@contextmanager
def counted() -> Iterator[Read]:
    from kvplug_vllm import attention
    from kvplug_vllm.metrics import Metrics

    found, count, choose = Read(), Metrics.count, attention.choose_pages  # type: ignore[attr-defined]
    blocks = Read()

    def counts(self: Any, reads: Any, settings: Any) -> None:
        count(self, reads, settings)
        if reads.prefill is not None:
            found.read += reads.prefill.read
            found.cached += reads.prefill.cached

    def chosen(*args: Any, **kwargs: Any) -> Any:
        pages, number = choose(*args, **kwargs)
        blocks.read += float(number.float().mean(1).sum())
        blocks.cached += float(args[6].sum())
        return pages, number

    Metrics.count, attention.choose_pages = counts, chosen  # type: ignore
    try:
        yield found
    finally:
        Metrics.count, attention.choose_pages = count, choose  # type: ignore
        if blocks.cached:  # the host knows a bound alone
            found.read, found.cached = blocks.read, blocks.cached


def started(policy: str, model: Path, tokens: int, **settings: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(model), attention_backend="kvplug", additional_config={"kvplug": {"policy": policy}},
        dtype="float32", max_model_len=tokens + 8, max_num_batched_tokens=2048, max_num_seqs=2,
        block_size=32, enforce_eager=True, seed=0, kv_cache_memory_bytes=2 << 30, **settings,
    )  # fmt: skip


def measure(
    policy: str,
    model: Path,
    tokens: int,
    texts: Iterable[str],
    timed: bool,
    clock: Callable[[], float],
) -> dict[str, tuple[float, float, float]]:
    """By text: loss, seconds (of a prompt of its own if timed), share read."""
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = started(policy, model, tokens, enable_prefix_caching=False)
    tokenizer, found = llm.get_tokenizer(), {}
    for name in texts:
        prompt = {"prompt_token_ids": tokenizer.encode(TEXTS[name])[:tokens]}
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        with counted() as read:
            began = clock()
            (said,) = llm.generate([prompt], asked, use_tqdm=False)
            seconds = clock() - began
        if timed:
            began = clock()
            llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
            seconds = clock() - began
        losses = [
            -said.prompt_logprobs[n][token].logprob
            for n, token in enumerate(prompt["prompt_token_ids"])
            if n >= SCORED_FROM
        ]
        found[name] = mean(losses), seconds, read.share
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return found


def look_up(policy: str, model: Path, tokens: int, questions: int) -> tuple[int, float]:
    """Questions answered right, and the share that the context's and their queries read."""
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from kvplug_evals.models.recall import recall_prompt

    made = recall_prompt(tokens - 1, 64, questions, seed=0)
    prompts = [{"prompt_token_ids": [*made.tokens, asked]} for asked in made.questions]
    llm = started(policy, model, tokens, enable_prefix_caching=True)
    asked = SamplingParams(max_tokens=1, temperature=0)
    with counted() as read:
        said = [llm.generate([prompt], asked, use_tqdm=False)[0] for prompt in prompts]
    right = sum(
        made.hits(question, each.outputs[0].token_ids)[0]
        for each, question in zip(said, made.questions, strict=True)
    )
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return right, read.share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("--tokens", type=int, default=7936)
    parser.add_argument(
        "--losses", action="store_true", help="no prompt again for its seconds alone"
    )
    parser.add_argument("--lookups", type=int, default=0, help="questions instead of texts")
    parser.add_argument("--text", choices=TEXTS, action="append", help="repeatable; both if none")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("policies", nargs="*", default=POLICIES)
    given = parser.parse_args()
    for policy in given.policies:
        if given.lookups:
            right, share = look_up(policy, given.model, given.tokens, given.lookups)
            print(f"{policy}: {right} of {given.lookups}, {share:.0%} read", flush=True)
            continue
        texts, clock = given.text or tuple(TEXTS), CLOCKS[given.clock]
        found = measure(policy, given.model, given.tokens, texts, not given.losses, clock)
        shown = "; ".join(
            f"{name} {loss:.3f}, {seconds:.1f} s, {share:.0%} read"
            for name, (loss, seconds, share) in found.items()
        )
        print(f"{policy}: {shown}", flush=True)


if __name__ == "__main__":
    main()
