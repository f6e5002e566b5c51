"""The router tells requests apart by what vLLM's Model Runner V1 shows its logits processors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from kvplug import parse
from kvplug_vllm.admission import Judging
from kvplug_vllm.router import UNKNOWN, Router

OFFER = {"policy": "snapkv(budget=128)", "allow": ["quest"]}


def router(rows=4):
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="KVPLUG")),
        scheduler_config=SimpleNamespace(max_num_seqs=rows),
        additional_config={"kvplug": OFFER},
    )
    return config, Router(config, None, False)


def update(router, added=(), removed=(), moved=()):
    router.update_state(BatchUpdate(batch_size=4, removed=removed, added=added, moved=moved))


def rows(n):
    return SimpleNamespace(num_reqs=n, req_idx=None)


def test_rows_follow_requests_that_move_swap_and_leave():
    config, router_ = router()
    answers = [[], [], []]
    update(router_, [(i, asks(None), [0] * (10 + i), answers[i]) for i in range(3)])
    assert Router.prompts(config, rows(4)).tolist() == [10, 11, 12, UNKNOWN]
    stays = Router.stays_of(config, rows(3)).tolist()
    assert len(set(stays)) == 3
    update(router_, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert Router.prompts(config, rows(3)).tolist() == [12, 11, UNKNOWN]
    update(router_, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert Router.prompts(config, rows(2)).tolist() == [11, 12]
    assert Router.stays_of(config, rows(2)).tolist() == stays[1:]


def asks(what):
    return SimpleNamespace(max_tokens=8, extra_args=None if what is None else {"kvplug": what})


def test_choices_follow_their_requests_and_the_rest_have_the_servers_own():
    config, router_ = router()
    asked = ["quest(budget=64)", None, "dense"]
    update(router_, [(i, asks(what), [0], [i]) for i, what in enumerate(asked)])

    def policies(n):
        settings, choice = Router.chosen(config, rows(n))
        return [settings[one].policy.policies for one in choice.tolist()]

    quest, own, dense = (parse(what or OFFER["policy"]).policies for what in asked)
    assert policies(4) == [quest, own, dense, own]
    update(router_, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert policies(3) == [own, quest, dense]
    update(router_, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert policies(3) == [dense, quest, own]
    update(router_, [(3, asks(asked[0]), [0], [9])])
    assert len(Router.chosen(config, rows(4))[0]) == 3, "equal settings are one choice"


def test_clients_may_send_any_number_of_policies():
    config, router_ = router()
    for budget in range(1, 500):
        update(router_, [(budget % 4, asks(f"quest(budget={budget})"), [0], [])])
        settings, choice = Router.chosen(config, rows(min(budget + 1, 4)))
        newest = settings[choice[budget % 4]].policy.selector
        assert newest is not None
        assert newest.budget == budget
    assert len(settings) <= 64


def test_a_server_without_kvplug_does_not_ignore_a_request_for_it(monkeypatch):
    monkeypatch.setattr(Judging, "begun", False)
    Router.validate_params(asks(None))
    with pytest.raises(ValueError, match="start it with --attention-backend kvplug"):
        Router.validate_params(asks("dense"))


def test_model_runner_v2_names_slots():
    config, _ = router()
    slots = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5, 6, 7, 8])))
    second = Router(config, slots)
    assert second.add_request(2, asks("dense")) is False, "no logit of the request is ours"
    second.add_request(0, asks(None))
    common = SimpleNamespace(num_reqs=2, req_idx=np.array([2, 0]))
    settings, choice = Router.chosen(config, common)
    assert [settings[one].policy.is_dense for one in choice.tolist()] == [True, False]
    assert Router.prompts(config, common).tolist() == [7, 5]


def test_a_request_that_waits_a_few_steps_is_the_same_when_it_returns():
    config, router_ = router()
    answer = []
    update(router_, [(0, asks(None), [1, 2, 3], answer)])
    before = Router.stays_of(config, rows(1))
    update(router_, removed=[0])
    for other in range(100):  # others come and go, and the memory of them is bounded
        update(router_, [(1, asks(None), [1], [other])])
        if other % 3 == 0:
            update(router_, [(0, asks(None), [1, 2, 3], answer)])
            assert (Router.stays_of(config, rows(1)) == before).all()
    assert len(router_._known) <= 16
    update(router_, [(0, asks(None), [1, 2, 3], [])])
    assert not np.array_equal(Router.stays_of(config, rows(1)), before)
