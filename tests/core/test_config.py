"""Settings from a mapping, the environment, or neither."""

import pytest

from kvplug import Composition, Settings, parse, read_settings

ENV = {"KVPLUG_POLICY": "streaming_llm(window=64)"}


@pytest.mark.parametrize("given", [None, {}])
def test_without_a_policy_quest_serves_long_requests_only(given):
    settings = read_settings(given, environ={})
    assert settings.policy == parse("twilight(budget=0.0625)")
    assert settings.min_context == 8192
    assert settings.protect == ()
    assert settings.shortcut


def test_a_named_policy_serves_requests_of_any_length():
    assert read_settings({"policy": "quest"}, environ={}).min_context == 0
    assert read_settings(None, environ=ENV).min_context == 0


def test_min_context_is_what_it_says_with_and_without_a_policy():
    for given in ({"min_context": 7}, {"min_context": 7, "policy": "quest"}):
        assert read_settings(given, environ={}).min_context == 7


def test_the_environment_stands_in_for_a_policy_that_is_not_named():
    assert read_settings(None, environ=ENV).policy == parse(ENV["KVPLUG_POLICY"])
    assert read_settings({"protect": 4}, environ=ENV).policy == parse(ENV["KVPLUG_POLICY"])


def test_the_process_environment_is_read_where_none_is_given(monkeypatch):
    monkeypatch.setenv("KVPLUG_POLICY", "quest(budget=77)")
    assert read_settings().policy == parse("quest(budget=77)")
    monkeypatch.delenv("KVPLUG_POLICY")
    assert read_settings().policy == parse("twilight(budget=0.0625)")


def test_a_named_policy_beats_the_environment():
    assert read_settings({"policy": "dense"}, environ=ENV).policy.is_dense


@pytest.mark.parametrize(
    "protect, spans",
    [
        (0, ()),
        (256, ((0, 256),)),
        ([], ()),
        ([[0, 256]], ((0, 256),)),
        (((512, 640), (0, 1)), ((0, 1), (512, 640))),
        ([[8, 9], [0, 16], [4, 12]], ((0, 16), (4, 12), (8, 9))),
    ],
)
def test_protect_is_a_number_of_first_tokens_or_a_list_of_spans(protect, spans):
    assert read_settings({"protect": protect}, environ={}).protect == spans


def test_printing_settings_tells_the_experiment():
    given = {"policy": "quest", "min_context": 5, "protect": [[0, 4], [8, 9]]}
    assert str(read_settings(given, environ={})) == (
        "policy 'quest(budget=2048, dense_layers=2)', min_context=5, protect=[[0, 4], [8, 9]]"
    )
    assert str(Settings()) == "policy 'dense', min_context=0"


def test_settings_are_values():
    assert Settings() == Settings(policy=Composition())
    assert hash(read_settings({"protect": 4}, environ={})) == hash(
        read_settings({"protect": [[0, 4]]}, environ={})
    )
