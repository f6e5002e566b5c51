"""python -m kvplug_kernels.token_select.bench"""

import torch
from torch import Tensor

from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.decode_shapes import CODE_BITS, KEPT_TOKENS, DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.sparse_decode import sparse_decode
from kvplug_kernels.token_select import token_select


def choose(i: DecodeInputs, logits: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    shape = i.shape
    return token_select(
        logits, shape.H, i.lengths, shape.S, keep, KEPT_TOKENS, shape.D**-0.5, sinks=4
    )


def case(inputs: DecodeInputs) -> Case:
    i = inputs
    width = i.shape.pages * i.shape.S
    logits = torch.randn(i.shape.B, i.shape.Hq, width, device=i.lengths.device) * i.shape.D**0.5
    keep = torch.full_like(i.lengths, KEPT_TOKENS)
    moved = logits.nbytes + 4 * i.shape.B * i.shape.H * KEPT_TOKENS
    return Case("token_select", lambda: choose(i, logits, keep), moved)


def chain_case(inputs: DecodeInputs) -> Case:
    """Logits, choice and attention: twilight in place of dense attention."""
    i = inputs
    keep = torch.full_like(i.lengths, KEPT_TOKENS)

    def chain() -> Tensor:
        scored = (i.lengths - 1) // i.shape.S
        logits = code_logits(i.query, i.codes, i.page_table, scored, i.shape.S, CODE_BITS)
        chosen, counts = choose(i, logits, keep)
        return sparse_decode(
            i.query, i.keys, i.values, i.page_table, chosen, counts, i.lengths,
            i.shape.D**-0.5, unit=1,
        )  # fmt: skip

    read = min(KEPT_TOKENS, i.shape.tokens) * 2 * i.shape.H * i.shape.D * i.keys.element_size()
    moved = i.shape.B * (i.shape.pages * i.codes[0].nbytes + read)
    return Case("token_chain", chain, moved)


if __name__ == "__main__":
    print_case(case)
