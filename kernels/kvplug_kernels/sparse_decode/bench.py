"""python -m kvplug_kernels.sparse_decode.bench"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvplug_kernels import flash3
from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_select import page_select
from kvplug_kernels.sparse_decode import sparse_decode
from kvplug_kernels.virtual_heads import virtual_heads

BASELINES = {
    "dense_kernel": "sparse_decode itself over all pages",
    "dense_sdpa": "torch scaled_dot_product_attention over keys and values gathered beforehand",
}


def attend(i: DecodeInputs, chosen: Tensor, counts: Tensor) -> Tensor:
    scale = i.shape.D**-0.5
    return sparse_decode(i.query, i.keys, i.values, i.page_table, chosen, counts, i.lengths, scale)


def token_bytes(i: DecodeInputs) -> int:
    """Keys and values of one token of all KV heads."""
    return 2 * i.shape.H * i.shape.D * i.keys.element_size()


def case(inputs: DecodeInputs) -> Case:
    i = inputs
    moved = i.shape.B * i.shape.kept_pages * i.shape.S * token_bytes(i)
    return Case("sparse_decode", lambda: attend(i, i.chosen, i.counts), moved)


def chain_case(inputs: DecodeInputs) -> Case:
    """Bound, select and attend: what takes the place of dense attention."""
    i = inputs

    def chain() -> Tensor:
        scores = page_bound(i.query, i.digest, i.page_table, i.pages)
        return attend(i, *page_select(scores, i.pages, i.keep, i.shape.kept_pages))

    return Case("chain", chain, case(i).bytes + i.digest.nbytes)


def dense_case(inputs: DecodeInputs) -> Case:
    i = inputs
    every = torch.arange(i.shape.pages, device=i.pages.device, dtype=torch.int32)
    chosen = every.repeat(i.shape.B, i.shape.H, 1)
    counts = torch.full_like(i.counts, i.shape.pages)
    moved = i.shape.B * i.shape.tokens * token_bytes(i)
    return Case("dense_kernel", lambda: attend(i, chosen, counts), moved)


def sdpa_case(inputs: DecodeInputs) -> Case:
    i = inputs

    def gathered(pool: Tensor) -> Tensor:  # [B, H, tokens, D]
        rows = pool[i.page_table.long()].flatten(1, 2)[:, : i.shape.tokens]
        return rows.transpose(1, 2).contiguous()

    query, keys, values = i.query[:, :, None], gathered(i.keys), gathered(i.values)
    moved = i.shape.B * i.shape.tokens * token_bytes(i)
    return Case(
        "dense_sdpa",
        lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)[:, :, 0],
        moved,
    )


def fa3_dense_case(inputs: DecodeInputs) -> Case:
    """FlashAttention 3 as an engine runs it over everything."""
    i = inputs
    return Case(
        "fa3_dense",
        lambda: flash3.attend(i.query, i.keys, i.values, i.page_table, i.lengths, i.shape.tokens),
        dense_case(i).bytes,
    )


def fa3_selected_case(inputs: DecodeInputs, splits: int = 0) -> Case:
    """FlashAttention 3 over virtual_heads' table: each KV head is a sequence."""
    i, (query, table, lengths) = inputs, virtual_sequences(inputs)
    keys, values = (flash3.virtual_pages(pool)[0] for pool in (i.keys, i.values))
    longest = i.shape.kept_pages * i.shape.S

    def attend() -> Tensor:
        out = flash3.attend(query, keys, values, table, lengths, longest, splits)
        return out.view_as(i.query)

    return Case(f"fa3_selected_{splits}" if splits else "fa3_selected", attend, case(i).bytes)


def fa3_tokens_case(inputs: DecodeInputs) -> Case:
    """The same tokens one by one: pages of one token, as a choice of tokens would be read."""
    i, (query, pages, lengths) = inputs, virtual_sequences(inputs)
    (keys, table), (values, _) = (
        flash3.virtual_tokens(pool, pages) for pool in (i.keys, i.values)
    )
    longest = i.shape.kept_pages * i.shape.S

    def attend() -> Tensor:
        return flash3.attend(query, keys, values, table, lengths, longest).view_as(i.query)

    return Case("fa3_tokens", attend, case(i).bytes)


def virtual_sequences(i: DecodeInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B * H, G, D], table [B * H, K] and lengths [B * H] of the inputs' selection."""
    _, page_stride, head_stride = flash3.virtual_pages(i.keys)
    table, lengths = virtual_heads(
        i.page_table, i.chosen, i.counts, i.lengths, i.shape.S, page_stride, head_stride
    )
    group = i.shape.Hq // i.shape.H
    return i.query.view(i.shape.B * i.shape.H, group, i.shape.D), table, lengths


FA3_SPLITS = 32
"""As vLLM captures decode graphs."""
FA3_CASES = (
    fa3_dense_case,
    fa3_selected_case,
    partial(fa3_selected_case, splits=FA3_SPLITS),
    fa3_tokens_case,
)


if __name__ == "__main__":
    print_case(case)
