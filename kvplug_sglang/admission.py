"""What SGLang charges a request with before it runs: what it will hold, and no more.

SGLang counts prompt and longest answer as if both were held at once, of requests that run as of
those that wait. A policy that bounds what a request holds bounds the answer's part of that.
"""

from __future__ import annotations

from typing import Any

from kvplug_sglang import compat
from kvplug_sglang.compat import Hook
from kvplug_sglang.packing import course_of, evicts_by_position, planner_of, private_tokens
from kvplug_sglang.settings import Engine


def answer_slots(req: Any) -> int:
    """Slots that the rest of the answer takes at most, beside what the request holds by then and
    its private ones."""
    answer = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
    now = len(req.origin_input_ids) + len(req.output_ids)
    tenant, planner = Engine.serving().router.tenants.get(req.rid), planner_of(req)
    size = planner.page_size
    if tenant.evicts if tenant is not None else evicts_by_position(req):
        assert planner.eviction is not None
        spans = sum(last - first for first, last in planner.settings.protect)
        most = planner.eviction.most_tokens() + spans
        return min(answer, max(most - now, 0) + 2 * size)
    course = tenant.course if tenant is not None else course_of(req)
    if course is not None and course.every:
        # Until its first event, and then as much as comes between two, in pages.
        return min(answer, max(course.begin - now, 0) + (course.every + 1) * size)
    return answer


def reserve(original: Any, self: Any, req: Any, **kwargs: Any) -> int:
    """Around the prefill's admission charge: the private slots, until the request has them, less
    what an answer is charged and will not take. kwargs: the tokens that a step computes of the
    prompt; without, the charge is for whether the request fits at all.

    Prompt, answer and private slots together may be more than the pool, so that a request would
    wait for ever that holds less, once it is packed: it is charged no more than the pool.
    """
    charge: int = original(self, req, **kwargs)
    extend = len(req.full_untruncated_fill_ids) - req.prefix_len
    charged = compat.charged_answer(self, req, **kwargs)
    charge -= max(charged - answer_slots(req), 0)
    if req.rid in Engine.serving().router.tenants:
        return charge
    private = private_tokens(req)
    if private and not kwargs:
        answer = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        whole = extend + answer + self.per_req_token_overhead + charge
        private = min(private, max(self.token_to_kv_pool_allocator.size - 1 - whole, 0))
    return charge + private


def running(original: Any, self: Any, req: Any) -> float:
    """Around what a request that runs is charged for the rest of its answer."""
    charge: float = original(self, req)
    return min(charge, answer_slots(req))


ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
HOOKS = (
    Hook(f"{ADDER}._request_slot_reserve_for_req", "around", reserve, ("self", "req")),
    Hook(f"{ADDER}._get_running_request_total_token_offset", "around", running, ("self", "req")),
)
