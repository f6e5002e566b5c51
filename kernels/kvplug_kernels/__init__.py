"""Kernels over a paged KV cache, a folder per op: reference.py says what, kernel.py does it fast.

    page_digest     min and max per channel of a page's keys, written as the keys arrive
    page_bound      upper bound of q . k over each page, from its digest (Quest)
    page_select     the pages that score highest, as ascending indices
    key_codes       a full page's keys in 1, 2, 4 or 8 bits per channel, kept behind the page
    code_logits     q . k of every token of the full pages, from the codes of their keys
    token_select    the tokens that weigh most by such logits, as ascending indices (Twilight)
    virtual_heads   a selection per KV head as page tables for a stock dense kernel
    slot_lists      what each head or request reads as lists of tokens, for a stock kernel
    antidiagonal    how a block of queries spreads its attention over pages (XAttention)
    block_mean      the mean query of each block
    sparse_decode   softmax attention of one query token over the selected pages or tokens
    encode_pages    full pages written as codes, keys per channel and values per token (KIVI)
    decode_pages    the keys and values of such pages, as their codes have them
    coded_decode    softmax attention of one query token over what is chosen of such pages
    pack_tokens     the tokens each KV head keeps of a prompt, copied into pages of their own
    resident_pages  what each KV head chose of pages on the host, brought to where it is read

Import an op from its folder: ``from kvplug_kernels.page_bound import page_bound``.
Importing needs torch alone; Triton is imported by the first CUDA call.

Axes: B requests, Hq query heads, H KV heads, G = Hq / H, D head dim, S tokens per page, N physical
pages, P width of the page table, K width of a selection, T tokens, J prompts whose prefill ended,
C channels of a token in a cache, keys and values; n blocks of queries. Columns of a page table at
or past a request's page count are never followed: the pages behind them may belong to others.
"""
