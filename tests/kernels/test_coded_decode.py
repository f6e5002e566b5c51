import torch

from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.page_layout import PageLayout
from tests.kernels.coded_pages import coded_pages


def test_reference_over_everything_is_dense_attention_over_decoded_pages():
    layout = PageLayout(page_size=16, head_size=64, key_bits=4, value_bits=2, dtype=torch.float32)
    pages, H, G = coded_pages([100, 0, 32, 1], 2, layout), 2, 3
    query = torch.randn(4, H * G, 64, generator=torch.Generator().manual_seed(1))
    out = coded_decode(query, *pages.pools(), None, None, pages.lengths, 0.2)
    for q, length in enumerate(pages.lengths.tolist()):
        coded = max(length - 1, 0) // 16
        ids, last = pages.page_table[q, :coded], pages.open_page[q]
        k, v = (
            torch.cat([old.flatten(0, 1), new[last]])[:length].double()
            for old, new in zip(
                decode_pages(pages.cache, ids, layout), (pages.open_keys, pages.open_values),
                strict=True,
            )
        )  # fmt: skip
        wanted = query[q].double().view(H, G, 64)
        weights = (torch.einsum("hgd,thd->hgt", wanted, k) * 0.2).softmax(-1)
        expected = torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)
        torch.testing.assert_close(out[q].double(), expected, rtol=1e-5, atol=1e-5)
