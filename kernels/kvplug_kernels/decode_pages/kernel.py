"""One program per (page, KV head, some of its tokens)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.code_layout import packed
from kvplug_kernels.coded_decode.kernel import coded_keys, coded_values
from kvplug_kernels.page_layout import PageLayout, Views

NUMBERS = 4096  # of keys at once, and of values


@triton.jit
def decode_pages_kernel(
    codes, spread, values, scales, pages, out_keys, out_values, codes_n, codes_h, spread_n,
    spread_h, values_n, values_h, scales_n, scales_h, H,
    D: tl.constexpr, S: tl.constexpr, J: tl.constexpr, KEY_BITS: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    page = tl.load(pages + i).to(tl.int64)
    each = tl.zeros([BT], tl.int64) + page
    valid = (t < S) & (each >= 0)  # Triton 3.9's interpreter widens a number's comparison
    each = tl.maximum(each, 0)
    element: tl.constexpr = codes.dtype.element_ty
    k = coded_keys(
        codes + h * codes_h, spread + h * spread_h, each, t, valid, codes_n, spread_n, element, D,
        J, KEY_BITS, BD,
    )  # fmt: skip
    token = (i * S + t) * H * D + h * D
    inside = (t < S)[:, None] & (d < D)[None, :]
    tl.store(out_keys + token[:, None] + d[None, :], tl.trans(k), mask=inside)
    v = coded_values(
        values + h * values_h, scales + h * scales_h, each, t, valid, values_n, scales_n, element,
        D, V, GROUP, VALUE_BITS, BD,
    )  # fmt: skip
    tl.store(out_values + token[:, None] + d[None, :], v, mask=inside)


def blocks(layout: PageLayout) -> dict[str, int]:
    BD = triton.next_power_of_2(layout.head_size)
    tokens = max(1, NUMBERS // BD)
    return {"BT": min(triton.next_power_of_2(layout.page_size), tokens), "BD": BD}


def decode_pages(views: Views, pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    H, S, D = views.keys.shape[1], layout.page_size, layout.head_size
    keys, values = (
        torch.empty(len(pages), S, H, D, dtype=layout.dtype, device=pages.device) for _ in range(2)
    )
    if not keys.numel():
        return keys, values
    spread, sizes = packed(views.keys, S, layout.key_bits), blocks(layout)
    decode_pages_kernel[(len(pages), H, triton.cdiv(S, sizes["BT"]))](
        views.keys, spread, views.values, views.scales, pages, keys, values,
        *views.keys.stride()[:2], *spread.stride()[:2], *views.values.stride()[:2],
        *views.scales.stride()[:2], H, **layout.constants(), **sizes,
    )  # fmt: skip
    return keys, values
