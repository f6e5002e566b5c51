"""python -m kvplug_kernels.key_codes.bench"""

from kvplug_kernels.decode_shapes import CODE_BITS, DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.key_codes import update_key_codes


def case(inputs: DecodeInputs) -> Case:
    """The last token of a page of each request; its keys are read, its codes are written."""
    i = inputs
    size = i.shape.S
    slots = i.page_table[:, 0].long() * size + size - 1
    moved = i.shape.B * (i.keys[0].nbytes + i.codes[0].nbytes)
    return Case("key_codes", lambda: update_key_codes(i.codes, i.keys, slots, CODE_BITS), moved)


if __name__ == "__main__":
    print_case(case)
