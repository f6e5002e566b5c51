"""A selection per KV head as the page table of a stock dense kernel: each head is a sequence."""

from torch import Tensor

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.shapes import INDICES, Shapes, check_page_size, check_unit
from kvplug_kernels.virtual_heads import reference


def virtual_heads(
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    page_size: int,
    page_stride: int,
    head_stride: int,
    out: tuple[Tensor, Tensor] | None = None,
    unit: int | None = None,
    token_stride: int = 0,
) -> tuple[Tensor, Tensor]:
    """page_table [B, P], chosen [B, H, K], counts [B, H], lengths [B] -> [B*H, K], [B*H] int32.

    Row b * H + h holds page * page_stride + h * head_stride + offset * token_stride for each unit
    that KV head h chose, and 0 past counts: units are so many tokens, pages unless said (1:
    tokens), offset is where in its page a unit begins, and all strides count the stock kernel's
    virtual pages. A row's length in tokens takes the last unit as far as lengths fill it. `out`
    receives the result (for CUDA graphs). Raises ValueError on shapes and unit.
    """
    shapes = Shapes(page_table.device)
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("chosen", chosen, "B H K", INDICES)
    shapes.check("counts", counts, "B H", INDICES)
    shapes.check("lengths", lengths, "B", INDICES)
    check_page_size(page_size)
    unit = check_unit(unit, page_size)
    B, H, K = chosen.shape
    if out is None:
        out = chosen.new_empty(B * H, K), chosen.new_empty(B * H)
    shapes.lengths["B*H"] = B * H
    shapes.check("out[0]", out[0], "B*H K", INDICES)
    shapes.check("out[1]", out[1], "B*H", INDICES)
    arguments = (
        page_table, chosen, counts, lengths, page_size, page_stride, head_stride, out,
        unit, token_stride,
    )  # fmt: skip
    if wants_kernel(page_table):
        from kvplug_kernels.virtual_heads import kernel

        kernel.virtual_heads(*arguments)
    elif wants_compiled(page_table):
        from kvplug_kernels.virtual_heads import cpu

        cpu.virtual_heads(*arguments)
    else:
        reference.virtual_heads(*arguments)
    return out


__all__ = ["virtual_heads"]
