"""python -m kvplug_kernels.page_select.bench"""

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.page_select import page_select


def case(inputs: DecodeInputs) -> Case:
    i = inputs
    moved = i.scores.nbytes + i.chosen.nbytes
    width = i.shape.kept_pages
    return Case("page_select", lambda: page_select(i.scores, i.pages, i.keep, width), moved)


if __name__ == "__main__":
    print_case(case)
