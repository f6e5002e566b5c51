"""What a user writes wrong, and the message that sets it right: wanted, came, write instead."""

from importlib.metadata import EntryPoint

import pytest

from kvplug import parse, policy_class, policy_names, read_settings, registry

EXAMPLE = "write, for example, 'quest(budget=2048)' or 'streaming_llm(sinks=4, window=1020)'"
KNOWN = (
    "Known: a_shape, blend, block_quest, chunkkv, cur, dense, duo, flexprefill, host, keydiff, "
    "kivi, knorm, kvzip, lagkv, local, minference, pyramid, quest, r_kv, random, random_prefill, "
    "snapkv, streaming_llm, tova, tri_shape, twilight, vase, xattention."
)
TOKENS = "must be a number of tokens, at least 0 and below 2 ** 62, got "
POSITIONS = TOKENS.replace("62", "24")
SPANS = (
    "protect must be a number of first tokens or a list of spans [first, last) with "
    "0 <= first < last < 2 ** 24, got "
)

LINES = [
    # Not a line at all.
    (None, "a policy must be a line of text, got None", EXAMPLE),
    ("", "a policy must be a line of text, got ''", EXAMPLE),
    ("  \n", "a policy must be a line of text", EXAMPLE),
    (2048, "a policy must be a line of text, got 2048", EXAMPLE),
    ({"name": "quest"}, "a policy must be a line of text, got {'name': 'quest'}", EXAMPLE),
    # Not the grammar.
    ("quest(budget=", "cannot read the policy 'quest(budget='", "at column", EXAMPLE),
    ("quest budget", "cannot read the policy 'quest budget'", EXAMPLE),
    ("quest; dense", "cannot read the policy", EXAMPLE),
    ("quest\0", "cannot read the policy", EXAMPLE),
    ("quest - dense", "cannot read 'quest - dense'", "joined by '+'", EXAMPLE),
    ("quest, dense", "cannot read '(quest, dense)'", "wanted name(option=value)", EXAMPLE),
    ("'quest'", "cannot read \"'quest'\"", EXAMPLE),
    ("kvplug.quest", "cannot read 'kvplug.quest'", EXAMPLE),
    ("quest(1024)", "cannot read '1024'", "wanted name(option=value)", EXAMPLE),
    ("quest(**{'budget': 1})", "cannot read '**'", EXAMPLE),
    ("quest(budget=1, budget=2)", "quest", "budget"),
    ("quest" + " + quest" * 5000, "at most 4,000 characters, got 40,005", EXAMPLE),
    (f"quest(budget={'-' * 100000}1)", "at most 4,000 characters", EXAMPLE),
    ("quest + ", "cannot read the policy", EXAMPLE),
    # Names.
    ("quset", "unknown policy 'quset'", "Did you mean 'quest'?", KNOWN),
    ("Quest(budget=1)", "unknown policy 'Quest'", "Did you mean 'quest'?", KNOWN),
    ("streamingllm", "unknown policy", "Did you mean 'streaming_llm'?", KNOWN),
    ("h2o", "unknown policy 'h2o'", KNOWN),
    # Options.
    ("quest(bugdet=1)", "quest has no option 'bugdet'", "Did you mean 'budget'?", "top_p"),
    ("streaming_llm(budget=1)", "streaming_llm has no option 'budget'", "Known: sinks, window."),
    ("dense(budget=1)", "dense takes no options, got 'budget'; write 'dense'"),
    ("quest(streaming_llm)", "quest does not wrap another policy, got 'streaming_llm(", "by '+'"),
    ("quest(base=1)", "quest has no option 'base'"),
    ("quest(budget=1024*2)", "quest: budget must be a plain value", "got '1024 * 2'"),
    ("quest(budget=many)", "quest: budget must be a plain value", "got 'many'"),
    ("quest(budget={[]: 1})", "quest: budget must be a plain value"),
    # Values.
    (
        "quest(budget=0)",
        "quest: budget must be a number of tokens, at least 1, or a share",
        "got 0;",
        "budget=2048",
    ),
    ("quest(budget=-1)", "budget must be a number of tokens, at least 1", "got -1;"),
    ("quest(budget=1.1)", "or a share of the context", "got 1.1;", "budget=0.125"),
    ("quest(budget=0.0)", "or a share of the context", "got 0.0;"),
    ("quest(budget=float('nan'))", "quest: budget must be a plain value"),
    ("twilight(budget=0)", "twilight: budget must be a number", "write twilight(budget=2048)"),
    ("twilight(bits=3)", "twilight: bits must be 1, 2, 4 or 8, got 3; write twilight(bits=2)"),
    ("twilight(bits=True)", "twilight: bits must be 1, 2, 4 or 8, got True"),
    ("twilight(top_p=0)", "twilight: top_p must be above 0 and at most 1, got 0"),
    ("twilight(candidates=1)", "candidates must be a share of the pages", "got 1; write twilight"),
    ("twilight(candidates=0.0)", "above 0 and at most 1.0, got 0.0", "twilight(candidates=0.5)"),
    (
        "twilight(budget=0.25, candidates=0.125)",
        "candidates=0.125 of the pages hold fewer tokens than budget=0.25 reads",
        "write twilight(budget=0.25, candidates=1.0)",
    ),
    ("twilight(dense_layers=-1)", "dense_layers must be a number of layers, got -1"),
    ("a_shape(window=0)", "a_shape: window must be a number of tokens, at least 1, got 0; write"),
    ("tri_shape(last=-1)", "tri_shape: last must be", "at least 0, got -1;", "tri_shape(last=64)"),
    ("a_shape(block=0)", "a_shape: block must be", "at least 1, got 0; write a_shape(block=64)"),
    ("a_shape(sinks=1.5)", "a_shape: sinks must be a number of tokens", "got 1.5"),
    ("a_shape + tri_shape", "a_shape and tri_shape both answer the stage 'generate'"),
    ("quest(budget=True)", "budget must be a number of tokens, at least 1", "got True;"),
    ("quest(budget='2048')", "budget must be a number of tokens, at least 1", "got '2048';"),
    ("quest(budget=None)", "budget must be a number of tokens, at least 1", "got None;"),
    ("quest(top_p=0)", "quest: top_p must be above 0 and at most 1, got 0;", "top_p=0.95"),
    ("quest(top_p=95)", "top_p must be above 0 and at most 1, got 95"),
    ("quest(top_p=1e999)", "top_p must be above 0 and at most 1, got inf"),
    ("quest(top_p='a')", "top_p must be above 0 and at most 1, got 'a'"),
    ("quest(top_p=True)", "top_p must be above 0 and at most 1, got True"),
    ("quest(dense_layers=-1)", "quest: dense_layers must be a number of layers, got -1"),
    ("quest(dense_layers=[0])", "dense_layers must be a number of layers, got [0]"),
    ("quest(dense_layers=False)", "dense_layers must be a number of layers, got False"),
    (
        "streaming_llm(sinks=-1)",
        "streaming_llm: sinks must be a number of tokens, at least 0, got -1",
        "write streaming_llm(sinks=4, window=1020)",
    ),
    ("streaming_llm(window=0)", "window must be a number of tokens, at least 1, got 0"),
    ("streaming_llm(window=1e3)", "window must be a number of tokens, at least 1, got 1000.0"),
    ("streaming_llm(sinks=True)", "sinks must be a number of tokens, at least 0, got True"),
    # Numbers that no tensor holds.
    (
        "quest(budget=4611686018427387904)",
        "quest: budget must be below 2 ** 62, got 4611686018427387904",
    ),
    (f"quest(dense_layers=1{'0' * 30})", "quest: dense_layers must be below 2 ** 62, got 10000"),
    (f"streaming_llm(window=1{'0' * 30})", "streaming_llm: window must be below 2 ** 62"),
    (f"pyramid(knorm(budget=1{'0' * 30}))", "knorm: budget must be below 2 ** 62"),
    (f"snapkv(pool=1{'0' * 30}1)", "snapkv: pool must be an odd number of tokens below 2 ** 31"),
    # Combinations.
    ("quest + quest(budget=1)", "quest and quest both answer the stage 'load'; keep one"),
    ("streaming_llm + streaming_llm", "both answer the stage 'compress'; keep one of them"),
    ("quest + dense", "dense is the absence of a policy", "leave dense out"),
    ("dense + dense", "dense is the absence of a policy", "leave dense out"),
]

SETTINGS = [
    ("quest", "kvplug's configuration must be a mapping", '{"policy": "', "got 'quest'"),
    (["quest"], "must be a mapping", "got ['quest']"),
    ({"polices": "quest"}, "no setting 'polices'", "Did you mean 'policy'?", "Known: policy,"),
    ({"budget": 1}, "kvplug has no setting 'budget'", "min_context", "protect"),
    ({7: 1}, "kvplug has no setting 7", "Known: policy,"),
    ({"policy": 1}, "a policy must be a line of text, got 1", EXAMPLE),
    ({"policy": "quest(budget=0)"}, "budget must be a number of tokens, at least 1", "got 0;"),
    ({"min_context": -1}, "min_context " + TOKENS + "-1", 'write {"min_context": 8192}'),
    ({"min_context": 1 << 62}, "min_context " + TOKENS + "4611686018427387904"),
    ({"min_context": 1.5}, "min_context " + TOKENS + "1.5"),
    ({"min_context": "8k"}, "min_context " + TOKENS + "'8k'"),
    ({"min_context": True}, "min_context " + TOKENS + "True"),
    ({"min_context": None}, "min_context " + TOKENS + "None"),
    ({"shortcut": "no"}, "shortcut must be true or false, got 'no'"),
    ({"shortcut": 0}, "shortcut must be true or false, got 0"),
    ({"protect": -1}, "protect " + POSITIONS + "-1"),
    ({"protect": 4611686018427387903}, "protect " + POSITIONS + "4611686018427387903"),
    ({"protect": [[0, 4611686018427387903]]}, SPANS + "[[0, 4611686018427387903]]"),
    ({"alow": ["quest"]}, "no setting 'alow'", "Known: policy, min_context, protect."),
    ({"protect": True}, SPANS + "True", '{"protect": 256}', '{"protect": [[0, 256]]}'),
    ({"protect": None}, SPANS + "None"),
    ({"protect": "256"}, SPANS + "'256'"),
    ({"protect": 0.5}, SPANS + "0.5"),
    ({"protect": [0, 256]}, SPANS + "[0, 256]"),
    ({"protect": [[256, 256]]}, SPANS + "[[256, 256]]"),
    ({"protect": [[256, 0]]}, SPANS + "[[256, 0]]"),
    ({"protect": [[-1, 2]]}, SPANS + "[[-1, 2]]"),
    ({"protect": 10**30}, "protect " + POSITIONS + "1000"),
    ({"protect": [[0, 10**30]]}, SPANS + "[[0, 1000"),
    ({"protect": [[0, 1], [2]]}, SPANS + "[[0, 1], [2]]"),
    ({"protect": [[0, 1.5]]}, SPANS + "[[0, 1.5]]"),
    ({"protect": [[False, True]]}, SPANS + "[[False, True]]"),
]


def short(value):
    return repr(value)[:60]


@pytest.mark.parametrize("line, parts", [(line, parts) for line, *parts in LINES], ids=short)
def test_a_wrong_line_says_what_to_write(line, parts):
    with pytest.raises(ValueError, match=r".") as caught:
        parse(line)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("given, parts", [(given, parts) for given, *parts in SETTINGS], ids=repr)
def test_a_wrong_setting_says_what_to_write(given, parts):
    with pytest.raises(ValueError, match=r".") as caught:
        read_settings(given, environ={})
    for part in parts:
        assert part in str(caught.value)


def test_a_wrong_line_in_the_environment_says_what_to_write():
    with pytest.raises(ValueError, match=r"unknown policy 'quset'\. Did you mean 'quest'\?"):
        read_settings(None, environ={"KVPLUG_POLICY": "quset"})


ENTRY_POINTS = [
    (
        "loads",
        "json:loads",
        "policy 'loads' (json:loads) must be a subclass of kvplug.Policy",
        "got <function loads",
    ),
    ("decoder", "json:JSONDecoder", "must be a subclass of kvplug.Policy", "json.decoder"),
    (
        "chest",
        "kvplug.policies.quest:Quest",
        "policy 'chest' (kvplug.policies.quest:Quest) calls itself 'quest'",
        "the class attribute `name` and the entry point the same value",
    ),
    (
        "policy",
        "kvplug.load:Selector",
        "policy 'policy' (kvplug.load:Selector)",
        "the class attribute `name`",
    ),
]


def install(monkeypatch, *entries):
    """Entry points (name, value) in place of the installed ones."""
    found = [EntryPoint(name, value, registry.GROUP) for name, value in entries]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    monkeypatch.setattr(registry, "policy_class", registry.policy_class.__wrapped__)


@pytest.mark.parametrize("name, value, parts", [(n, v, p) for n, v, *p in ENTRY_POINTS])
def test_a_wrong_entry_point_says_what_is_wrong_with_it(monkeypatch, name, value, parts):
    install(monkeypatch, (name, value))
    with pytest.raises(ValueError, match=r".") as caught:
        registry.policy_class(name)
    for part in parts:
        assert part in str(caught.value)


def test_two_packages_may_not_register_one_name(monkeypatch):
    install(monkeypatch, ("quest", "kvplug.policies.quest:Quest"), ("quest", "other:Quest"))
    for ask in (policy_names, lambda: registry.policy_class("quest")):
        with pytest.raises(ValueError, match="two packages register the policy 'quest'") as caught:
            ask()
        assert "kvplug.policies.quest:Quest and other:Quest" in str(caught.value)
        assert "uninstall one or rename its entry point" in str(caught.value)


def test_one_package_found_twice_is_no_conflict(monkeypatch):
    install(monkeypatch, *[("quest", "kvplug.policies.quest:Quest")] * 2)
    assert policy_names() == ["quest"]
    assert registry.policy_class("quest").name == "quest"


def test_the_installed_names_are_ours():
    assert policy_names() == KNOWN.removeprefix("Known: ").removesuffix(".").split(", ")
    assert [policy_class(name).name for name in policy_names()] == policy_names()
