"""Host: a prompt's pages in host memory, all of them there to be chosen from at every step.

    pool of a request  =  hot pages + digests of its prompt + partial page + answer
    host of a request  =  whole pages of its prompt

A selector scores the digests of all pages, as without it, and names those that each KV head reads.
What is not among the hot pages yet is copied there, over what is not read in this step; then the
engine's own kernel reads them. So the answer is, number for number, the selector's without it.

Of a prompt of 1,989 tokens in 62 pages SmolLM2-135M reads 12 to 13 % new pages in a step and layer
where 16 are chosen, 8 to 10 % where 32 are.

Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context
Memory", NeurIPS 2024, https://arxiv.org/abs/2402.04617; after Liu et al., "RetrievalAttention:
Accelerating Long-Context LLM Inference via Vector Retrieval", 2024,
https://arxiv.org/abs/2409.10516, which searches an index on the host instead.

Differs from the paper: any selector of pages chooses, by digests that stay with the model; a hot
page goes when its place is wanted, in order, not by how often it was read.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Host(Placement):
    name = "host"
    paper = "https://arxiv.org/abs/2402.04617"
