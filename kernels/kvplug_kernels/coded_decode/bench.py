"""python -m kvplug_kernels.coded_decode.bench"""

from torch import Tensor

from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.decode_shapes import DecodeInputs, coded_cache
from kvplug_kernels.graph_timing import Case, print_case


def build(name: str, i: DecodeInputs, chosen: Tensor | None, counts: Tensor | None) -> Case:
    """The newest page is read from the plain cache, every other one from codes."""
    cache, layout = coded_cache(i)
    pages = i.shape.pages if chosen is None else i.shape.kept_pages
    read = (pages - 1) * layout.page_bytes + layout.plain_bytes
    pools = (cache, layout, i.keys, i.values, i.page_table[:, -1].contiguous(), i.page_table)
    rest = (chosen, counts, i.lengths, i.shape.D**-0.5)
    return Case(name, lambda: coded_decode(i.query, *pools, *rest), i.shape.B * i.shape.H * read)


def case(inputs: DecodeInputs) -> Case:
    return build("coded_decode", inputs, inputs.chosen, inputs.counts)


def dense_case(inputs: DecodeInputs) -> Case:
    return build("coded_dense", inputs, None, None)


if __name__ == "__main__":
    print_case(case)
    print_case(dense_case)
