"""python -m kvplug_kernels.code_logits.bench"""

from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.decode_shapes import CODE_BITS, DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case


def case(inputs: DecodeInputs) -> Case:
    """Of every page, as if one more followed; codes are read, logits are written."""
    i = inputs
    moved = i.shape.B * (i.shape.pages * i.codes[0].nbytes + 4 * i.shape.Hq * i.shape.tokens)
    return Case(
        "code_logits",
        lambda: code_logits(i.query, i.codes, i.page_table, i.pages, i.shape.S, CODE_BITS),
        moved,
    )


if __name__ == "__main__":
    print_case(case)
