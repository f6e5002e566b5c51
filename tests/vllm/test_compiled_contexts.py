"""Compiled contexts: against a plain Llama whose later queries see what was kept of them."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from kvplug.compiling import repetitions
from tests.plain_llama import Plain
from tests.vllm.test_lifecycle import preemptions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S, CHUNK, SINKS = 32, 128, 4
LINE = f"kvzip(budget=0.25, chunk={CHUNK})"
COMPILE = {"kvplug": {"compile": True}}


class Compiled(Plain):
    """Queries behind ``chunks`` chunks of a context see of them what the formula keeps."""

    def __init__(self, model, policy):
        super().__init__(model, policy, S)
        self.keep = self.schedule.kept * S
        self.kept: dict[int, list[torch.Tensor]] = {}
        """By layer, of each chunk. [H, n] ascending"""
        self.compiling, self.chunks = False, 0

    def compile(self, context):
        self.kept, self.compiling = {}, True
        with torch.inference_mode():
            for prompt in repetitions(context, CHUNK):
                self.model(torch.tensor([prompt]))
        self.compiling = False

    def seen(self, query, key, value, scaling, first_head):
        (H, T, _), layer = key.shape, first_head // len(key)
        seen = torch.ones(T, T, dtype=torch.bool).tril().repeat(H, 1, 1)
        if self.compiling:
            self.kept.setdefault(layer, []).append(self.keeps(query, key, scaling))
            return seen
        begin = self.chunks * CHUNK
        if begin:
            seen[:, begin:, :begin] = False
            for kept in self.kept[layer][: self.chunks]:
                seen[:, begin:] |= torch.zeros(H, T, dtype=torch.bool).scatter(1, kept, True)[
                    :, None
                ]
        return seen

    def keeps(self, query, key, scaling):
        """The definition, a query at a time."""
        H, T, _ = key.shape
        begin = T - 2 * CHUNK
        first = min(begin, SINKS)
        best = torch.zeros(H, CHUNK)
        for row in range(T - CHUNK, T):
            among = [*range(first), *range(begin, row + 1)]
            logits = query[:, row].unflatten(0, (H, -1)) @ key[:, among].mT * scaling
            best = best.maximum(logits.softmax(2)[..., first : first + CHUNK].amax(1))
        if not begin:
            best[:, :SINKS] = 2
        return begin + best.topk(self.keep).indices.sort().values

    def agrees(self, prompt, answer, chunks=0):
        self.chunks = chunks
        return super().agrees(prompt, answer)


def compile_context(engine, context, *beside):
    """Every whole chunk of it at once, and requests that came before. -> their answers"""
    asked = [*repetitions(context, CHUNK)]
    given = [
        SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, extra_args=extra, max_tokens=tokens
        )
        for extra, tokens in [(None, 40)] * len(beside) + [(COMPILE, 1)] * len(asked)
    ]
    said = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in [*beside, *asked]], given, use_tqdm=False
    )
    return [list(each.outputs[0].token_ids) for each in said[: len(beside)]]


def kept_sets(engine):
    """(layer, chunk) -> the positions that its heads keep, as the engine packs them, and the
    blocks that these are packed into."""
    found = {}
    for number, impl in enumerate(engine.impls):

        def record(layer, kv_cache, packing, prompt, tokens, number=number, store=impl.store_kept):
            begin = packing.event.pages.start * S
            found[number, begin // CHUNK] = begin + tokens[0], packing.private[0].tolist()
            store(layer, kv_cache, packing, prompt, tokens)

        impl.store_kept = record
    return found


def ask(engine, prompt, tokens=40):
    (said,) = engine.run([prompt], tokens)
    return list(said.outputs[0].token_ids), said.num_cached_tokens


@pytest.mark.both
def test_whoever_comes_with_a_compiled_context_sees_what_was_kept_of_it(
    engine, random_llama, prompts
):
    model = random_llama(layers=3)
    context, question, other, more = prompts(3 * CHUNK + 40, 50, 70, 60)
    plain = Compiled(model, LINE)
    plain.compile(context)
    # One token less than two chunks: the last token of a repetition comes in a step of its own.
    with engine(model, {"policy": LINE}, max_num_batched_tokens=2 * CHUNK - 1) as planned:
        planned.poison(freed=False)
        free = planned.free_blocks
        whole = ask(planned, context + question)
        assert plain.agrees(context + question, whole[0]) == 40
        sets = kept_sets(planned)
        assert compile_context(planned, context, context + question) == [whole[0]]
        assert planned.free_blocks == free
        for (layer, chunk), (found, _) in sets.items():
            assert torch.equal(found, plain.kept[layer][chunk]), (layer, chunk)
        assert len(sets) == 9

        answer, cached = ask(planned, context + question)
        assert cached == 3 * CHUNK
        assert plain.agrees(context + question, answer, 3) == 40
        assert plain.agrees(context + question, answer) < 40, "not what the whole context says"
        asked = {
            "turn": (context + question + answer + more, 3, 3 * CHUNK + 4 * S),
            "another's question": (context[: 3 * CHUNK] + other, 3, 3 * CHUNK),
            "shares two chunks": (context[: 2 * CHUNK + 40] + other, 2, 2 * CHUNK),
            "last token of a chunk differs": (
                [*context[: 2 * CHUNK - 1], context[2 * CHUNK - 1] ^ 1, *other], 1, CHUNK,
            ),
            "first token differs": ([context[0] ^ 1, *context[1:], *other], 0, 0),
            "no more than two chunks": (context[: 2 * CHUNK], 1, 2 * CHUNK - S),
        }  # fmt: skip
        alone = {}
        for name, (prompt, chunks, hit) in asked.items():
            alone[name], cached = ask(planned, prompt)
            assert cached == hit, name
            assert plain.agrees(prompt, alone[name], chunks) == 40, name
        batch = [prompt for prompt, _, _ in asked.values()]
        assert planned.generate(batch, 40) == list(alone.values())

        # What a replayed step ends with is packed before the next one runs, from blocks that may
        # have been handed out by then; nobody has written to them.
        del planned.pool.get_new_blocks, planned.pool.free_blocks
        (second,) = prompts(2 * CHUNK, seed=1)
        plain.compile(second)
        sets.clear()
        for prompt in repetitions(second, CHUNK):
            planned.generate([prompt], 1, extra_args=COMPILE)
        answer, cached = ask(planned, second + other)
        assert (cached, plain.agrees(second + other, answer, 2)) == (2 * CHUNK, 40)
        assert len(sets) == 6
        for (layer, chunk), (found, _) in sets.items():
            assert torch.equal(found, plain.kept[layer][chunk]), (layer, chunk)
        assert planned.free_blocks == free


def test_what_left_the_pool_is_served_whole_and_what_comes_back_finds_it_again(
    engine, random_llama, prompts
):
    """Preempted as whole and as compiled, in a pool that holds few of them."""
    context, *questions = prompts(4 * CHUNK, *[30 + n for n in range(6)])
    model, turns = random_llama(), [context + question for question in questions]
    plain = Compiled(model, LINE)
    plain.compile(context)
    with engine(
        model, {"policy": LINE}, num_gpu_blocks_override=30, max_num_batched_tokens=128,
        max_model_len=800,
    ) as planned:  # fmt: skip
        planned.poison(freed=False)
        free = planned.free_blocks
        sets = kept_sets(planned)
        compile_context(planned, context)
        alone = [ask(planned, turn, 100) for turn in turns]
        assert {cached for _, cached in alone} == {4 * CHUNK}
        answers = [answer for answer, _ in alone]
        assert [plain.agrees(*each, 4) for each in zip(turns, answers, strict=True)] == [100] * 6
        seen = preemptions(planned)
        hostages = planned.pool.get_new_blocks(free - 14)
        assert planned.generate(turns, 100) == answers
        assert len(seen) >= 2, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free

        (block,) = sets[0, 2][1]
        planned.pool._maybe_evict_cached_block(planned.pool.blocks[block])
        answer, cached = ask(planned, turns[0])
        assert cached == 2 * CHUNK, "up to the chunk that is gone"
        assert plain.agrees(turns[0], answer, 2) == 40
        planned.forget()
        answer, cached = ask(planned, turns[0])
        assert (cached, plain.agrees(turns[0], answer)) == (0, 40)


@pytest.mark.cpu
@pytest.mark.started
def test_a_worker_of_its_own_process_hears_what_a_request_finds_when_it_comes_back(
    engine, random_llama, prompts
):
    """As `vllm serve` has it on a CPU: half of the context left the cache meanwhile."""
    context, *questions = prompts(4 * CHUNK, 30, 31, 32, 33, 34, 35)
    model, turns = random_llama(), [context + question for question in questions]
    plain = Compiled(model, LINE)
    plain.compile(context)
    with engine(
        model, {"policy": LINE}, num_gpu_blocks_override=30, max_num_batched_tokens=128,
        max_model_len=800, distributed_executor_backend="mp",
    ) as planned:  # fmt: skip
        compile_context(planned, context)
        free, begun, pool = planned.free_blocks, {}, planned.pool
        (manager,) = planned.scheduler.kv_cache_manager.coordinator.single_type_managers
        preempt = planned.scheduler._preempt_request

        def away(request, *args, **kwargs):
            end = request.block_hashes[3 * CHUNK // S - 1]
            third = pool.get_cached_block(manager.kv_cache_spec.name(bytes(end), 0), [0])
            for block in third or ():
                pool._maybe_evict_cached_block(block)
            begun.setdefault(tuple(request.prompt_token_ids), request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        planned.scheduler._preempt_request = away
        hostages = pool.get_new_blocks(free - 20)
        answers = planned.generate(turns, 100)
        assert begun, "the pool was meant to be too small"
        pool.free_blocks(hostages)
        for turn, answer in zip(turns, answers, strict=True):
            n = begun.get(tuple(turn), 100)
            assert plain.agrees(turn, answer[:n], 4) == n
            assert plain.agrees(turn + answer[:n], answer[n:], 2) == 100 - n


@pytest.mark.cpu
def test_layers_that_see_a_window_are_refused(engine, random_llama):
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}
    with (
        pytest.raises(ValueError, match="needs layers that all see the whole context"),
        engine(random_llama(), {"policy": LINE}, hf_overrides=kinds),
    ):
        raise AssertionError("it started")


@pytest.mark.cpu
def test_a_block_has_a_name_for_each_policy_and_for_what_it_was_computed_behind():
    from kvplug import read_offer
    from kvplug_vllm.compiling import CompilingSpec
    from kvplug_vllm.settings import EvictionSettings

    def spec(line, **more):
        settings = EvictionSettings.of(read_offer({"policy": line, **more}, environ={}))
        shape = {"block_size": S, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
        return CompilingSpec(**shape, settings=settings, in_flight=64)

    specs = [
        spec(LINE), spec(f"kvzip(budget=0.5, chunk={CHUNK})"), spec("kvzip(budget=0.25)"),
        spec(LINE, protect=[[5, 9]]),
    ]  # fmt: skip
    names = [each.name(end, n) for each in specs for end in (b"one", b"two") for n in range(2)]
    names += [each.name_behind(b"one", chunks) for each in specs for chunks in (1, 2)]
    assert len(set(names)) == len(names) == 24
    assert specs[0].name(b"one", 0) == spec(LINE).name(b"one", 0)
