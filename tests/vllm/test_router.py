"""The router tells requests apart by what vLLM's Model Runner V1 shows its logits processors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from kvplug_vllm.router import UNKNOWN, Router


def router(rows=4):
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="KVPLUG")),
        scheduler_config=SimpleNamespace(max_num_seqs=rows),
    )
    return config, Router(config, None, False)


def update(router, added=(), removed=(), moved=()):
    router.update_state(BatchUpdate(batch_size=4, removed=removed, added=added, moved=moved))


def rows(n):
    return SimpleNamespace(num_reqs=n, req_idx=None)


def test_rows_follow_requests_that_move_swap_and_leave():
    config, router_ = router()
    answers = [[], [], []]
    update(router_, [(i, None, [0] * (10 + i), answers[i]) for i in range(3)])
    assert Router.prompts(config, rows(4)).tolist() == [10, 11, 12, UNKNOWN]
    stays = Router.stays_of(config, rows(3)).tolist()
    assert len(set(stays)) == 3
    update(router_, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert Router.prompts(config, rows(3)).tolist() == [12, 11, UNKNOWN]
    update(router_, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert Router.prompts(config, rows(2)).tolist() == [11, 12]
    assert Router.stays_of(config, rows(2)).tolist() == stays[1:]


def test_a_request_that_waits_a_few_steps_is_the_same_when_it_returns():
    config, router_ = router()
    answer = []
    update(router_, [(0, None, [1, 2, 3], answer)])
    before = Router.stays_of(config, rows(1))
    update(router_, removed=[0])
    for other in range(100):  # others come and go, and the memory of them is bounded
        update(router_, [(1, None, [1], [other])])
        if other % 3 == 0:
            update(router_, [(0, None, [1, 2, 3], answer)])
            assert (Router.stays_of(config, rows(1)) == before).all()
    assert len(router_._known) <= 16
    update(router_, [(0, None, [1, 2, 3], [])])
    assert not np.array_equal(Router.stays_of(config, rows(1)), before)
