"""python -m kvplug_kernels.page_digest.bench"""

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.page_digest import update_page_digest


def case(inputs: DecodeInputs) -> Case:
    """One token of each request; its key and the digest are read, the digest is written."""
    i = inputs
    moved = 5 * i.new_keys.nbytes
    return Case(
        "page_digest",
        lambda: update_page_digest(i.digest, i.new_keys, i.slots, i.shape.S),
        moved,
    )


if __name__ == "__main__":
    print_case(case)
