"""python -m kvplug_kernels.encode_pages.bench"""

from kvplug_kernels.decode_shapes import DecodeInputs, coded_cache
from kvplug_kernels.encode_pages import encode_pages
from kvplug_kernels.graph_timing import Case, print_case


def case(inputs: DecodeInputs) -> Case:
    """A page of each request ends: its keys and values are read, its codes are written."""
    i, (cache, layout) = inputs, coded_cache(inputs)
    pages = i.page_table[:, 0].contiguous()
    moved = i.shape.B * i.shape.H * (layout.plain_bytes + layout.page_bytes)
    return Case(
        "encode_pages",
        lambda: encode_pages(cache, i.keys, i.values, pages, layout, sources=pages),
        moved,
    )


if __name__ == "__main__":
    print_case(case)
