"""A selection per KV head as the page table of a stock dense kernel: each head is a sequence."""

from torch import Tensor

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.shapes import INDICES, Shapes, check_page_size
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
) -> tuple[Tensor, Tensor]:
    """page_table [B, P], chosen [B, H, K], counts [B, H], lengths [B] -> [B*H, K], [B*H] int32.

    Row b * H + h holds page * page_stride + h * head_stride for each chosen page of KV head h,
    both strides in the stock kernel's virtual pages, and 0 past counts. Its length in tokens takes
    the last page as far as lengths fill it. `out` receives the result (for CUDA graphs).
    Raises ValueError on shapes.
    """
    shapes = Shapes(page_table.device)
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("chosen", chosen, "B H K", INDICES)
    shapes.check("counts", counts, "B H", INDICES)
    shapes.check("lengths", lengths, "B", INDICES)
    check_page_size(page_size)
    B, H, K = chosen.shape
    if out is None:
        out = chosen.new_empty(B * H, K), chosen.new_empty(B * H)
    shapes.lengths["B*H"] = B * H
    shapes.check("out[0]", out[0], "B*H K", INDICES)
    shapes.check("out[1]", out[1], "B*H", INDICES)
    if not wants_kernel(page_table):
        if wants_compiled(page_table):
            from kvplug_kernels.virtual_heads import cpu

            cpu.virtual_heads(
                page_table, chosen, counts, lengths, page_size, page_stride, head_stride, out
            )
            return out
        reference.virtual_heads(
            page_table, chosen, counts, lengths, page_size, page_stride, head_stride, out
        )
        return out
    from kvplug_kernels.virtual_heads import kernel

    kernel.virtual_heads(
        page_table, chosen, counts, lengths, page_size, page_stride, head_stride, out
    )
    return out


__all__ = ["virtual_heads"]
