"""Plain fp32 torch: what is chosen of a query's pages, decoded, then ``sparse_decode``'s sums."""

import torch
from torch import Tensor

from kvplug_kernels.decode_pages.reference import keys_of, values_of
from kvplug_kernels.page_layout import PageLayout, Views
from kvplug_kernels.sparse_decode import reference as sparse_decode


def coded_decode(
    query: Tensor,
    views: Views,
    layout: PageLayout,
    open_keys: Tensor,
    open_values: Tensor,
    open_page: Tensor,
    page_table: Tensor,
    chosen: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    scale: float,
    unit: int,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    S, H = layout.page_size, views.keys.shape[1]
    out = torch.zeros_like(query)
    for q, length in enumerate(lengths.tolist()):
        newest = max(length - 1, 0) // S
        pages = torch.arange(newest + 1, device=query.device, dtype=torch.int32)
        if chosen is None or counts is None:
            named = torch.arange(-(-length // unit), device=query.device, dtype=torch.int32)
            picked, taken = named.expand(1, H, -1), lengths.new_full((1, H), len(named))
        else:
            picked, taken = chosen[q : q + 1], counts[q : q + 1]
        coded = page_table[q, :newest].long()
        at = slice(q, q + 1)
        decoded = []
        for of, beside in ((keys_of, open_keys), (values_of, open_values)):
            last = beside[open_page[at].long()] if length else beside[:1]
            decoded.append(torch.cat([of(views, coded, layout).transpose(1, 2), last.float()]))
        out[q] = sparse_decode.sparse_decode(
            query[at].float(), decoded[0], decoded[1], pages[None], picked, taken, lengths[at],
            scale, unit, sinks, cap,
        )[0]  # fmt: skip
    return out
