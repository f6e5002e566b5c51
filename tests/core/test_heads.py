"""What heads look at, against plain definitions; the file that says so; and who reads by it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvplug import parse, read_offer
from kvplug.heads import PATTERNS, Shape, read_heads
from kvplug.offer import Refused
from kvplug.policies.minference import MInference
from kvplug_evals.calibration.measure import Calibration, Setting, calibrate
from tests.core.test_block_selection import asked, keys_seen
from tests.heads import A, B, C
from tests.heads import made as made_for

SHAPE = Shape(type="llama", layers=3, heads=8, kv_heads=4, head_dim=24, vocabulary=512)


def made(best):
    return made_for(best, SHAPE)


def visible(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize("softcap, sinks", [(None, False), (3.0, True)])
def test_what_is_measured_is_the_definition(softcap, sinks):
    torch.manual_seed(0)
    H, G, T, D, S, B_ = 2, 3, 384, 16, 16, 64
    setting = Setting(context=T, density=0.5, sinks=16, window=40, page=S, block=B_)
    query, key, value = torch.randn(1, H * G, T, D) * 2, *torch.randn(2, 1, H, T, D)
    done = []
    running = Calibration(setting, lambda: done.append(1))
    given = {"softcap": softcap, "s_aux": torch.randn(H * G) if sinks else None}
    out, _ = running.attend(
        SimpleNamespace(layer_idx=5), query, key, value, None, scaling=0.3, **given
    )
    found = running.layers[5].mean()

    logits = query[0] @ key[0].repeat_interleave(G, 0).mT * 0.3
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible(T), -torch.inf)
    if sinks:
        column = given["s_aux"][:, None, None].expand(H * G, T, 1)
        weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
        wanted = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out, wanted.transpose(1, 2), atol=1e-5, rtol=1e-4)
    values = value[0].repeat_interleave(G, 0)
    torch.testing.assert_close(out[0], (weights @ values).transpose(0, 1), atol=1e-5, rtol=1e-4)
    weights = weights / weights.sum(-1, keepdim=True)

    far = [weights[:, t, 16 : t - 39].sum(-1) for t in range(T) if t >= 56]
    outside = torch.stack(far).mean(0).view(H, G).mean(1)
    torch.testing.assert_close(torch.tensor(found.outside), outside, atol=1e-5, rtol=1e-4)

    near = torch.ones(T, T, dtype=torch.bool).triu(-39).tril()
    near[:, :16] = visible(T)[:, :16]
    near = logits.masked_fill(~near, -torch.inf)
    near = torch.cat([near, column], -1).softmax(-1)[..., :-1] if sinks else near.softmax(-1)
    whole = out[0].transpose(0, 1)
    changed, squared = (
        each[:, 56:].square().reshape(H, -1).sum(1) for each in (near @ values - whole, whole)
    )
    lost = torch.tensor(found.lost)
    torch.testing.assert_close(lost, (changed / squared).clamp(max=1), atol=1e-4, rtol=1e-3)

    # Nearness needs no estimate: the first page, a block's own, and the 12 - 1 - 4 before it.
    recall = []
    for start in range(0, T, B_):
        if start + B_ > setting.tokens:
            read = {0, *range((start + B_) // S - 11, (start + B_) // S)}
            tokens = [t for t in range(T) if t // S in read]
            recall.append(weights[:, start : start + B_, tokens].sum(-1).mean(1))
    wanted = torch.stack(recall).mean(0)
    torch.testing.assert_close(torch.tensor(found.recall["a_shape"]), wanted)
    assert done == [1]
    assert all(0 < min(found.recall[p]) <= 1 for p in PATTERNS)
    assert len({tuple(found.recall[p]) for p in PATTERNS}) == 3


def test_a_pattern_that_reads_what_heads_look_at_finds_it():
    """One head looks at a few columns far away, one at a page with keys of its own."""
    T, D, S = 1024, 8, 32
    setting = Setting(context=T, density=0.25, sinks=32, window=64, page=S, block=64)
    query, key = torch.zeros(1, 2, T, D), torch.zeros(1, 2, T, D)
    query[..., 0] = 1.0
    key[0, 0, [200, 333], 0] = 14.0  # of pages whose mean is small beside ...
    key[0, 0, 400:512, 0] = 3.0  # ... these
    query[0, 1, :, 1], key[0, 1, :, 0] = torch.sin(torch.arange(T) // 64 * 2.0), 0.0
    for page in range(T // S):  # every block has another page that it looks at
        key[0, 1, page * S : (page + 1) * S, 1] = 12 * torch.cos(torch.tensor(page * 1.0))
    running = Calibration(setting)
    running.attend(SimpleNamespace(layer_idx=0), query, key, key, None, scaling=1.0)
    recall = running.layers[0].mean().recall
    assert recall["vertical_slash"][0] > 0.95 > recall["a_shape"][0] + 0.3
    assert recall["block_sparse"][1] > recall["vertical_slash"][1]
    assert recall["block_sparse"][1] > recall["a_shape"][1]


def test_a_model_is_measured_whole_and_the_file_read_again(random_llama, tmp_path):
    from transformers import AutoModel

    folder = random_llama(heads=4, kv_heads=2)
    setting = Setting(contexts=2, context=256, density=0.75, sinks=16, window=32)
    words, told = torch.randint(512, (700,)), []
    text = " ".join(_words(folder)[n] for n in words.tolist())
    found = calibrate(str(folder), text, setting, source="lots", tell=lambda *n: told.append(n))
    assert told == [(n, 4) for n in range(1, 5)], "layers, of each context"
    assert found.shape == Shape(
        type="llama", layers=2, heads=4, kv_heads=2, head_dim=64, vocabulary=512
    )
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    weights = torch.zeros(2, 4, 256, 256)
    for first in (0, 350):
        ids = words[None, first : first + 256]
        with torch.inference_mode():
            weights += torch.cat(plain(ids, output_attentions=True).attentions) / 2
    for layer, each in enumerate(weights):
        far = torch.stack([each[:, t, 16 : t - 31].sum(-1) for t in range(48, 256)]).mean(0)
        wanted = far.view(2, 2).mean(1)
        got = torch.tensor(found.layers[layer].outside)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-3)

    found.save(file := tmp_path / "heads.json")
    again = read_heads(str(file))
    assert (again.model, again.shape) == (found.model, found.shape)
    assert again.settings == {"text": "lots", **vars(setting)}
    for layer, each in found.layers.items():
        for name in PATTERNS:
            assert again.layers[layer].recall[name] == pytest.approx(each.recall[name], abs=1e-4)
    policy = parse(f"minference(heads={str(file)!r})")
    assert not list(policy.misfits(plain.config))
    plain.config.num_key_value_heads = 4
    (reason,) = policy.misfits(plain.config)
    assert "heads.json was made for llama (llama, 2 layers" in reason
    assert "4 heads of 64, 4 KV heads" in reason
    assert "make its own: kvplug calibrate MODEL" in reason


def _words(folder):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [word for word, _ in sorted(vocabulary.items(), key=lambda item: item[1])]


def test_layers_with_a_window_are_left_out(tmp_path):
    from kvplug_evals.models.random_llama import build_random_gemma3

    build_random_gemma3(folder := tmp_path / "gemma")
    setting = Setting(contexts=1, context=320, density=0.75, sinks=16, window=32)
    text = " ".join(_words(folder)[n % 512] for n in range(330))
    assert sorted(calibrate(str(folder), text, setting).layers) == [1, 3]


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"context": 1000}, r"whole pages of 32 and blocks of 64 tokens, got 1000; write 4096"),
        ({"density": 1.0}, r"density must be a share between 0 and 1, got 1\.0"),
        ({"density": 0.01}, r"density=0\.01 of a context of 4096 tokens are 41, and 192 are"),
        ({"window": 4096}, r"nothing outside sinks=128 and window=4096; write a longer one"),
        ({"contexts": 0}, r"contexts must be at least 1, got 0"),
    ],
)
def test_what_measures_nothing_is_refused(given, wanted):
    with pytest.raises(ValueError, match=wanted):
        Setting(**given)


def test_too_short_a_text_is_refused(random_llama):
    setting = Setting(contexts=2, context=256, density=0.75, sinks=16, window=32)
    with pytest.raises(ValueError, match=r"has 3 tokens of .*, and 2 contexts of 256 need"):
        calibrate(str(random_llama()), "a b c", setting)


def test_each_rank_has_the_patterns_of_its_own_heads():
    rows = {0: [A] * 8, 2: [B, B, C, C, A, A, B, B]}
    heads = made(rows)
    assert heads.patterns(8, 4, 2) == (B, C, A, B)
    assert heads.patterns(8, 2, 2) + heads.patterns(10, 2, 2) == (B, C, A, B), "two ranks"
    alone = [heads.patterns(16 + rank, 1, 1) for rank in range(8)]
    assert alone == [(p,) for p in rows[2]], "eight ranks of four KV heads hold each twice"
    assert heads.patterns(4, 4, 2) == (A,) * 4, "a layer that was not measured"
    mixed = made({0: [B, A, A, C, C, C, A, B]})
    assert mixed.patterns(0, 4, 2) == (A, A, C, A), "the mean of a group; the first of equals"


@pytest.mark.parametrize("first", [0, 4])
def test_heads_read_by_the_pattern_that_the_file_gives_them(first, tmp_path):
    blocks, keys, table, pages, _, _ = asked(32, 4, 2)
    heads = made({0: [B, B, C, C, A, A, B, B], 1: [C, C, A, A, A, A, B, B]})
    heads.save(file := tmp_path / "heads.json")
    options = {"vertical": 34, "slash": 104}
    policy = MInference(heads=str(file), **options)
    shares = policy.score(replace(blocks, first_head=first), keys, None, table, pages)
    for h, pattern in enumerate((B, C, A, B) if not first else (C, A, A, B)):
        one = MInference(pattern=pattern, **options).score(blocks, keys, None, table, pages)
        assert torch.equal(shares[:, h], one[:, h])


@pytest.mark.parametrize("S, H, G", [(16, 1, 3), (32, 3, 1), (64, 2, 4)])
def test_patterns_without_columns_are_their_definitions(S, H, G):
    blocks, keys, table, pages, lengths, rows = asked(S, H, G)
    near, by_mean = (
        MInference(pattern=p, vertical=34, slash=104).score(blocks, keys, None, table, pages)
        for p in (B, C)
    )
    for i, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        P, b = int(pages[i]), int(blocks.last.block[blocks.last.run[i]])
        found = keys_seen(keys, table, pages, b, lengths[b])
        queries = blocks.query[blocks.bounds[i] : blocks.bounds[i + 1]].double().mean(0)
        first = max(length - count - 138 + 1, 0) // S
        for h in range(H):
            assert near[i, h].nonzero().flatten().tolist() == list(range(first, P))
            assert (near[i, h, first:P].diff() > 0).all(), "the nearest first"
            means = torch.stack([found[p * S : (p + 1) * S, h].mean(0) for p in range(P)])
            share = (queries[h] @ means.T * blocks.scale).softmax(-1).mean(0)
            wanted = sorted(range(P), key=lambda p: -float(share[p]))[: -(-138 // S)]
            assert set(by_mean[i, h].nonzero().flatten().tolist()) == set(wanted)
            assert by_mean[i, h].argmax() == wanted[0]
    for each in (near, by_mean):
        torch.testing.assert_close(each.sum(-1), torch.ones(5, H))


def _without(*keys):
    def damage(given):
        place = given
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return given

    return damage


@pytest.mark.parametrize(
    "damage, wanted",
    [
        (lambda given: [], r"no whole file of heads, version 1: .*; make one: kvplug calibrate"),
        (lambda given: {**given, "format": "else"}, r"it is 'else', version 1"),
        (lambda given: {**given, "version": 2}, r"it is 'kvplug heads', version 2"),
        (_without("shape", "kv_heads"), r"it has no 'kv_heads'"),
        (_without("layers", "0", "outside"), r"it has no 'outside'"),
        (_without("layers", "0", "lost"), r"it has no 'lost'"),
        (lambda given: {**given, "layers": {}}, r"its layers are \[\], of 3"),
        (lambda given: {**given, "layers": {"3": given["layers"]["0"]}}, r"its layers are \[3\]"),
        (lambda given: {**given, "layers": {"x": given["layers"]["0"]}}, r"invalid literal"),
        (lambda given: _with(given, [0.5] * 7), r"layer 0 has no 8 shares as 'a_shape'"),
        (lambda given: _with(given, [0.5] * 7 + [2]), r"layer 0 has no 8 shares as 'a_shape'"),
        (lambda given: _with(given, [0.5] * 7 + [None]), r"layer 0 has no 8 shares"),
        (lambda given: {**given, "shape": {**given["shape"], "heads": 0}}, r"has heads = 0"),
    ],
)
def test_a_damaged_file_is_refused(damage, wanted, tmp_path):
    made({0: [A] * 8}).save(file := tmp_path / "heads.json")
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=wanted):
        read_heads(str(file))


def _with(given, values):
    given["layers"]["0"]["a_shape"] = values
    return given


def test_what_is_no_file_of_heads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*: No such file or directory; make one"):
        read_heads(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="Is a directory"):
        read_heads(str(tmp_path))
    (cut := tmp_path / "cut.json").write_text('{"format": "kvplug heads", "ver')
    with pytest.raises(ValueError, match="no whole file of heads"):
        read_heads(str(cut))
    (other := tmp_path / "other").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is no text"):
        read_heads(str(other))


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("minference(pattern='diagonal')", r"pattern must be vertical_slash, a_shape or block_sp"),
        ("minference(heads=3)", r"heads must name a file that kvplug calibrate made, got 3"),
        ("minference(heads='')", r"heads must name a file .*, got ''; write minference\(heads="),
        ("minference(heads='a', pattern='a_shape')", r"gives each head its pattern, got pattern="),
    ],
)
def test_bad_options_are_refused(line, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse(line)


def test_a_request_names_no_file(tmp_path):
    made({0: [A] * 8}).save(file := tmp_path / "heads.json")
    line = f"minference(heads={str(file)!r})"
    assert str(parse(line)).endswith(f"heads={str(file)!r})")
    offer = read_offer({"policy": line, "allow": ["quest"]}, environ={})
    asked = f"minference(vertical=50, heads={str(file)!r})"
    assert offer.settings_for(asked).policy.generate.vertical == 50, "the server's own"
    with pytest.raises(Refused, match=r"files are the server's, and '/etc/passwd' is not one"):
        offer.settings_for("minference(heads='/etc/passwd') + quest")


def test_the_command_writes_a_file_that_the_policy_reads(random_llama, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from kvplug_evals.cli import app

    folder, out = random_llama(heads=4, kv_heads=2), tmp_path / "heads.json"
    (text := tmp_path / "text").write_text(" ".join(_words(folder)[n % 512] for n in range(300)))
    small = ["--contexts=1", "--context=256", "--density=0.75", "--sinks=16", "--window=32"]
    command = ["calibrate", str(folder), f"--text={text}", *small]
    done = CliRunner().invoke(app, [*command, f"--out={out}"])
    assert done.exit_code == 0, done.output
    assert "llama: llama, 2 layers, 4 heads of 64, 2 KV heads, 512 tokens" in done.output
    assert f"{out}: 4 KV heads" in done.output
    found = read_heads(str(out))
    assert found.settings["text"] == "text"
    assert sum(done.output.count(f"{pattern} ") for pattern in PATTERNS) == 3
    asks = dict(first_head=2, heads=2, group=2)
    assert set(found.patterns(**asks)) <= set(PATTERNS)
    lost = CliRunner().invoke(app, [*command, f"--out={tmp_path / 'no' / 'heads.json'}"])
    assert isinstance(lost.exception, FileNotFoundError)
    assert "layers" not in lost.output, "nothing was measured in vain"
