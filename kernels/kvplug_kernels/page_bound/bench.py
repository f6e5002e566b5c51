"""python -m kvplug_kernels.page_bound.bench"""

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.page_bound import page_bound


def case(inputs: DecodeInputs) -> Case:
    i = inputs
    moved = i.digest.nbytes + i.scores.nbytes
    return Case("page_bound", lambda: page_bound(i.query, i.digest, i.page_table, i.pages), moved)


if __name__ == "__main__":
    print_case(case)
