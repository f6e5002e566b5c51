"""The X-ray: its looks are the policies' own, and its page works in a browser without network."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from kvplug import parse
from kvplug_evals.xray.looks import KEPT, LEVELS, READ, Looks, Xray, check_line, folded
from kvplug_evals.xray.page import render
from tests.chromium import chromium, needs_chromium
from tests.plain_llama import Plain

S, STEPS = 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvplug_evals.models.random_llama import build_random_llama

    folder = tmp_path_factory.mktemp("xray") / "llama"
    build_random_llama(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


PROMPT = torch.randint(0, 512, (203,), generator=torch.Generator().manual_seed(0))


def look(loaded, line, steps=STEPS):
    return Xray(loaded, line, S).look(PROMPT, steps)


def test_dense_reads_everything_and_says_what_it_says(loaded):
    answer, said, looks = look(loaded, "dense")
    assert said == answer[1:]
    assert all(each.read.all() for layer in looks.values() for each in layer)


@pytest.mark.parametrize(
    "line",
    [
        "snapkv(budget=64, window=16)",
        "keydiff(budget=48)",
        "snapkv(budget=32, window=8, interval=16)",
        "chunkkv(snapkv(budget=64, window=16), length=5)",
    ],
)
def test_packed_answers_are_a_plain_llama_s(loaded, model, line):
    answer, said, looks = look(loaded, line, steps=20)
    plain = Plain(model, line, S)
    plain.prompt = len(PROMPT)
    with torch.inference_mode():
        logits = plain.model(torch.cat([PROMPT, torch.tensor(answer)])[None]).logits[0]
    assert said == logits[len(PROMPT) : -1].argmax(-1).tolist()
    budget = int(parse(line).scored.budget)
    for layer in looks.values():
        assert (layer[0].kept.sum(1) == budget + len(PROMPT) % S + 1).all()


def test_a_window_sees_its_first_and_last_pages(loaded):
    _, _, looks = look(loaded, "streaming_llm(sinks=4, window=50)")
    for layer in looks.values():
        for step, each in enumerate(layer):
            at = len(PROMPT) + step
            wanted = np.zeros(at + 1, bool)
            wanted[:S] = wanted[(at - 50 + 1) // S * S :] = True
            assert (each.read.numpy() == wanted).all()


@pytest.mark.parametrize("line", ["quest(budget=64, dense_layers=1)", "twilight(budget=0.25)"])
def test_what_is_read_is_what_the_selection_s_definition_says(loaded, line):
    _, _, looks = look(loaded, line)
    dense = parse(line).selector.dense_layers
    for number, layer in looks.items():
        for step, each in enumerate(layer):
            seen = len(PROMPT) + step + 1
            read = each.read.sum(1)
            if number < dense:
                assert (read == seen).all()
                continue
            newest = (seen - 1) // S * S
            assert each.read[:, newest:].all()
            if line.startswith("quest"):
                assert (read == 64 - S + seen - newest).all()
                pages = each.read[:, :newest].unflatten(1, (-1, S))
                assert (pages.all(2) == pages.any(2)).all()
            else:
                assert (read == -(-seen // 4)).all()
                assert each.read[:, :4].all()


def test_tokens_that_weigh_most_are_read_where_many_are(loaded):
    """Four bits for a key foresee weights well enough to hold nearly all that could be held."""
    _, _, looks = look(loaded, "twilight(budget=0.25, bits=4, dense_layers=0)")
    for layer in looks.values():
        for each in layer:
            held = (each.weight * each.read).sum(1)
            best = each.weight.topk(int(each.read[0].sum()), 1).values.sum(1)
            assert (held > 0.9 * best).all()


def test_folding_keeps_what_was_seen(loaded):
    _, _, looks = look(loaded, "snapkv(budget=64, window=16) + quest(budget=48, dense_layers=0)")
    found = folded(looks, prompt=203, page_size=S, tokens=[], answer=[], said=[])
    for n, layer in enumerate(looks.values()):
        for step, each in enumerate(layer):
            T = each.kept.shape[1]
            byte = found.seen[step, n, :, :T]
            assert ((byte & KEPT > 0) == each.kept.numpy()).all()
            assert ((byte & READ > 0) == each.read.numpy()).all()
            level, weight = (byte & LEVELS).astype(int), each.weight.numpy()
            above = level > 0
            assert (weight[above] >= 2.0 ** (level[above] - 15)).all()
            assert (weight[above] < 2.0 ** (level[above] - 14)).all()
            lost = (each.weight * ~each.read).sum(1).numpy()
            assert found.lost[step, n] == pytest.approx(lost, abs=1e-6)


@pytest.mark.parametrize(
    "line, told",
    [
        ("a_shape", "leave it out"),
        ('local(layers="1::2")', "leave it out"),
        ("keydiff(chunk=512)", "leave chunk out"),
        ("duo(keydiff, heads='f')", r"different numbers; show keydiff\(budget=1024, sinks=4"),
        ("kvzip", "snapkv"),
    ],
)
def test_what_cannot_be_shown_is_refused(line, told):
    with pytest.raises(ValueError, match=told):
        check_line(line)


def drawn(steps=8, layers=30, heads=3, prompt=4000) -> Looks:
    """Looks of a page as large as pages get: bytes by lot, which nothing compresses."""
    random = np.random.default_rng(0)
    shape = steps, layers, heads, prompt + steps
    tokens = [f" word{n}" if n % 12 else "\n</script><b>&amp;" for n in range(prompt + steps)]
    return Looks(
        tokens=tokens,
        prompt=prompt,
        answer=[f" a{n}" for n in range(steps)],
        said=[f" a{n}" if n else "<i>" for n in range(steps)],
        seen=random.integers(0, 64, shape, dtype=np.uint8),
        lost=random.random(shape[:3]).astype(np.float32),
        strongest=random.integers(32, prompt, shape[:3], dtype=np.int32),
        layers=list(range(layers)),
    )


def test_a_page_of_four_thousand_tokens_is_small_and_names_no_address():
    page = render(drawn(), line="quest(budget=64)", model="<m>", layers=list(range(30)))
    assert len(page.encode()) < 5_000_000
    assert not re.findall(r"https?://|src=|@import|<link", page)
    about = page.partition('id="about">')[2].partition("</script>")[0]
    assert json.loads(about)["tokens"][12] == drawn().tokens[12]


@needs_chromium
def test_it_works_in_a_browser_without_network(tmp_path):
    looks = drawn(steps=3, layers=4, heads=2, prompt=500)
    file = tmp_path / "xray.html"
    file.write_text(render(looks, line="quest(budget=64)", model="tiny", layers=[0, 1, 2, 5]))
    with chromium(tmp_path / "profile") as page:
        page.dark(False)
        page.open(file, "document.body && document.body.dataset.ready")
        text = "document.getElementById('text').textContent"
        assert page.ask(text) == "".join(looks.tokens), "no token is taken for HTML"
        light = page.ask("getComputedStyle(document.body).backgroundColor")
        for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "]", "]"):
            page.press(key)
        values = "['stepOut', 'layerOut', 'headOut'].map(x => document.getElementById(x).value)"
        assert page.ask(values) == ["2 of 3", "5", "1"]
        shown = page.ask(
            "[...document.querySelectorAll('#text span')].slice(0, 501).map(x => x.className)"
        )
        seen = looks.seen[1, 3, 1]
        for n, name in enumerate(shown):
            read = bool(seen[n] & READ)
            kept = bool(seen[n] & KEPT)
            assert ("kept" in name) == (kept and not read)
            assert ("gone" in name) == (not kept and not read)
            assert ("strongest" in name) == (n == looks.strongest[1, 3, 1])
        assert f"lost {100 * looks.lost[1, 3, 1]:.0f} %" in page.ask(
            "document.getElementById('facts').textContent"
        )
        page.press("t")
        assert page.ask("getComputedStyle(document.body).backgroundColor") != light
        page.shoot(tmp_path / "dark.png")
        assert page.troubles == []
        assert page.asked == [Path(file).as_uri()]
