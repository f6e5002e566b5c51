"""What quest reads, made again by its definition: query by query, head by head, in plain torch."""

from __future__ import annotations

import pytest
import torch

from kvplug_kernels.fp8 import FP8
from kvplug_sglang import compat


class Reads:
    """Checks every selection of a decoding query as it is made.

    Bounds come from the keys that stand in the pool, not from digests; where the model has
    attention sinks, each query head's is a logit beside those of what it reads. Over a cache of
    fp8 attention is that of queries of fp8 too, and as exact as bfloat16.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvplug_sglang.attention import PlannedAttention

        self.checked = 0
        self.spared = 0
        """Pages that were not read."""
        selected = PlannedAttention._selected

        def shadow(backend, layer, query, step, budget, output, sinks):
            selected(backend, layer, query, step, budget, output, sinks)
            rows = range(len(query)) if step.tokens is None else step.tokens.tolist()
            for number, row in enumerate(rows):
                found = self.read(backend, layer, query[row], step, number, budget, sinks)
                few = backend.token_to_kv_pool.dtype in FP8
                rtol, atol = (5e-3, 1e-4) if few else (1e-4, 1e-5)
                torch.testing.assert_close(output[row], found, rtol=rtol, atol=atol)
                self.checked += 1

        monkeypatch.setattr(PlannedAttention, "_selected", shadow)

    def read(self, backend, layer, query, step, number, budget, sinks):
        """query [Hq, D] -> [Hq, D]"""
        size, length = backend.engine.page_size, int(step.lengths[number])
        table = step.page_table[number].long()
        slots = (table[:, None] * size + torch.arange(size)).flatten()[:length]
        pool = backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        keys, values = (each[slots].float() for each in pool)
        asked = query.to(pool[0].dtype).float()
        key_scale, value_scale = compat.cache_scales(layer)
        group = len(query) // keys.shape[1]
        pages = -(-length // size)
        keep = min(-(-budget // size), pages)
        found = torch.empty(len(query), values.shape[2])
        for head in range(keys.shape[1]):
            mine = query[head * group :][:group]
            bounds = [
                max(
                    float(torch.maximum(one * page.amin(0), one * page.amax(0)).sum())
                    for one in mine
                )
                for page in keys[: (pages - 1) * size, head].split(size)
            ]
            best = sorted(range(pages - 1), key=lambda page: -bounds[page])[: keep - 1]
            self.spared += pages - keep
            tokens = torch.cat(
                [torch.arange(page * size, min(page * size + size, length))
                 for page in sorted([*best, pages - 1])]
            )  # fmt: skip
            attends = asked[head * group :][:group]
            logits = attends @ keys[tokens, head].T * layer.scaling * key_scale
            if sinks is not None:
                own = sinks[head * group :][:group].float()
                logits = torch.cat([logits, own[:, None]], 1)
            weights = logits.softmax(1)[:, : len(tokens)]
            found[head * group :][:group] = weights @ values[tokens, head] * value_scale
        return found
