"""The stock Triton backend, planned. Triton's interpreter runs it on a CPU, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, logit_capping_mod
from torch import Tensor

from kvplug_sglang.attention import PlannedAttention
from kvplug_sglang.replay import Replayed
from kvplug_sglang.step import Whole, starts


class KVPlugBackend(PlannedAttention, TritonAttnBackend):
    replays: tuple[Replayed, ...] = ()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *more: Any) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, *more)
        if not self.engine.dense:
            longest = self.max_context_len
            self.replays = tuple(Replayed(each, max_bs, longest) for each in self.steps)

    def init_forward_metadata_out_graph(
        self, forward_batch: Any, in_capture: bool = False
    ) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        batch = self._batch(forward_batch)
        if batch is not None:
            for each in self.replays:
                each.load(batch, count=not in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        super().init_forward_metadata_in_graph(forward_batch)
        rows = forward_batch.req_pool_indices.long()
        self.plans = [each.plan(rows) for each in self.replays] or [None] * len(self.steps)

    def attend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor
    ) -> None:
        cap = logit_capping_mod(layer.logit_capping_method, layer.logit_cap)
        if whole.longest_run == 1:
            self._decode(layer, query, keys, values, whole, out, cap)
        else:
            self._extend(layer, query, keys, values, whole, out, cap)

    def _decode(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor,
        cap: float,
    ) -> None:  # fmt: skip
        bounds, slots = whole.seen
        partial = (*query.shape[:2], self.max_kv_splits)
        splits = torch.empty(len(query), dtype=torch.int32, device=query.device)
        self.get_num_kv_splits(splits, whole.lengths)
        self.decode_attention_fwd(
            query, keys, values, out, bounds, slots,
            query.new_empty(*partial, out.shape[2], dtype=torch.float32),
            query.new_empty(partial, dtype=torch.float32),
            splits, self.max_kv_splits, layer.scaling, 1.0, 1.0, logit_cap=cap,
        )  # fmt: skip

    def _extend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor,
        cap: float,
    ) -> None:  # fmt: skip
        bounds, slots = whole.before
        self.extend_attention_fwd(
            query.contiguous(), keys[whole.own], values[whole.own], out, keys, values,
            starts(whole.queries), bounds, slots, None, True, None, whole.longest_run, 1.0, 1.0,
            layer.scaling, logit_cap=cap,
        )  # fmt: skip
