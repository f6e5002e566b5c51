"""The line that names an experiment: printed, read back, and never evaluated."""

import contextlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvplug import (
    Action,
    Composition,
    Evidence,
    Granularity,
    Policy,
    Sharing,
    Stage,
    parse,
    registry,
)
from kvplug.policies.quest import Quest
from kvplug.policies.streaming_llm import StreamingLLM


@dataclass(frozen=True, kw_only=True)
class Wrapper(Policy):
    """A policy around another one, as third parties may write them."""

    name = "wrapper"
    stage = Stage.GENERATE
    action = Action.VISIBILITY
    granularity = Granularity.PAGE
    evidence = Evidence.NONE
    query_agnostic = True
    memory = reads = paper = ""

    base: Policy
    text: str = ""
    levels: tuple[int, ...] | None = None
    shift: float = 0.0


@pytest.fixture
def wrapper(monkeypatch):
    """Installs the wrapper beside the policies that are there."""
    entry = EntryPoint("wrapper", f"{__name__}:Wrapper", registry.GROUP)
    installed = registry._entries()
    monkeypatch.setattr(registry, "_entries", lambda: {**installed, "wrapper": entry})
    registry.policy_class.cache_clear()
    yield
    registry.policy_class.cache_clear()


quests = st.builds(
    Quest,
    budget=st.integers(1, 1 << 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True) | st.just(1),
    dense_layers=st.integers(0, 99),
)
streamings = st.builds(StreamingLLM, sinks=st.integers(0, 9999), window=st.integers(1, 1 << 40))
wrappers = st.deferred(
    lambda: st.builds(
        Wrapper,
        base=quests | streamings | wrappers,
        text=st.text(),
        levels=st.none() | st.lists(st.integers()).map(tuple),
        shift=st.floats(allow_nan=False, allow_infinity=False),
    )
)
compositions = st.tuples(
    *(st.none() | policies for policies in (quests, wrappers, streamings))
).flatmap(
    lambda picked: st.permutations([p for p in picked if p is not None]).map(
        lambda order: Composition(tuple(order))
    )
)


@given(compositions)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_printed_form_of_any_composition_parses_back_to_it(wrapper, composition):
    assert parse(str(composition)) == composition
    assert str(parse(str(composition))) == str(composition)


@pytest.mark.parametrize(
    "line, printed",
    [
        ("dense", "dense"),
        ("dense()", "dense"),
        ("quest", "quest(budget=2048, dense_layers=2)"),
        (" quest( budget = 1_024 ,top_p=.9)\n", "quest(budget=1024, top_p=0.9, dense_layers=2)"),
        ("quest(top_p=None)", "quest(budget=2048, dense_layers=2)"),
        ("streaming_llm", "streaming_llm(sinks=4, window=1020)"),
        (
            "quest + streaming_llm",
            "streaming_llm(sinks=4, window=1020) + quest(budget=2048, dense_layers=2)",
        ),
        ("(quest)", "quest(budget=2048, dense_layers=2)"),
    ],
)
def test_a_line_prints_in_full_with_its_stages_in_order(line, printed):
    assert str(parse(line)) == printed


def test_the_order_of_the_terms_does_not_matter(wrapper):
    lines = ["wrapper(quest)", "streaming_llm", "quest"]
    stages = [Stage.GENERATE, Stage.COMPRESS, Stage.LOAD]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        composition = parse(" + ".join(lines[i] for i in order))
        assert composition == parse(" + ".join(lines))
        assert [policy.stage for policy in composition] == stages


def test_a_wrapper_wraps_what_stands_in_its_parentheses(wrapper):
    (policy,) = parse("wrapper(wrapper(quest(budget=64)), shift=-1.5)")
    assert isinstance(policy, Wrapper)
    assert policy.shift == -1.5
    assert isinstance(policy.base, Wrapper)
    assert policy.base.base == Quest(budget=64)
    assert str(policy) == (
        "wrapper(wrapper(quest(budget=64, dense_layers=2), text='', shift=0.0), "
        "text='', shift=-1.5)"
    )


def test_a_composition_answers_by_stage():
    both = parse("quest(budget=1) + streaming_llm(window=1)")
    assert both.selector == Quest(budget=1)
    assert both.eviction == StreamingLLM(window=1)
    assert parse("dense").is_dense
    assert not both.is_dense
    assert both.publishes is Sharing.OWN


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').system('touch evaluated')",
        "__import__('os')",
        "quest(budget=__import__('os').getpid())",
        "quest(budget=open('evaluated', 'w').write(''))",
        "quest(**__import__('os').environ)",
        "[open('evaluated', 'w')][0]",
        "(lambda: open('evaluated', 'w'))()",
        "quest(budget=[open('evaluated', 'w') for _ in 'x'])",
        "quest if open('evaluated', 'w') else quest",
        "(x := quest)",
        'quest(budget=f\'{open("evaluated", "w")}\')',
    ],
)
def test_nothing_in_a_line_is_evaluated(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read|must be a plain value|unknown policy"):
        parse(line)
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=40) | st.text("quest streamig_l()+=,.0123456789'#\\\n", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_policy_or_a_value_error(line):
    with contextlib.suppress(ValueError):
        parse(line)


def test_without_a_stage_pages_keep_their_format_and_layers_their_windows():
    line = parse('kivi(bits=4) + local(layers="1", window=100) + snapkv + quest(budget=64)')
    rest = line.without(Stage.COMPRESS)
    assert rest == parse('kivi(bits=4) + local(layers="1", window=100) + quest(budget=64)')
    assert rest.selector.digest == line.format.codes
