"""How the codes of a page's keys lie behind it, in rows of D elements of the cache's dtype.

    row 0   lo, the lowest key of each channel
    row 1   step, what a channel's codes count: a key is about lo + step * code
    rest    J = S * bits / 8 rows of D bytes: byte (j, d) holds channel d of the tokens j + i * J,
            i below 8 / bits, each at bit i * bits

so that one shift of the same bytes is the codes of neighbouring tokens, and nothing is reshaped.
"""

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)


def code_bytes(page_size: int, bits: int) -> int:
    """Bytes of a channel's codes in one page, J. Raises ValueError on either."""
    if bits not in BITS:
        raise ValueError(f"bits must be 1, 2, 4 or 8, got {bits}")
    if page_size < 1 or page_size % (8 // bits):
        raise ValueError(
            f"page_size must be a multiple of {8 // bits} tokens, which share a byte at {bits} "
            f"bits, got {page_size}"
        )
    return page_size * bits // 8


def code_rows(page_size: int, bits: int, itemsize: int) -> int:
    """Rows of D elements of itemsize bytes that a head's codes take behind a page."""
    return 2 + -(-code_bytes(page_size, bits) // itemsize)


def check_rows(codes: Tensor, page_size: int, bits: int) -> None:
    """Raises ValueError unless codes [..., R, D] have the rows that bits need, side by side."""
    rows, D = code_rows(page_size, bits, codes.element_size()), codes.shape[-1]
    if codes.shape[-2] != rows:
        raise ValueError(
            f"codes must have R = {rows} rows for pages of {page_size} tokens at {bits} bits, "
            f"got {list(codes.shape)}"
        )
    if codes.stride(-2) != D:
        raise ValueError(
            f"codes must have rows of D = {D} elements side by side, "
            f"got strides {list(codes.stride())}"
        )


def packed(codes: Tensor, page_size: int, bits: int) -> Tensor:
    """codes [..., R, D] -> [..., J, D] uint8, the bytes behind lo and step where they lie"""
    D, J = codes.shape[-1], code_bytes(page_size, bits)
    return codes[..., 2:, :].view(torch.uint8).flatten(-2)[..., : J * D].unflatten(-1, (J, D))
