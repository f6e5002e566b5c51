"""A page's format: how a line names it, what it stands beside, what a server with it serves."""

from __future__ import annotations

import re

import pytest
import torch

from kvplug import Refused, Sharing, parse, read_offer
from kvplug_kernels.encode_pages import encode_pages

FORMAT = "kivi(bits=4)"


@pytest.mark.parametrize(
    "line, selector",
    [
        ("kivi(bits=4)", None),
        ("kivi(bits=2, value_bits=4)", None),
        ("streaming_llm(sinks=4, window=1020) + kivi(bits=8)", None),
        (
            "snapkv(budget=1024, sinks=0, window=64, pool=5) + kivi(bits=4)"
            " + twilight(budget=0.125, bits=4, dense_layers=2)",
            4,
        ),
        ("kivi(bits=2) + quest(budget=1024, dense_layers=2)", 2),
    ],
)
def test_a_format_has_a_place_of_its_own_and_prints_as_it_is_read(line, selector):
    found = parse(line)
    assert str(found) == line
    assert parse(str(found)) == found
    assert found == parse(" + ".join(reversed(line.split(" + "))))
    assert found.plans
    assert found.format is not None
    assert found.selector is None or found.selector.digest.bits == selector


@pytest.mark.parametrize(
    "line, message",
    [
        ("kivi + kivi(bits=2)", "both answer the stage 'format of pages'"),
        ("kivi(bits=3)", "bits must be 2, 4 or 8, got 3; write kivi(bits=4)"),
        ("kivi(value_bits=1)", "value_bits must be 2, 4 or 8, got 1; write kivi(value_bits=4)"),
        (
            "kivi + twilight(budget=0.125)",
            "got twilight(budget=0.125, bits=2, dense_layers=2); write kivi(bits=4) + "
            "twilight(budget=0.125, bits=4, dense_layers=2)",
        ),
        ("kivi + quest(top_p=0.9)", "leave top_p out, or use twilight"),
        ("kivi + kvzip(budget=0.25, chunk=512)", "alone"),
    ],
)
def test_lines_that_no_format_can_carry_out(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(line)


def test_only_what_evicts_keeps_pages_from_others():
    assert parse("kivi + twilight(bits=4)").publishes is Sharing.PLAIN
    assert parse("kivi + streaming_llm").publishes is Sharing.OWN
    assert parse("kivi + snapkv").publishes is Sharing.NOBODY


def offer(**given):
    return read_offer({"policy": FORMAT, **given}, environ={})


def test_pages_in_codes_carry_no_digest_and_every_selector_reads_them():
    mixed = offer(allow=["twilight", "quest"])
    assert mixed.digest is None
    assert mixed.digest_rows(32, 2) == (0, 0)
    assert [each.digest for each in mixed.selectors] == [mixed.format.codes] * 2


def test_requests_get_the_servers_format_and_cannot_choose_another():
    mixed = offer(allow=["twilight", "snapkv"], max_budget=512)
    for asked, line in (
        ("snapkv(budget=64, window=16)", "snapkv(budget=64, sinks=0, window=16, pool=5) + "),
        ("dense", ""),
        (FORMAT, ""),
    ):
        assert str(mixed.settings_for(asked).policy) == line + FORMAT
    for asked in ("kivi(bits=2)", {"min_context": 64}, {"policy": "dense", "min_context": 1}):
        with pytest.raises(Refused, match=r"all pages of this server are kept as kivi\(bits=4\)"):
            mixed.settings_for(asked)
    with pytest.raises(Refused, match="lets no request choose"):
        offer().settings_for("dense")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"policy": "quest", "allow": ["kivi"]}, 'drop it from "allow"'),
        ({"policy": FORMAT, "min_context": 4}, 'write {"min_context": 0}'),
    ],
)
def test_servers_that_could_not_keep_their_format(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_offer(given, environ={})


@pytest.mark.parametrize("bits, times", [(8, 1.7), (4, 3.0), (2, 5.0)])
@pytest.mark.parametrize("head_size", [64, 128])
def test_a_page_is_so_many_times_smaller(bits, times, head_size):
    layout = parse(f"kivi(bits={bits})").format.layout(64, head_size, torch.bfloat16)
    assert layout.plain_bytes / layout.page_bytes >= times


def test_pages_that_no_engine_has_are_refused_with_the_flag():
    with pytest.raises(ValueError, match="blocks of 16; write --block-size 32"):
        parse(FORMAT).format.layout(16, 64, torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quest_over_codes_bounds_every_key_as_it_is_read(bits):
    from kvplug_kernels.decode_pages import decode_pages

    made = torch.Generator().manual_seed(bits)
    H, S, D, pages = 2, 32, 16, 5
    policy = parse(f"kivi(bits={bits}) + quest(budget=64)")
    layout = policy.format.layout(S, D, torch.float32)
    cache = torch.zeros(pages, H, layout.page_bytes, dtype=torch.uint8)
    keys, values = torch.randn(2, pages, S, H, D, generator=made)
    encode_pages(cache, keys, values, torch.arange(pages), layout)
    query = torch.randn(1, H, 2, D, generator=made)
    table = torch.arange(pages, dtype=torch.int32)[None]
    count = torch.tensor([pages], dtype=torch.int32)
    scores = policy.selector.score(query, layout.keys(cache), table, count, S)[0]
    read, _ = decode_pages(cache, torch.arange(pages), layout)
    best = torch.einsum("hgd,pshd->hpsg", query[0], read).amax((2, 3))
    assert (scores[:, :-1] >= best[:, :-1] - 1e-5).all()
    assert scores[:, -1].isneginf().all(), "the newest page has no codes"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head", [64, 96, 128])
def test_blocks_of_codes_that_hold_a_plain_page(bits, head):
    layout = parse(f"kivi(bits={bits})").format.layout(32, head, torch.bfloat16)
    block, token = layout.token_bytes * 32, layout.plain_bytes // 32
    assert block >= layout.page_bytes > block - 32
    assert layout.plain_tokens * token <= block < (layout.plain_tokens + 1) * token
    assert (layout.plain_pages - 1) * layout.plain_tokens < 32
    assert layout.plain_pages * layout.plain_tokens >= 32


MIXED = "kivi(bits=2, first=2, bits_first=4)"


def test_the_first_layers_may_have_other_bits():
    found = parse(f"{MIXED} + twilight(budget=0.125, bits=2, dense_layers=2)")
    assert str(found.format) == MIXED
    assert [str(found.format.in_layer(n)) for n in range(3)] == [
        "kivi(bits=4)", "kivi(bits=4)", "kivi(bits=2)",
    ]  # fmt: skip
    assert found.selector.digest.bits == 2
    own = parse("kivi(bits=8, value_bits=2, first=1, bits_first=4)").format
    assert [str(own.in_layer(n)) for n in range(2)] == [
        "kivi(bits=4)",
        "kivi(bits=8, value_bits=2)",
    ]
    shapes = [each.key_bits for each in found.format.layouts(3, 64, 64, torch.bfloat16)]
    assert shapes == [4, 4, 2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("kivi(first=2)", "first and bits_first go together, got first=2, bits_first=None; write"),
        ("kivi(first=0, bits_first=4)", "first must be a number of layers, at least 1, got 0"),
        ("kivi(first=1, bits_first=3)", "got 3; write kivi(first=1, bits_first=4)"),
        (
            f"{MIXED} + twilight(bits=2, dense_layers=1)",
            "by codes of one width, and the first 2 layers of kivi(bits=2, first=2, bits_first=4) "
            "have another, got",
        ),
        (f"{MIXED} + quest(dense_layers=0)", "write dense_layers=2"),
    ],
)
def test_first_layers_that_no_format_can_have(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(line)
