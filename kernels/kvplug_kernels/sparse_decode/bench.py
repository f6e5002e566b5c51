"""python -m kvplug_kernels.sparse_decode.bench"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_select import page_select
from kvplug_kernels.sparse_decode import sparse_decode

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


if __name__ == "__main__":
    print_case(case)
