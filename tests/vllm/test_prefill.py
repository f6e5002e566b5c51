"""Sparse prefill: what a prompt's queries read, whatever its chunks, its batch and its prefix."""

from __future__ import annotations

import pytest

from tests import heads
from tests.plain_llama import Narrow
from tests.vllm.test_lifecycle import preemptions, solo
from tests.vllm.test_selection import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
POSITIONAL = [
    "a_shape(sinks=40, window=100, block=32)",
    "tri_shape(sinks=40, window=64, last=20) + quest(budget=4096, dense_layers=0)",
]


@pytest.fixture(scope="module")
def dense(engine, random_llama, prompts):
    with engine(random_llama()) as stock:
        return stock.generate(prompts(700, 350, 90, 1), 12)


@pytest.mark.both
@pytest.mark.parametrize("policy", POSITIONAL)
def test_a_prompt_by_position_is_a_plain_llama_s(engine, random_llama, prompts, dense, policy):
    model, batch = random_llama(), prompts(700, 350, 90, 1)
    with engine(model, {"policy": policy}) as planned:
        planned.poison(freed=False)
        answers = planned.generate(batch, 12)
        assert answers != dense, "less was read"
        assert solo(planned, batch, 12) == answers
        # Over pages of the first prompts, which end within a block and within the window.
        longer = [prompt[:-20] + batch[2] for prompt in batch]
        planned.generate(batch, 1)
        cached = planned.run(longer, 12)
        assert cached[0].num_cached_tokens == (700 - 20) // S * S
        planned.forget()
        if policy.startswith("a_shape"):  # a last block leaves more exact pages than a middle one
            assert planned.generate(longer, 12) == [list(o.outputs[0].token_ids) for o in cached]
        planned.forget()
        planned.without_shortcut()
        assert planned.generate(batch, 12) == answers
    plain = Narrow(model, policy, S)
    agreed = [plain.agrees(*each) for each in zip(batch, answers, strict=True)]
    assert agreed == [12] * 4


@pytest.mark.cpu  # the twin has two steps' tokens in flight, in a pool of this size
@pytest.mark.parametrize(
    "policy",
    [
        "tri_shape(sinks=40, window=64, last=20) + snapkv(budget=96, window=32)",
        "a_shape(sinks=40, window=60) + streaming_llm(sinks=4, window=150) + "
        "quest(budget=96, dense_layers=0)",
    ],
)
def test_chunks_and_preemption_change_no_token(engine, random_llama, prompts, policy):
    batch = prompts(224, 256, 240, 231, 97)
    with engine(random_llama(), {"policy": policy}) as planned:
        answers = planned.generate(batch, 60)
    with engine(
        random_llama(), {"policy": policy}, max_num_batched_tokens=72, max_model_len=512,
        num_gpu_blocks_override=30,
    ) as planned:  # fmt: skip
        planned.poison(freed=False)
        room = 14 if "+" in policy else 22  # what packs or evicts holds little
        hostages = planned.pool.get_new_blocks(planned.free_blocks - room)
        seen = preemptions(planned)
        assert planned.generate(batch, 60) == answers
        assert seen, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)


@pytest.mark.both
def test_requests_share_pages_with_those_that_read_a_prompt_as_they_do(
    engine, random_llama, prompts
):
    from vllm import SamplingParams

    (prompt,) = prompts(600)
    offer = {"policy": "dense", "allow": ["a_shape", "quest"]}
    with engine(random_llama(), offer, max_model_len=1024) as mixed:

        def cached(policy=None, salt=None, min_context=0):
            given = {"policy": policy, "min_context": min_context}
            extra = {"kvplug": given} if policy else None
            asked = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
            parameters = SamplingParams(
                temperature=0, max_tokens=4, ignore_eos=True, detokenize=False, extra_args=extra
            )
            (output,) = mixed.llm.generate([asked], parameters, use_tqdm=False)
            answers.setdefault((policy, min_context), []).append(output.outputs[0].token_ids)
            return output.num_cached_tokens

        whole, answers = 600 // S * S, {}
        narrow, other = "a_shape(sinks=16, window=64)", "a_shape(sinks=16, window=96)"
        assert cached(narrow) == 0
        assert cached() == 0, "a dense request is not served sparse pages"
        assert cached() == cached("quest(budget=64)") == cached(narrow) == whole
        assert cached(other) == cached(narrow, min_context=300) == 0, "another policy"
        assert cached(f"{narrow} + quest(budget=64)") == whole, "that decodes otherwise"
        assert cached(narrow, "mine") == cached(salt="mine") == 0
        assert cached(narrow, "mine") == cached(salt="mine") == whole
        forged = '[null, "a_shape(sinks=16, block=64, last=0, window=64) from 0"]'
        assert cached(salt=forged) == 0
        assert all(len(set(map(tuple, same))) == 1 for same in answers.values())
        assert answers[narrow, 0][0] != answers[None, 0][0]


def test_what_was_read_for_a_prompt_s_end_is_nobody_else_s(engine, random_llama, prompts):
    """Nor is it its own again; what others left is not read so either."""
    (prompt,) = prompts(600)
    offer = {"policy": "minference(vertical=30, slash=100, sinks=0)", "allow": ["quest"]}
    options = {"max_model_len": 1024, "max_num_batched_tokens": 2048}
    with engine(random_llama(), offer, **options) as planned:
        first, second, dense, again = (
            planned.run([prompt], 12, extra_args={"kvplug": line} if line else None)[0]
            for line in (None, None, "dense", "dense")
        )
        assert [each.num_cached_tokens for each in (first, second, dense)] == [0, 0, 0]
        assert again.num_cached_tokens > 550
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        assert first.outputs[0].token_ids != dense.outputs[0].token_ids
        children = planned.run([prompt], 12, n=3, temperature=1, top_k=1)[0]
        assert {tuple(child.token_ids) for child in children.outputs} == {
            tuple(first.outputs[0].token_ids)
        }


@pytest.mark.both
@pytest.mark.parametrize(
    "policy, shape, size, dtype",
    [
        (
            "xattention(threshold=0.8, sinks=32)",
            {"heads": 9, "kv_heads": 3, "head_dim": 64},
            *(32, "float32"),
        ),
        (
            "xattention(threshold=0.8, sinks=32)",
            {"heads": 8, "kv_heads": 1, "head_dim": 64},
            *(32, "bfloat16"),
        ),
        (
            "block_quest(budget=192, sinks=32, block=128) + quest(budget=96, dense_layers=0)",
            {"heads": 4, "kv_heads": 1, "head_dim": 32},
            *(64, "float32"),
        ),
        (
            "block_quest(budget=192, sinks=32) + twilight(budget=0.2, dense_layers=0)",
            {"heads": 4, "kv_heads": 2, "head_dim": 64},
            *(64, "float32"),
        ),
        (
            "flexprefill(threshold=0.5, sinks=32, min_budget=64) + quest(budget=96)",
            {"heads": 6, "kv_heads": 2, "head_dim": 64},
            *(32, "float32"),
        ),
        (
            "xattention(stride=16, threshold=0.6, sinks=0, last=9) + twilight(budget=0.2)",
            {"heads": 2, "kv_heads": 2, "head_dim": 128},
            *(128, "float32"),
        ),
    ],
)
def test_blocks_read_what_was_chosen_and_nothing_else(
    engine, random_llama, prompts, monkeypatch, policy, shape, size, dtype
):
    shadow, batch = Shadow(monkeypatch), prompts(700, 350, 90, 1)
    options = {"block_size": size, "max_num_batched_tokens": 100, "dtype": dtype}
    options["kv_cache_memory_bytes"] = 1 << 25
    with engine(random_llama(**shape), {"policy": policy}, **options) as planned:
        planned.generate(batch, 4)
        before = shadow.blocks
        cached = planned.run([batch[0][:650] + batch[1]], 4)[0].num_cached_tokens
        assert cached == (0 if policy.startswith("flex") else 650 // size * size)
        assert shadow.blocks > before > 0
        assert shadow.spared


@pytest.mark.both
def test_each_head_reads_by_its_own_pattern(engine, random_llama, prompts, monkeypatch, tmp_path):
    from kvplug_vllm import attention, compat

    watched = heads.Watched(
        monkeypatch, attention, attention.PlannedImpl, "_pages",
        lambda layer: compat.layer_index(layer.layer_name),
    )  # fmt: skip
    with engine(random_llama(), {"policy": heads.line(tmp_path)}) as planned:
        planned.generate(prompts(700, 350), 4)
    assert watched.heads == {(0, 0, heads.B), (0, 1, heads.C), (1, 0, heads.A), (1, 1, heads.B)}


@pytest.mark.parametrize(
    "policy",
    [
        "random_prefill(budget=128, sinks=32)",
        "block_quest(budget=160, sinks=32) + snapkv(budget=96, window=32) + "
        "twilight(budget=64, dense_layers=0)",
        pytest.param(
            "xattention(threshold=0.7, sinks=32) + streaming_llm(sinks=40, window=300) + "
            "quest(budget=96, dense_layers=0)",
            marks=pytest.mark.cpu,
        ),
    ],
)
def test_blocks_are_chosen_for_alike_in_chunks_a_batch_and_after_a_preemption(
    engine, random_llama, prompts, policy
):
    batch = prompts(448, 512, 480, 431, 97)
    options = {"max_num_batched_tokens": 2048, "max_model_len": 1024}
    with engine(random_llama(), {"policy": policy}, **options) as planned:
        planned.poison(freed=False)
        answers = solo(planned, batch, 40)
        assert planned.builders[0].selected_blocks
        assert planned.generate(batch, 40) == answers
        planned.forget()
        # Chunks that end on the grid of blocks; others cut some in two, with two means.
        planned.scheduler.scheduler_config.long_prefill_token_threshold = 128
        assert planned.generate(batch, 40) == answers
        planned.forget()
        planned.scheduler.scheduler_config.long_prefill_token_threshold = 0
        hostages = planned.pool.get_new_blocks(planned.free_blocks - 50)
        seen = preemptions(planned)
        assert planned.generate(batch, 40) == answers
        assert seen or "+" in policy, "the pool was meant to be too small for what keeps all"
        planned.pool.free_blocks(hostages)


@pytest.mark.both
def test_sinks_of_query_heads_are_no_block_s(engine, prompts, tmp_path):
    from kvplug_evals.models.random_gpt_oss import build_random_gpt_oss

    build_random_gpt_oss(tmp_path)
    wanted = "xattention reads each KV head's pages .* use a_shape or tri_shape"
    with pytest.raises(ValueError, match=wanted), engine(tmp_path, {"policy": "xattention"}):
        pass
    with engine(tmp_path, {"policy": "tri_shape(sinks=32, window=64)"}) as planned:
        assert planned.generate(prompts(300), 4)


@pytest.mark.both
def test_what_a_prompt_asks_last_finds_its_answer(engine, recall):
    """8 look-ups in 3,900 tokens, of which prompts read 0.4 at most, their last block included."""
    from kvplug_evals.models.recall import recall_prompt

    asked = recall_prompt(3900, 64, 8, seed=3)
    prompts, found = [[*asked.tokens, each] for each in asked.questions], {}
    offer = {"policy": "dense", "allow": ["xattention"]}
    with engine(recall, offer, enable_prefix_caching=False) as planned:
        for last in (64, 0):
            line = f"xattention(threshold=0.5, budget=800, sinks=32, last={last})"
            answers = planned.generate(prompts, 1, extra_args={"kvplug": line})
            pairs = zip(answers, asked.answers, strict=True)
            found[last] = sum(one[0] == wanted[0] for one, wanted in pairs)
    assert found[64] == 8
    assert found[0] < 8, "the question's own block reads what is near alike"
