"""The same numbers in Triton, from their bits: not every GPU's compiler has each of them."""

import triton
import triton.language as tl


@triton.jit
def widened(raw):
    """fp32 of what was loaded, where its integers stand for numbers of eight bits."""
    if raw.dtype == tl.uint8 or raw.dtype == tl.int8:
        MANTISSA: tl.constexpr = 20 if raw.dtype == tl.uint8 else 21
        SCALE: tl.constexpr = 2.0**120 if raw.dtype == tl.uint8 else 2.0**112
        number = raw.to(tl.int32)
        size = ((number & 0x7F) << MANTISSA).to(tl.float32, bitcast=True) * SCALE
        return tl.where((number & 0x80) != 0, -size, size)
    else:
        return raw


@triton.jit
def narrowed(value, element: tl.constexpr):
    """What is to be stored of fp32 that are numbers of the element, which integers stand for."""
    if element == tl.uint8 or element == tl.int8:
        MANTISSA: tl.constexpr = 20 if element == tl.uint8 else 21
        SCALE: tl.constexpr = 2.0**-120 if element == tl.uint8 else 2.0**-112
        size = (tl.abs(value) * SCALE).to(tl.int32, bitcast=True) >> MANTISSA
        return (size | tl.where(value < 0, 0x80, 0)).to(element)
    else:
        return value.to(element)
