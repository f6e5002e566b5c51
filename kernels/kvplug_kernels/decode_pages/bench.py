"""python -m kvplug_kernels.decode_pages.bench"""

from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.decode_shapes import DecodeInputs, coded_cache
from kvplug_kernels.graph_timing import Case, print_case


def case(inputs: DecodeInputs) -> Case:
    """As many pages of each request as a step would choose."""
    i, (cache, layout) = inputs, coded_cache(inputs)
    pages = i.page_table[:, : i.shape.kept_pages].flatten()
    moved = len(pages) * i.shape.H * (layout.plain_bytes + layout.page_bytes)
    return Case("decode_pages", lambda: decode_pages(cache, pages, layout), moved)


if __name__ == "__main__":
    print_case(case)
