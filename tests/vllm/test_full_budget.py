"""With the whole cache as budget every policy is the stock engine, token for token."""

import contextlib
from pathlib import Path

import pytest
import twin

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POLICIES = [
    "dense",
    "quest(budget=8192)",
    "block_quest(budget=8192, sinks=32) + twilight(budget=1.0, candidates=1.0, dense_layers=0)",
    "twilight(budget=1.0, dense_layers=0)",
    "streaming_llm(sinks=4, window=8192)",
    "streaming_llm(sinks=40, window=8192) + quest(budget=8192, dense_layers=0)",
    "random_prefill(budget=8192) + quest(budget=8192, top_p=1.0, dense_layers=0)",
    "tri_shape(sinks=40, window=8192) + quest(budget=8192, dense_layers=0)",
    "xattention(threshold=1.0, sinks=32) + quest(budget=8192, dense_layers=0)",
    "minference(vertical=8192, slash=8192) + quest(budget=8192, dense_layers=0)",
    "flexprefill(threshold=1.0, min_budget=8192) + quest(budget=8192, dense_layers=0)",
]
PACKING = [
    "snapkv(budget=4096)",
    "keydiff(budget=4096) + quest(budget=4096, dense_layers=0)",
    "pyramid(snapkv(budget=4096), beta=1.2)",
]
CASES = [("recall", policy) for policy in POLICIES] + [
    # SmolLM2 under those that do most: thirty layers take a minute.
    pytest.param("smollm2", policy, marks=pytest.mark.cpu)
    for policy in (POLICIES[1], POLICIES[3], POLICIES[5])
]

GRAPHS = twin.MODE.startswith("graphs")
EAGER = [False, True] if GRAPHS else [False]


def conversation(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """A ragged batch that shares a prefix, and the same requests a turn later."""
    if model.name == "recall":
        from kvplug_evals.models.recall import recall_prompt

        asked = recall_prompt(1500, 64, 4, seed=3, hops=4)
        first = [
            [*asked.tokens[:cut], question]
            for cut, question in zip((1500, 1500, 700, 33), asked.questions, strict=True)
        ]
    else:
        import pydoc_data.topics

        from transformers import AutoTokenizer

        text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
        ids = AutoTokenizer.from_pretrained(model)(text[:8000])["input_ids"]
        first = [ids[:420], ids[:320] + ids[700:760], ids[1000:1031], ids[:1]]
    return first, [prompt + first[0][:50] for prompt in first]


def turns(engine, model):
    first, second = conversation(model)
    return engine.generate(first, 12), engine.generate(second, 12)


def steps(eager: bool):
    """Engines that start within capture no graph, where others do."""
    if not eager:
        return contextlib.nullcontext()
    from cuda_path import eagerly

    return eagerly()


@pytest.fixture(scope="module")
def stock(engine):
    """Tokens of the stock engine, by model."""
    answers = {}

    def of(model: Path, eager: bool):
        if (model, eager) not in answers:
            with steps(eager), engine(model) as plain:
                answers[model, eager] = turns(plain, model)
                plain.forget()
                first = conversation(model)[0]
                solo = [plain.generate([prompt], 12)[0] for prompt in first]
                same = sum(a == b for a, b in zip(solo, answers[model, eager][0], strict=True))
                print(f"stock {model.name}: solo equals batch for {same} of {len(solo)} requests")
        return answers[model, eager]

    return of


@pytest.mark.both
@pytest.mark.parametrize("name, policy", CASES)
@pytest.mark.parametrize("eager", EAGER, ids=["as it starts", "eager"][: len(EAGER)])
def test_full_budget_equals_stock(engine, stock, request, eager, name, policy):
    model = request.getfixturevalue(name)
    expected = stock(model, eager)
    with steps(eager), engine(model, {"policy": policy}) as planned:
        assert turns(planned, model) == expected
        assert not any(planned.selected), "nothing to select: the stock path serves it"
        cached = planned.run([conversation(model)[1][0]], 1)[0].num_cached_tokens
        whole = len(conversation(model)[0][0]) // 32 * 32
        assert cached >= whole or policy.startswith(("minference", "flex")), (
            "the prefix cache is on"
        )

        planned.forget()
        planned.without_shortcut()
        assert turns(planned, model) == expected
        decoded = 2 * 4 * 11
        if "quest" in policy or "twilight" in policy:
            dense_layers = 0 if "dense_layers=0" in policy else 2
            if name == "recall" and dense_layers:
                return  # a model of two layers: both are dense
            layers = len(planned.selected)
            assert planned.selected == [0] * dense_layers + [decoded] * (layers - dense_layers)


@pytest.mark.skipif(not GRAPHS, reason="test_eviction.py asks it of steps as they are")
@pytest.mark.parametrize("policy", PACKING)
def test_prompts_packed_whole_equal_stock_in_eager_steps(engine, stock, recall, policy):
    expected = stock(recall, True)
    with steps(True), engine(recall, {"policy": policy, "shortcut": False}) as planned:
        assert turns(planned, recall) == expected
        assert [impl.packed_prompts for impl in planned.impls] == [8, 8]
