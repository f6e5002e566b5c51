"""q . k of every token of the full pages, from the codes of their keys."""

from torch import Tensor, bool

from kvplug_kernels.code_layout import check_rows
from kvplug_kernels.code_logits import reference
from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes, by_page


def code_logits(
    query: Tensor,
    codes: Tensor,
    page_table: Tensor,
    pages: Tensor,
    page_size: int,
    bits: int,
    wanted: Tensor | None = None,
) -> Tensor:
    """query [B, Hq, D], codes [N, H, R, D], page_table [B, P], pages [B] -> [B, Hq, P * S] fp32.

    sum_d q_d * (lo_d + step_d * code_d) for each token of the first pages of a row, which are full
    and coded (``update_key_codes``); -inf behind them, and in pages that are not wanted [B, H, P]
    bool by their KV head, of which lo and step alone may be read. Not scaled. Where a block of the
    table is K pages, codes are [N, K, H, R, D] and P counts K pages for each. The codes' lo and
    step have the query's dtype or eight bits. Raises ValueError on shapes, bits and page_size.
    """
    codes, shapes = by_page(codes), Shapes(query.device)
    shapes.check("query", query, "B Hq D", FLOATS)
    shapes.check("codes", codes, "N K H R D", (query.dtype, *FP8))
    shapes.check("page_table", page_table, "B T", INDICES)
    shapes.check("pages", pages, "B", INDICES)
    if wanted is not None:
        shapes.lengths["P"] = shapes["T"] * shapes["K"]
        shapes.check("wanted", wanted, "B H P", (bool,))
    shapes.check_groups()
    check_rows(codes, page_size, bits)
    if not wants_kernel(query):
        if wants_compiled(query) and query.shape[2] % 8 == 0:
            from kvplug_kernels.code_logits import cpu

            return cpu.code_logits(query, codes, page_table, pages, page_size, bits, wanted)
        return reference.code_logits(query, codes, page_table, pages, page_size, bits, wanted)
    from kvplug_kernels.code_logits import kernel

    return kernel.code_logits(query, codes, page_table, pages, page_size, bits, wanted)


__all__ = ["code_logits"]
