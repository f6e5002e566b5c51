"""python -m kvplug_kernels.virtual_heads.bench"""

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.virtual_heads import virtual_heads


def case(inputs: DecodeInputs) -> Case:
    i = inputs
    S, H = i.shape.S, i.shape.H
    out = virtual_heads(i.page_table, i.chosen, i.counts, i.lengths, S, H, 1)
    return Case(
        "virtual_heads",
        lambda: virtual_heads(i.page_table, i.chosen, i.counts, i.lengths, S, H, 1, out=out),
        3 * i.chosen.nbytes,
    )


if __name__ == "__main__":
    print_case(case)
