"""Which of a loaded model's layers can be made local, and what is said of those that cannot."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from torch import nn
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

from kvplug import read_offer
from kvplug_vllm.attention import PlannedImpl
from kvplug_vllm.cache import attention_layers, planned_layers, split_layers
from kvplug_vllm.settings import Engine


class Impl(PlannedImpl):
    def __init__(self, window, kind="decoder", reads=None):
        pair = window if isinstance(window, tuple) else None
        self.sliding_window = window
        self.attn_type, self.kv_sharing_target_layer_name = kind, reads
        self.planned = kind == "decoder" and (pair[0] if pair else window) == -1
        self.local, self.digest = False, object() if self.planned else None
        self.drafts = False


def layer(cls, number, impl):
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made.layer_name, made.impl = f"model.layers.{number}.self_attn.attn", impl
    window = impl.sliding_window
    if isinstance(window, tuple):
        window = window[0] + 1 if window[0] >= 0 else -1
    made.sliding_window = None if window == -1 else window
    return made


def engine(policy, *impls, cls=Attention):
    """Of a model with such layers, and one that keeps no keys before the last of them."""
    layers = [layer(cls, n + (n == len(impls) - 1), impl) for n, impl in enumerate(impls)]
    context = {each.layer_name: each for each in reversed(layers)}
    context["model.layers.recurrent"] = SimpleNamespace()
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context),
        parallel_config=SimpleNamespace(rank=0),
    )
    return Engine(config, read_offer({"policy": policy}, environ={})), layers


LOCAL = 'local(layers="1::2", window=100)'


@pytest.mark.parametrize("all_seen, window", [(-1, 100), ((-1, -1), (99, 0))])
def test_named_layers_are_windowed_and_the_others_planned(all_seen, window):
    made, layers = engine(f"{LOCAL} + quest", *(Impl(all_seen) for _ in range(5)))
    for _ in range(2):  # weights that are loaded again are processed again
        split_layers(made)
        assert [each.impl.sliding_window for each in layers] == [all_seen, window] * 2 + [all_seen]
        assert [each.sliding_window for each in layers] == [None, 100] * 2 + [None]
        assert [each.impl.digest is None for each in layers] == [False, True] * 2 + [False]
    assert planned_layers(made.vllm_config) == [each.layer_name for each in layers[::2]]
    assert len(made.announced) == 1
    assert "layers 1,3 of 5 see the last 100 tokens" in made.announced.pop()


def test_layers_are_counted_among_those_that_attend_to_the_past():
    impls = Impl(-1, kind="encoder_only"), Impl(-1), Impl(64), Impl(-1)
    made, layers = engine(LOCAL.replace("1::2", "0,2"), *impls)
    names = [each.layer_name for each in layers]
    assert attention_layers(made.vllm_config) == names[1:]
    split_layers(made)
    assert [each.sliding_window for each in layers] == [None, 100, 64, 100]


@pytest.mark.parametrize(
    "policy, impls, message",
    [
        (LOCAL, [Impl(-1), Impl(-1), Impl(-1), Impl(64)],
         'see 64 tokens by the model\'s configuration; write layers="1"'),
        (LOCAL, [Impl(-1), Impl((63, 0))],
         "see 64 tokens by the model's configuration; drop local"),
        (LOCAL, [Impl(-1)], "layers are 0 to 0, and '1::2'"),
        (LOCAL, [Impl(-1), Impl(-1), Impl(-1, reads="model.layers.1.self_attn.attn"), Impl(-1)],
         "layers 1 of the model share a cache with others, which would miss"),
        ('local(layers=":") + quest', [Impl(-1), Impl(-1)],
         "quest(budget=2048, dense_layers=2) has nothing to plan; leave some layers out"),
        ("quest", [Impl(64), Impl(64)], "every layer of the model sees a window or a chunk"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_what_to_write(policy, impls, message):
    made, _ = engine(policy, *impls)
    with pytest.raises(ValueError, match=r"(kvplug|local): ") as refused:
        split_layers(made)
    assert message in str(refused.value)


def test_all_layers_may_be_local_where_nothing_is_planned():
    made, layers = engine('local(layers=":")', Impl(-1), Impl(-1))
    split_layers(made)
    assert [each.sliding_window for each in layers] == [1024, 1024]


def test_layers_that_attend_in_chunks_stay_as_they_are():
    made, layers = engine("quest", Impl(-1), Impl(-1), cls=ChunkedLocalAttention)
    layers[0].attention_chunk_size = 64
    split_layers(made)
    assert [each.impl.digest is None for each in layers] == [True, False]
    assert planned_layers(made.vllm_config) == [layers[1].layer_name]
    made, layers = engine('local(layers=":")', Impl(-1), Impl(-1), cls=ChunkedLocalAttention)
    layers[0].attention_chunk_size = 64
    with pytest.raises(ValueError, match=r"see 64 tokens by .* write layers=\"1\""):
        split_layers(made)


def test_a_layer_with_another_cache_is_refused():
    made, _ = engine(LOCAL, Impl(-1), Impl(-1), cls=ChunkedLocalAttention)
    with pytest.raises(ValueError, match=re.escape("attn is a ChunkedLocalAttention, which was")):
        split_layers(made)
