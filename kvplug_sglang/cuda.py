"""What both of SGLang's CUDA backends share once they are planned: decode steps that replay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvplug_sglang.attention import PlannedAttention
from kvplug_sglang.replay import Replayed


class ReplayedAttention(PlannedAttention):
    """Before a stock AttentionBackend that SGLang's decode graphs know."""

    replays: tuple[Replayed, ...] = ()
    max_context_len: int

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *more: Any) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, *more)  # type: ignore[misc]
        if not self.engine.dense:
            longest = self.max_context_len
            self.replays = tuple(Replayed(each, max_bs, longest) for each in self.steps)

    def init_forward_metadata_out_graph(
        self, forward_batch: Any, in_capture: bool = False
    ) -> None:
        super().init_forward_metadata_out_graph(  # type: ignore[misc]
            forward_batch, in_capture
        )
        if self.engine.dense:
            self._count_dense(None if in_capture else self.batch(forward_batch))
            return
        self.take()
        batch = self.batch(forward_batch) if self.replays else None
        if batch is not None:
            for each in self.replays:
                each.load(batch, count=not in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        super().init_forward_metadata_in_graph(forward_batch)  # type: ignore[misc]
        rows = forward_batch.req_pool_indices.long()
        slots = forward_batch.out_cache_loc
        self.plans = [each.plan(rows, slots) for each in self.replays] or [None] * len(self.steps)


def with_sinks(out: Tensor, weights: Tensor, sinks: Tensor) -> None:
    """In place: what KV heads read as sequences of their own, as if beside sinks that belong to
    query heads.

    out [Q * H, G, D], weights [Q * H, G] the logarithm of what was read, sinks [H * G] logits.
    """
    heads = sinks.view(-1, out.shape[1]).repeat(len(out) // (len(sinks) // out.shape[1]), 1)
    out.mul_((weights - heads.float()).sigmoid()[..., None].to(out.dtype))
