"""python -m kvplug_kernels.slot_lists.bench"""

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.slot_lists import slot_lists


def case(inputs: DecodeInputs) -> Case:
    i = inputs
    _, slots = slot_lists(i.page_table, i.lengths, i.shape.S, i.chosen, i.counts)
    return Case(
        "slot_lists",
        lambda: slot_lists(i.page_table, i.lengths, i.shape.S, i.chosen, i.counts),
        2 * i.chosen.nbytes + slots.nbytes,
    )


if __name__ == "__main__":
    print_case(case)
