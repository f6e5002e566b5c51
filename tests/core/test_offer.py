"""What a request may choose, and what it is told when it may not."""

from __future__ import annotations

import re

import pytest

import kvplug.offer
from kvplug import KeyCodes, Offer, Refused, Selector, Settings, parse, read_offer, read_settings
from kvplug.policies.quest import KeyExtremes, Quest
from kvplug.registry import policy_class

MIXED = {"policy": "snapkv(budget=1024)", "allow": ["quest", "knorm"], "max_budget": 2048}


def offer(**given) -> Offer:
    return read_offer(given, environ={})


def test_a_request_that_says_nothing_gets_the_servers_own():
    mixed = offer(**MIXED)
    assert mixed.settings_for(None) == mixed.settings == read_settings({"policy": MIXED["policy"]})


@pytest.mark.parametrize(
    "given, policy, min_context, protect",
    [
        ("knorm(budget=64)", "knorm(budget=64)", 0, ()),
        ("dense", "dense", 0, ()),
        ("snapkv + quest(budget=512)", "snapkv(budget=1024) + quest(budget=512)", 0, ()),
        ({"budget": 96}, "snapkv(budget=96)", 100, ((0, 4),)),
        ('{"budget": 96, "protect": 32}', "snapkv(budget=96)", 100, ((0, 32),)),
        ({"policy": "quest(budget=64)", "min_context": 7}, "quest(budget=64)", 7, ((0, 4),)),
        ({"protect": [[8, 9]]}, "snapkv(budget=1024)", 100, ((8, 9),)),
        ({"policy": "quest", "budget": 64}, "quest(budget=64)", 0, ((0, 4),)),
        ({}, "snapkv(budget=1024)", 100, ((0, 4),)),
    ],
)  # fmt: skip
def test_a_request_chooses(given, policy, min_context, protect):
    mixed = offer(**MIXED, min_context=100, protect=4)
    wanted = Settings(
        policy=parse(policy), min_context=min_context, protect=protect or mixed.settings.protect
    )
    assert mixed.settings_for(given) == wanted


def test_dense_may_be_asked_for_wherever_requests_may_choose():
    assert offer(**MIXED).settings_for("dense").policy.is_dense
    with pytest.raises(ValueError, match="lets no request choose"):
        offer(policy="quest").settings_for("dense")


def test_a_server_that_allows_nothing_takes_its_own_line():
    fixed = offer(policy="quest(budget=64)")
    assert fixed.settings_for("quest(budget=64)") == fixed.settings


def test_tests_switch_the_shortcut_off_for_every_request():
    assert not offer(**MIXED, shortcut=False).settings_for("knorm(budget=64)").shortcut


@pytest.mark.parametrize(
    "given, message",
    [
        ("streaming_llm", "this server does not allow streaming_llm"),
        ("keydiff", "does not allow keydiff. Known: dense, knorm, quest, snapkv."),
        ("snapkv(budget=2049)", "may keep at most 2048 tokens here"),
        ({"budget": 4096}, "may keep at most 2048 tokens here"),
        ({"budget": "64"}, "budget must be a number of tokens"),
        ({"policy": "snapkv + quest", "budget": 64}, "names 2; write the whole line"),
        ({"policy": "dense", "budget": 64}, "names 0; write the whole line"),
        ({"polcy": "dense"}, "no setting 'polcy'. Did you mean 'policy'"),
        ("snapkv(budget=", "cannot read the policy"),
        ('{"budget": 64', "cannot read the JSON object"),
        ("snapkv(bugdet=64)", "snapkv has no option 'bugdet'. Did you mean 'budget'"),
        (64, "a request names a policy such as"),
        ({"protect": [4]}, "protect must be"),
        ({"min_context": -1}, "min_context must be"),
        # What would end the engine for everyone: numbers beyond a tensor's, and a stack's depth.
        (f"quest(budget=1{'0' * 30})", "quest: budget must be below 2 ** 62, got 1000"),
        ({"policy": "quest", "budget": 10**30}, "quest: budget must be below 2 ** 62, got 1000"),
        ({"min_context": 10**30}, "min_context must be"),
        ({"protect": [[0, 10**30]]}, "protect must be"),
        ("quest" + " + quest" * 100, "both answer the stage 'load'; keep one"),
        ("quest" + " + quest" * 5000, "may say at most 10,000 characters, got 40,005"),
        (f"quest(budget={'-' * 900}1)", "nested too deeply; write a policy line"),
        (f"quest(budget={'-' * 3900}1)", "nested too deeply; write a policy line"),
        ('{"policy": ' + "[" * 9000, "nested too deeply; write a policy line"),
        ({"policy": "quest" + " + quest" * 5000}, "at most 4,000 characters, got 40,005"),
        ({"protect": [[n, n + 1] for n in range(0, 600, 2)]}, "at most 256 spans, got 300"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_bad_choice_is_told_what_to_write(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        offer(**MIXED).settings_for(given)


def test_what_is_not_on_offer_is_refused_by_a_reason_to_count():
    def reason(given, **server):
        with pytest.raises(Refused) as refused:
            offer(**server).settings_for(given)
        return refused.value.reason

    assert reason("keydiff", **MIXED) == "not allowed"
    assert reason("knorm(budget=4096)", **MIXED) == "over max_budget"
    assert reason("dense", policy="quest") == "nothing to choose"


def test_what_a_policy_wraps_must_be_on_offer_too():
    both = offer(policy="dense", allow=["chunkkv", "keydiff"], max_budget=2048)
    assert both.settings_for("chunkkv(keydiff(budget=64))").policy.scored.budget == 64
    with pytest.raises(Refused, match="does not allow snapkv"):
        both.settings_for("chunkkv")
    with pytest.raises(Refused, match="at most 2048 tokens"):
        both.settings_for("chunkkv(keydiff(budget=4096))")
    own = offer(policy="chunkkv(keydiff)", allow=["quest"])
    assert own.names == ["chunkkv", "dense", "keydiff", "quest"]
    assert own.settings_for("chunkkv(keydiff, length=7)").policy.scored.length == 7
    with pytest.raises(ValueError, match="names 0; write the whole line"):
        own.settings_for({"budget": 64})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"policy": "quest", "allow": ["snapkv"]}, "max_budget must say how many tokens"),
        ({"policy": "quest", "max_budget": 64}, 'add {"allow": ["snapkv"]}'),
        (
            {"policy": "snapkv(budget=128)", "allow": ["quest"], "max_budget": 64},
            "raise it to 128",
        ),
        ({"policy": "quest", "allow": ["streaming_llm"]}, "cannot share a server"),
        ({"policy": "streaming_llm", "allow": ["quest"]}, "cannot share a server"),
        ({"policy": "pyramid(snapkv)", "allow": ["snapkv"]}, "groups of their own"),
        ({"policy": "snapkv", "allow": ["pyramid"]}, "groups of their own"),
        (
            {"policy": "keydiff(budget=0.25, chunk=512)", "allow": ["quest"]},
            "keydiff(budget=0.25, sinks=4, window=0, chunk=512) cannot share a server",
        ),
        (
            {"policy": "keydiff(budget=0.25, chunk=512)", "min_context": 9},
            'write {"min_context": 0}, or a budget in tokens',
        ),
        ({"policy": "snapkv", "allow": "quest"}, 'write {"allow": ["snapkv", "quest"]}'),
        ({"policy": "snapkv", "allow": [1]}, 'write {"allow": ["snapkv", "quest"]}'),
        ({"policy": "snapkv", "allow": ["ques"]}, "Did you mean 'quest'"),
        ({"policy": "snapkv", "allow": ["quest"], "max_budget": "8"}, "max_budget must be"),
        ({"policy": "snapkv", "allowed": ["quest"]}, "no setting 'allowed'"),
        (
            {"policy": "dense", "alow": ["quest"]},
            "no setting 'alow'. Did you mean 'allow'? "
            "Known: policy, min_context, protect, allow, max_budget.",
        ),
    ],
)
def test_what_cannot_share_a_server_is_refused_at_start(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        offer(**given)


def test_one_digest_serves_every_selector_on_offer():
    assert offer(policy="snapkv", allow=["quest"]).digest == parse("quest").selector.digest
    assert offer(policy="snapkv", allow=["knorm"]).digest is None
    assert offer(policy="quest").digest == parse("quest").selector.digest


def test_codes_of_other_bits_than_the_pages_carry_are_refused():
    own = offer(policy="twilight(bits=4)", allow=["snapkv"], max_budget=64)
    assert own.settings_for("twilight(budget=64, bits=4)").policy.selector.budget == 64
    with pytest.raises(Refused, match=r"do not carry what twilight\(.*bits=2.*KeyCodes"):
        own.settings_for("twilight(budget=64)")


def test_where_one_chooses_by_codes_all_do():
    lines = ("quest(budget=64)", "twilight(budget=64)", "block_quest", "block_quest + quest")
    for own in ("quest", "dense", "block_quest + twilight(budget=128)"):
        served = offer(policy=own, allow=["quest", "twilight", "block_quest"])
        assert served.settings_for(own) == served.settings
        for line in ("dense", *lines):
            policy = served.settings_for(line).policy
            assert str(policy) == str(parse(line))
            for reader in (policy.selector, policy.generate):
                assert reader is None or reader.digest == served.digest == KeyCodes(2)
        with pytest.raises(ValueError, match=r"no codes yet, .*leave top_p out"):
            served.settings_for("quest(top_p=0.5)")
        assert served.settings_for({"policy": "quest", "budget": 96}).policy.selector.budget == 96


def test_a_digest_that_codes_do_not_hold_is_refused_beside_them(monkeypatch):
    class Apart(Quest):
        name = "apart"
        over = Selector.over

    known = {"apart": Apart}
    monkeypatch.setattr(kvplug.offer, "policy_class", lambda n: known.get(n) or policy_class(n))
    assert offer(policy="snapkv", allow=["apart"]).digest == KeyExtremes()
    with pytest.raises(ValueError, match="apart reads digests of its own, which pages"):
        offer(policy="twilight", allow=["apart"])


def test_an_offer_says_itself():
    assert str(offer(policy="quest(budget=64)")).startswith("policy 'quest(budget=64")
    assert str(offer(**MIXED)).endswith(
        "requests may choose dense, knorm, quest, snapkv that keep at most 2048 tokens"
    )


def test_pages_are_shared_by_those_that_read_a_prompt_as_they_do():
    offer = read_offer({"policy": "dense", "allow": ["a_shape", "quest"]})

    def salt(asked, own=None):
        return offer.salt(offer.settings_for(asked), own)

    one, other = "a_shape(window=512)", "a_shape(window=256)"
    assert salt(None) is salt("quest") is None
    later = {"policy": one, "min_context": 9}
    apart = [salt(None, "a"), salt(None, "b"), salt(one), salt(other), salt(one, "a"), salt(later)]
    assert len(set(apart)) == len(apart)
    assert salt(one) == salt(f"{one} + quest(budget=64)")
    assert salt(None, salt(one)) not in apart, "nobody is given another's by naming it"
    alone = read_offer({"policy": one})
    assert alone.salt(alone.settings, "a") == "a", "where all read alike it is the user's"
    asks = read_offer({"policy": "minference", "allow": ["quest"]})
    lots = {asks.salt(asks.settings, own) for own in ("a", "a", None, None)}
    assert len(lots) == 4, "what a prompt's end decided is nobody else's"
    assert asks.salt(asks.settings_for("dense"), "a") == salt(None, "a")
    without = read_offer({"policy": "dense", "allow": ["quest"]})
    assert without.salt(without.settings, "a") == "a"
