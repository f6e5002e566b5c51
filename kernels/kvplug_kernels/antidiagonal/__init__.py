"""How a block of queries spreads its attention over pages, from sums along antidiagonals
(XAttention)."""

from torch import Tensor

from kvplug_kernels.antidiagonal import reference
from kvplug_kernels.dispatch import wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes


def antidiagonal(
    query: Tensor,
    bounds: Tensor,
    start: Tensor,
    keys: Tensor,
    page_table: Tensor,
    pages: Tensor,
    stride: int,
    scale: float,
) -> Tensor:
    """query [T, H, G, D], keys [N, S, H, D], page_table [n, P], pages [n] -> [n, H, P] fp32.

    Block i has the queries bounds [n + 1] of i to i + 1, at positions from start [n] on; it sees
    the first pages of its row, and in them the tokens up to its last query. Positions are cut
    into groups of so many tokens, its stride:

        logits_ij = scale / stride * sum_r q[i * stride + stride - 1 - r] . k[j * stride + r]

    for each group i of its queries and each j <= i of the keys it sees, with zeros for queries
    that it has not and keys that it does not see. The share of a page is the sum over its groups
    of softmax_j(logits), mean over the block's groups and over the G query heads of a KV head.
    Shares of a block sum to 1; they are 0 in pages it does not see, and for no queries or pages.
    Pages may lie by any strides, in the query's dtype or in eight bits, whose factor is the
    caller's, in scale. Raises ValueError on shapes and on a stride that does not divide pages.

    Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025,
    https://arxiv.org/abs/2503.16428
    """
    shapes = Shapes(query.device)
    shapes.check("query", query, "T H G D", FLOATS)
    shapes.check("keys", keys, "N S H D", (query.dtype, *FP8), strided=True)
    shapes.check("page_table", page_table, "n P", INDICES)
    shapes.lengths["n+1"] = shapes["n"] + 1
    shapes.check("bounds", bounds, "n+1", INDICES)
    shapes.check("start", start, "n", INDICES)
    shapes.check("pages", pages, "n", INDICES)
    if stride < 1 or shapes["S"] % stride:
        raise ValueError(
            f"stride must divide the {shapes['S']} tokens of a page, got {stride}; write 8 or 16"
        )
    arguments = (query, bounds, start, keys, page_table, pages, stride, scale)
    if not wants_kernel(query):
        return reference.antidiagonal(*arguments)
    from kvplug_kernels.antidiagonal import kernel

    return kernel.antidiagonal(*arguments)


__all__ = ["antidiagonal"]
