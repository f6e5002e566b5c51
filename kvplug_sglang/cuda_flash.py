"""The stock FlashAttention 3 backend, planned. Never run on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from torch import Tensor

from kvplug_kernels.virtual_heads import virtual_heads
from kvplug_sglang.cuda import ReplayedAttention, with_sinks
from kvplug_sglang.step import Heads, Selected, Whole


class KVPlugBackend(ReplayedAttention, FlashAttentionBackend):
    reads_eight_bits = True  # queries of e4m3 too

    def attend(
        self, layer: Any, query: Tensor, whole: Whole, out: Tensor, sinks: Tensor | None
    ) -> None:
        if isinstance(whole, Heads):
            keys, values = (one_head(each, whole.page_size) for each in self._kv(layer.layer_id))
        else:
            keys, values = self.get_paged_mha_kv_cache(layer)
        self._flash(
            layer, query, keys, values, whole.page_table, whole.lengths, whole.starts,
            whole.longest_run, out, sinks=sinks,
        )  # fmt: skip

    def attend_heads(
        self, layer: Any, query: Tensor, step: Selected, chosen: Tensor, counts: Tensor,
        out: Tensor, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        size, heads, group = self.page_size, query.shape[1], query.shape[2]
        table, lengths = virtual_heads(
            step.page_table, chosen, counts, step.lengths, size, size * heads, 1,
            unit=step.unit, token_stride=heads,
        )  # fmt: skip
        keys, values = (one_head(each, step.unit) for each in self._kv(layer.layer_id))
        starts = torch.arange(len(table) + 1, dtype=torch.int32, device=table.device)
        out = out.view(-1, group, out.shape[2])
        weights = self._flash(
            layer, query.flatten(0, 1), keys, values, table, lengths, starts, 1, out,
            weighs=sinks is not None,
        )  # fmt: skip
        if sinks is not None:
            assert weights is not None
            with_sinks(out, weights.T, sinks)

    def _flash(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, table: Tensor,
        lengths: Tensor, starts: Tensor, longest_run: int, out: Tensor,
        sinks: Tensor | None = None, weighs: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """-> where asked for, what each query's tokens weigh, as a logarithm. [Hq, N]"""
        same, scales = out.dtype == keys.dtype, {}
        if keys.dtype is torch.float8_e4m3fn and layer.k_scale is not None:
            shape = len(lengths), keys.shape[2]
            scales["k_descale"] = layer.k_scale.expand(shape)
            scales["v_descale"] = layer.v_scale.expand(shape)
        found = flash_attn_with_kvcache(
            q=query.to(keys.dtype).contiguous(),
            k_cache=keys,
            v_cache=values,
            page_table=table,
            cache_seqlens=lengths,
            cu_seqlens_q=starts,
            max_seqlen_q=longest_run,
            softmax_scale=layer.scaling,
            causal=True,
            softcap=layer.logit_cap,
            num_splits=self.num_splits,
            out=out if same else None,
            ver=self.fa_impl_ver,
            return_softmax_lse=weighs,
            sinks=sinks,
            **scales,
        )
        weights = None
        if weighs:
            found, weights, *_ = found
        if not same:
            out.copy_(found)
        return weights


def one_head(cache: Tensor, page_size: int) -> Tensor:
    """cache [slots, H, D] -> [n, S, 1, D]: virtual page t * H + h is KV head h of the S tokens
    from slot t on.

    The kernel gathers rows by stride and asks neither that pages lie apart nor how many there are.
    """
    assert cache.is_contiguous(), "a pool of token-major pages"
    slots, heads, channels = cache.shape
    return cache.as_strided(
        (slots * heads - (page_size - 1) * heads, page_size, 1, channels),
        (channels, heads * channels, channels, 1),
    )
