"""StreamingLLM returns memory to the engine: capacity, live requests, prefixes, poison."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGE = 32


def held(engine) -> dict[str, int]:
    """Blocks that each live request holds."""
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    return {
        request: sum(not block.is_null for block in blocks)
        for request, blocks in manager.req_to_blocks.items()
    }


def concurrency(engine) -> float:
    """What vLLM's start-up line says: "Maximum concurrency for … tokens per request"."""
    return engine.config.cache_config.kv_cache_max_concurrency


@pytest.mark.cpu  # asynchronous scheduling has two steps' tokens in flight, in a pool of this size
def test_capacity_grows_and_that_many_requests_run_at_once(engine, random_llama, prompts):
    model = random_llama()
    options = {
        "max_model_len": 8192,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": 321,
        "max_num_seqs": 64,
    }
    with engine(model, {"policy": "dense"}, **options) as planned:
        dense = concurrency(planned)
    policy = "streaming_llm(sinks=32, window=480)"
    with engine(model, {"policy": policy}, **options) as planned:
        streaming = concurrency(planned)
        promised = 8192 / (-(-(32 + 480 + 512) // PAGE) * PAGE)
        assert streaming / dense >= 0.9 * promised

        # That many requests, each longer than its share of a dense pool, decode at once.
        from vllm import SamplingParams

        count = int(streaming)
        assert count * 4096 > 3 * 320 * PAGE, "a dense pool could not hold a third of them"
        core = planned.llm.llm_engine
        for index, prompt in enumerate(prompts(*[4096 + i for i in range(count)])):
            core.add_request(
                f"r{index}",
                {"prompt_token_ids": prompt},
                SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, detokenize=False),
            )
        together = most = 0
        while core.has_unfinished_requests():
            core.step()
            decoding = [r for r in planned.scheduler.running if r.num_output_tokens]
            together = max(together, len(decoding))
            most = max(most, *held(planned).values(), 0)
        assert together == count
        (group,) = planned.scheduler.kv_cache_config.kv_cache_groups
        assert most <= group.kv_cache_spec.most_blocks(8192)
        assert planned.free_blocks == 320


def test_blocks_return_during_prefill_and_none_that_is_freed_is_read(
    engine, random_llama, prompts
):
    (long,) = prompts(1500)
    policy = {"policy": "streaming_llm(sinks=40, window=100)"}
    with engine(random_llama(), policy, enable_prefix_caching=False) as planned:
        clean = planned.generate([long], 40)
        returned = planned.poison(freed=True)
        assert planned.generate([long], 40) == clean
        assert len(returned) > 35, "blocks went while the request lived"


@pytest.mark.parametrize("protect", [None, 128, [[64, 96], [400, 470]]])
def test_a_later_turn_hits_the_whole_prefix_and_answers_the_same(
    engine, random_llama, prompts, protect
):
    first, question, other = prompts(1000, 40, 1600)
    policy = {"policy": "streaming_llm(sinks=4, window=200)"}
    if protect is not None:
        policy["protect"] = protect
    with engine(random_llama(), policy, num_gpu_blocks_override=100) as planned:
        answer = planned.generate([first], 30)[0]
        second = first + answer + question
        planned.forget()
        fresh = planned.generate([second], 30)
        planned.forget()
        planned.generate([first], 30)
        # Others overwrite much of the pool, middle pages of the first turn among it.
        planned.generate([other[:600]], 4)
        output = planned.run([second], 30)[0]
        assert [list(output.outputs[0].token_ids)] == fresh
        written = len(first) + len(answer) - 1  # the last answer token was never computed
        assert output.num_cached_tokens == written // PAGE * PAGE


def test_chunking_does_not_change_what_is_seen(engine, random_llama, prompts):
    batch = prompts(700, 350, 90, 1)
    policy = {"policy": "streaming_llm(sinks=4, window=70)", "protect": [[100, 130]]}
    answers = []
    for chunk in (64, 256, 1024):
        with engine(random_llama(), policy, max_num_batched_tokens=chunk) as planned:
            answers.append(planned.generate(batch, 24))
    assert answers[0] == answers[1] == answers[2]
