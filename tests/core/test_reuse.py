"""Chunks taken from elsewhere: where a prompt's tokens lie, what they see, how their keys turn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvplug import (
    BatchPlanner,
    Planner,
    Refused,
    Rotation,
    arrange,
    parse,
    read_offer,
    read_settings,
    rearranged,
    turn,
)
from kvplug.segments import SINKS

LINE = "blend(links=8)"


@st.composite
def requests(draw):
    """Chunks, some of which touch, of a prompt with or without something behind them; a page size
    and links."""
    spans, end = [], 0
    for _ in range(draw(st.integers(1, 4))):
        first = end + draw(st.sampled_from([0, 0, 1, 7, 20]))
        end = first + draw(st.integers(1, 60))
        spans.append((first, end))
    prompt = end + draw(st.sampled_from([0, 1, 5, 30]))
    return tuple(spans), prompt, draw(st.sampled_from([1, 4, 16])), draw(st.integers(0, 20))


@given(requests())
def test_a_prompt_lies_pages_first_and_is_whole(case):
    chunks, prompt, size, links = case
    policy = parse(f"blend(links={links})").reuse
    arrangement = arrange(policy, chunks, prompt, size)
    order, taken = arrangement.order, arrangement.cached * size
    assert sorted(order.tolist()) == list(range(prompt))
    assert taken < prompt
    assert prompt - 1 not in order[:taken], "what comes next is asked of it"
    assert (np.diff(order[taken:]) > 0).all()
    page = 0
    for each in arrangement.placed:
        first, last = chunks[each.chunk]
        assert each.start == first
        for number in each.pages:
            begin = first + number * size
            assert order[page * size : (page + 1) * size].tolist() == [*range(begin, begin + size)]
            assert begin + size <= last
            assert begin >= first + links or first == 0
            page += 1
    assert page == arrangement.cached
    chunk, pages, shift = arrangement.sources
    begins = np.array([chunks[one][0] for one in chunk], np.int64)
    assert (shift == begins).all()
    assert (order[:taken:size] == begins + pages * size).all()
    assert rearranged(range(prompt), arrangement) == order.tolist()
    assert arrangement.logical(np.arange(prompt + 3)).tolist() == [
        *order.tolist(), prompt, prompt + 1, prompt + 2,
    ]  # fmt: skip


@given(requests(), st.data())
def test_every_query_sees_all_that_stands_before_it_however_a_prompt_is_cut(case, data):
    chunks, prompt, size, links = case
    offer = read_offer({"policy": f"blend(links={links})"}, environ={})
    settings = offer.settings_for({"chunks": [list(span) for span in chunks]})
    batch = BatchPlanner(size)
    batch.know([offer.settings, settings])
    arrangement = batch.planners[1].arrangement(prompt)
    computed = data.draw(st.integers(arrangement.cached * size, prompt + 1))
    total = data.draw(st.integers(computed + 1, prompt + 3))
    # Beside a request that decodes and one whose prompt is read as ever.
    step = [
        np.array(each) for each in ([0, 1, 0], [70, computed, 0], [71, total, 9], [60, prompt, 9])
    ]
    segments = batch.plan(*step)
    flat = iter(range(1 + total - computed + 9))
    lies = np.append(arrangement.order, np.arange(prompt, prompt + 4))
    for n, row in enumerate(segments.row):
        for query in range(segments.queries[n]):
            assert next(flat) == segments.token[n] + query
            place = segments.start[n] + query
            kept, first = int(segments.kept[n]), int(segments.first[n])
            sees = [*range(kept * size), *range(first * size, place + 1)]
            assert place == segments.start[n] + query
            if row == 1:
                assert kept == 0 or segments.packed[n] == SINKS
                assert sorted(lies[sees].tolist()) == list(range(lies[place] + 1))
            else:
                assert sees == list(range(place + 1))
    assert next(flat, None) is None

    tokens, stands = batch.moved(*step)
    place = computed + np.arange(total - computed)
    moved = lies[place] != place
    assert tokens.tolist() == (1 + np.flatnonzero(moved)).tolist()
    assert stands.tolist() == lies[place][moved].tolist()


def test_what_lies_alike_is_called_alike_and_nothing_else():
    policy = parse(LINE).reuse
    spans = ((0, 40), (40, 100))
    arrangement = arrange(policy, spans, 110, 16)
    called = arrangement.own(LINE, None, ["a", "b"])
    assert arrange(policy, spans, 120, 16).own(LINE, None, ["a", "b"]) == called
    others = [
        arrangement.own(LINE, "mine", ["a", "b"]),
        arrangement.own(LINE, None, ["a", "c"]),
        arrangement.own("blend(links=3)", None, ["a", "b"]),
        arrange(policy, ((0, 40), (41, 100)), 110, 16).own(LINE, None, ["a", "b"]),
        arrange(parse("blend(links=20)").reuse, spans, 110, 16).own(LINE, None, ["a", "b"]),
    ]
    assert len({called, *others}) == 6


def test_who_names_no_chunks_is_planned_as_ever():
    planner = Planner(read_settings({"policy": LINE}, environ={}), 16)
    assert planner.plan(np.array([0]), np.array([90]), np.array([90])).untouched


MODELS = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip


def model(kind, **given):
    kind = "default" if kind == "partial" else kind
    return SimpleNamespace(
        architectures=["LlamaForCausalLM"], max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **given},
    )  # fmt: skip


def rotated(keys, positions, frequencies):
    """The definition, a token at a time. keys [T, H, D]"""
    out, n = keys.clone(), len(frequencies)
    for t, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            a, b = keys[t, :, i].double(), keys[t, :, i + n].double()
            out[t, :, i] = a * angle.cos() - b * angle.sin()
            out[t, :, i + n] = b * angle.cos() + a * angle.sin()
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_keys_that_are_turned_are_those_that_a_model_has_further_on(kind):
    found = Rotation.of(model(kind, **MODELS[kind]), 32)
    assert len(found.frequencies) == (8 if kind == "partial" else 16)
    keys = torch.randn(3 * 4, 2, 32)
    here = [
        *range(4),
        *range(8),
    ][:12]
    shifts = np.array([0, 100, 5000])
    there = [place + int(shifts[t // 4]) for t, place in enumerate(here)]
    before = rotated(keys, here, found.frequencies).unflatten(0, (3, 4))
    after = rotated(keys, there, found.frequencies).unflatten(0, (3, 4))
    torch.testing.assert_close(turn(before, *found.angles(shifts)), after, rtol=0, atol=1e-5)
    assert torch.equal(turn(before, *found.angles(shifts))[0], before[0])
    parts = [turn(before[part], *angles) for part, *angles in found.in_parts(shifts, 2)]
    assert torch.equal(torch.cat(parts), turn(before, *found.angles(shifts)))


@pytest.mark.parametrize("kind", MODELS)
def test_frequencies_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"rope_theta": 10000.0, "rope_type": "default" if kind == "partial" else kind}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, head_dim=32, max_position_embeddings=2048,
        rope_parameters={**given, **MODELS[kind]}, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    found = Rotation.of(config, 32).frequencies
    if kind in ("default", "partial"):
        dims = 2 * len(found)
        wanted = 1 / 10000.0 ** (torch.arange(0, dims, 2).float() / dims)
    else:
        wanted, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.testing.assert_close(torch.tensor(found).float(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config, reason",
    [
        (model("dynamic", factor=2.0), "scaled by 'dynamic'"),
        (model("longrope"), "scaled by 'longrope'"),
        (model("default", mrope_section=[2, 3, 3]), "M-RoPE"),
        (SimpleNamespace(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel were never moved"),
        (SimpleNamespace(architectures=["LlamaForCausalLM"]), "no rotary embedding"),
        (
            SimpleNamespace(
                architectures=["Qwen3ForCausalLM"],
                rope_parameters={"full_attention": {}, "sliding_attention": {}},
            ),
            "layers of the model rotate their keys differently",
        ),
    ],
)
def test_models_whose_keys_cannot_be_moved_are_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        Rotation.of(config, 32)


def test_a_request_names_ascending_chunks_of_its_own_prompt():
    offer = read_offer({"policy": LINE}, environ={})
    asked = offer.settings_for('{"chunks": [[0, 40], [40, 100]]}')
    assert asked.chunks == ((0, 40), (40, 100))
    assert asked.policy == offer.settings.policy
    offer.check_prompt(asked, 32, [1] * 100, 5)
    with pytest.raises(Refused, match="has 99 tokens, and a chunk of it is named that ends behi"):
        offer.check_prompt(asked, 32, [1] * 99, 5)
    with pytest.raises(Refused, match="images or audio"):
        offer.check_prompt(asked, 32, None, 5)
    for spans in ([], [[0, 0]], [[0, 40], [39, 50]], [[5, 2]], [0, 40], "[[0, 40]]", [[0, True]]):
        with pytest.raises(ValueError, match="ascending spans of tokens"):
            offer.settings_for({"chunks": spans})
    with pytest.raises(ValueError, match="and nothing else"):
        offer.settings_for({"chunks": [[0, 40]], "min_context": 5})
    with pytest.raises(Refused, match="serves policy 'dense'"):
        read_offer({"policy": "dense"}, environ={}).settings_for({"chunks": [[0, 40]]})


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"policy": f"{LINE} + quest(budget=512)"}, "write blend.links=8. alone"),
        ({"policy": "blend(links=-1)"}, "links must be a number of tokens"),
        ({"policy": LINE, "allow": ["quest"]}, "cannot share a server with other policies"),
        ({"policy": "dense", "allow": ["blend"]}, "blend serves alone"),
    ],
)
def test_what_was_never_run_beside_it_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        read_offer(given, environ={})
