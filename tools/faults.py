"""Faults put in on purpose, one at a time, each with the test that must notice it.

    python3 tools/faults.py              # all of them: some twenty minutes on two idle cores
    python3 tools/faults.py protect      # those whose name holds this

For tests what tests are for code: run it by hand when either has changed a lot. Every hand-over
from an adapter to the core and every boundary in the core is here once. A fault is a text that
stands for another in a copy of this tree; the test must pass without it and fail with it. Needs
the environments that `make setup setup-sglang` builds, and only the standard library itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PLAN = "tests/core/test_plan.py::"
SCHEDULE = "tests/core/test_schedule.py::"
MIN_CONTEXT = f"{PLAN}test_a_request_of_exactly_min_context_tokens_is_served_dense"
BOUNDARIES = "tests/core/test_boundaries.py::"
PROMISED = "tests/core/test_eviction.py::test_kept_tokens_are_what_was_promised"
BLOCKS = "tests/core/test_block_selection.py::"
MEMORY = "tests/sglang/test_graph_memory.py::"
VLLM, SGLANG = "tests/vllm/test_handover.py::", "tests/sglang/test_handover.py::"
HANDED = "test_what_the_core_is_handed[check_{}]"
PASSED, FAILED = 0, 1
"""Of pytest: other numbers say that no test ran."""


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    right: str
    """Stands in the file once."""
    wrong: str
    test: str


FAULTS = (
    Fault(
        "core: selection at min_context",
        "kvplug/plan.py",
        "short = segments.stop <= self.settings.min_context",
        "short = segments.stop < self.settings.min_context",
        MIN_CONTEXT,
    ),
    Fault(
        "core: shortcut at min_context",
        "kvplug/plan.py",
        "selects & (position >= self.settings.min_context)",
        "selects & (position > self.settings.min_context)",
        MIN_CONTEXT,
    ),
    Fault(
        "core: packing at min_context",
        "kvplug/schedule.py",
        "long = (whole > self._short) & (prompt > self.settings.min_context)",
        "long = (whole > self._short) & (prompt >= self.settings.min_context)",
        MIN_CONTEXT,
    ),
    Fault(
        "core: window at min_context",
        "kvplug/plan.py",
        "positions < self.settings.min_context",
        "positions <= self.settings.min_context",
        f"{BOUNDARIES}test_a_request_of_exactly_min_context_tokens_sees_past_its_window",
    ),
    Fault(
        "core: packing at the budget",
        "kvplug/schedule.py",
        "(whole > self._short)",
        "(whole >= self._short)",
        f"{PLAN}test_a_prompt_is_packed_from_the_first_page_beyond_its_budget_on",
    ),
    Fault(
        "core: selection at the budget",
        "kvplug/plan.py",
        "(-(-visible // self.unit) > self.reads(visible))",
        "(-(-visible // self.unit) >= self.reads(visible))",
        f"{PLAN}test_every_query_sees_what_the_definition_says",
    ),
    Fault(
        "core: packing at a prompt's end",
        "kvplug/schedule.py",
        "self.era(total - 1, begin) + 1 - first",
        "self.era(total, begin) + 1 - first",
        f"{BOUNDARIES}test_a_prompt_of_100_tokens_is_packed_by_the_step_that_computes_the_one_behind",
    ),
    Fault(
        "core: window queries at a prompt's end",
        "kvplug/batch.py",
        "end = np.minimum(total[row], at)",
        "end = np.minimum(total[row], at - 1)",
        f"{PLAN}test_a_step_keeps_the_window_queries_that_scores_will_ask_for",
    ),
    Fault(
        "core: first token of the window",
        "kvplug/eviction.py",
        "recent = position >= lengths - policy.window",
        "recent = position > lengths - policy.window",
        PROMISED,
    ),
    Fault(
        "core: last protected token",
        "kvplug/eviction.py",
        "(position < last)",
        "(position < last - 1)",
        PROMISED,
    ),
    Fault(
        "core: last sink",
        "kvplug/eviction.py",
        "position < policy.sinks",
        "position < policy.sinks - 1",
        PROMISED,
    ),
    Fault(
        "core: a chunk that ends with a step",
        "kvplug/schedule.py",
        "total + self.appends",
        "total",
        f"{SCHEDULE}test_chunks_that_are_packed_where_they_lie_are_read_as_they_were_left",
    ),
    Fault(
        "core: sinks of the first chunk alone",
        "kvplug/schedule.py",
        "self.scored.without_sinks() if",
        "self.scored if",
        f"{SCHEDULE}test_protected_tokens_of_a_chunk_stay_with_it",
    ),
    Fault(
        "core: a prompt's last queries",
        "kvplug/plan.py",
        "end = prompt - self.generate.last",
        "end = prompt",
        "tests/core/test_prefill.py::test_a_prompt_s_query_sees_its_sinks_and_its_window",
    ),
    Fault(
        "core: a window behind what was packed",
        "kvplug/plan.py",
        "holds = (packed == HELD) & (not self.chunk)",
        "holds = packed > -9",
        "tests/core/test_prefill.py::test_a_window_takes_nothing_from_what_was_packed",
    ),
    Fault(
        "core: a budget of exactly max_budget",
        "kvplug/offer.py",
        "scored.budget > self.max_tokens",
        "scored.budget >= self.max_tokens",
        f"{BOUNDARIES}test_a_request_may_keep_exactly_max_budget",
    ),
    Fault(
        "vllm: protect, to the score",
        "kvplug_vllm/attention.py",
        "packing.width, event.protect)",
        "packing.width, ())",
        VLLM + HANDED.format("protect"),
    ),
    Fault(
        "vllm: protect, to the scheduler",
        "kvplug_vllm/settings.py",
        "protect=own.protect",
        "protect=()",
        f"{VLLM}test_the_scheduler_serves_the_offer_of_the_workers",
    ),
    Fault(
        "vllm: min_context, to the scheduler",
        "kvplug_vllm/settings.py",
        "min_context=own.min_context",
        "min_context=0",
        f"{VLLM}test_the_scheduler_serves_the_offer_of_the_workers",
    ),
    Fault(
        "vllm: scale, to the score",
        "kvplug_vllm/attention.py",
        "scale=self.logit_scale(layer),\n            first_head",
        "scale=1.0,\n            first_head",
        VLLM + HANDED.format("scale"),
    ),
    Fault(
        "vllm: scale, to the selection",
        "kvplug_vllm/attention.py",
        "page_size=step.page, width=step.width, scale=scale,",
        "page_size=step.page, width=step.width, scale=1.0,",
        VLLM + HANDED.format("scale"),
    ),
    Fault(
        "vllm: first_head",
        "kvplug_vllm/attention.py",
        "first_head=compat.first_kv_head(layer.layer_name, self.num_kv_heads)",
        "first_head=0",
        VLLM + HANDED.format("min_context"),
    ),
    Fault(
        "vllm: first_head, to the selection",
        "kvplug_vllm/attention.py",
        "step=every, first_head=first,",
        "step=every, first_head=0,",
        "tests/vllm/test_prefill.py::test_each_head_reads_by_its_own_pattern",
    ),
    Fault(
        "vllm: digests of packed pages, on a GPU",
        "kvplug_vllm/attention.py",
        "self._take_in(layer, kv_cache, kept, packing.slots)",
        "pass",
        f"{VLLM}test_pages_that_are_packed_in_place_say_what_they_hold",
    ),
    Fault(
        "vllm: digests of packed pages, on a CPU",
        "kvplug_vllm/cpu.py",
        "self.do_kv_cache_update(layer, keys",
        "self.stock.do_kv_cache_update(self, layer, keys",
        VLLM + HANDED.format("digests"),
    ),
    Fault(
        "vllm: names of packed blocks",
        "kvplug_vllm/appending.py",
        "first, end = chunk * self.planner.chunk, (chunk + 1) * self.planner.chunk",
        "first, end = chunk * self.planner.chunk, chunk * self.planner.chunk + 1",
        "tests/vllm/test_chunks.py::test_what_was_packed_is_found_by_who_comes_with_its_prefix",
    ),
    Fault(
        "sglang: what the tree takes of a prompt that streams in",
        "kvplug_sglang/packing.py",
        "min(up_to, tenant.prompt, tenant.course.begin)",
        "min(up_to, tenant.prompt)",
        "tests/sglang/test_chunks.py::"
        "test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions",
    ),
    Fault(
        "sglang: protect",
        "kvplug_sglang/step.py",
        "protect=event.protect",
        "protect=()",
        SGLANG + HANDED.format("protect"),
    ),
    Fault(
        "sglang: scale, to the score",
        "kvplug_sglang/attention.py",
        "scale=compat.logit_scale(layer),\n            first_head",
        "scale=1.0,\n            first_head",
        SGLANG + HANDED.format("scale"),
    ),
    Fault(
        "sglang: scale, to the selection",
        "kvplug_sglang/attention.py",
        "scale=compat.logit_scale(layer),\n        )  # fmt: skip\n        if step",
        "scale=1.0,\n        )  # fmt: skip\n        if step",
        SGLANG + HANDED.format("scale"),
    ),
    Fault(
        "sglang: first_head",
        "kvplug_sglang/attention.py",
        "first_head=compat.first_kv_head(layer)",
        "first_head=0",
        SGLANG + HANDED.format("min_context"),
    ),
    Fault(
        "sglang: first_head, to the selection",
        "kvplug_sglang/attention.py",
        "step=every, first_head=first,",
        "step=every, first_head=0,",
        "tests/sglang/test_prefill.py::test_each_head_reads_by_its_own_pattern",
    ),
    Fault(
        "sglang: packing at a prompt's end",
        "kvplug_sglang/step.py",
        "return not event.era and event.tokens == prompt[event.row]",
        "return False",
        SGLANG + HANDED.format("min_context"),
    ),
    Fault(
        "sglang: digests of packed pages",
        "kvplug_sglang/attention.py",
        "self._written(layer, packing.targets)",
        "pass",
        SGLANG + HANDED.format("digests"),
    ),
    Fault(
        "sglang: a buffer kept for each shape",
        "kvplug_sglang/step.py",
        "return torch.from_numpy(values).to(self.req_to_token.device, dtype, non_blocking=True)",
        "made = torch.from_numpy(values).to(dtype)\n"
        "        vars(self).setdefault('kept', {})[values.shape, dtype] = made\n"
        "        return made",
        "tests/sglang/test_steps.py::test_steps_of_changing_shapes_leave_no_buffer_behind",
    ),
    Fault(
        "sglang: what packing takes, to the memory",
        "kvplug_sglang/graph_memory.py",
        "held + max(packing, choosing)",
        "held + choosing",
        f"{MEMORY}test_sglang_leaves_room_for_them_and_for_packing",
    ),
    Fault(
        "sglang: the longest prompt, to the memory",
        "kvplug_sglang/compression.py",
        "policy, longest = offer.settings.policy, model.context_len",
        "policy, longest = offer.settings.policy, model.context_len // 2",
        f"{MEMORY}test_packing_takes_what_sglang_was_told_whoever_ends_together",
    ),
    Fault(
        "core: who is asked behind a prompt's last block",
        "kvplug/selection.py",
        "end = segments.token[last] + segments.queries[last] + behind",
        "end = segments.token[last] + segments.queries[last]",
        f"{BLOCKS}test_who_is_asked_are_the_last_queries_of_each_prompt",
    ),
    Fault(
        "core: pages that a prompt's end made shared",
        "kvplug/generate.py",
        "return Sharing.NOBODY if self.asks else super().publishes",
        "return super().publishes",
        "tests/vllm/test_prefill.py::test_what_was_read_for_a_prompt_s_end_is_nobody_else_s",
    ),
    Fault(
        "sglang: pages of prompts that were read otherwise",
        "kvplug_sglang/packing.py",
        "self.cache_salt = engine.offer.salt(self.kvplug_settings, self.cache_salt)",
        "pass",
        "tests/sglang/test_prefill.py::"
        "test_requests_share_pages_with_those_that_read_a_prompt_as_they_do",
    ),
)


class Tree:
    """A copy of the project, as it stands here, to put faults in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (PROJECT / name).is_file() and not name.startswith("evals/results/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, folder / name)
        for built in (".models", ".cache"):
            (folder / built).symlink_to(PROJECT / built)

    def run(self, tests: Sequence[str]) -> tuple[int, str]:
        """Tests of one environment -> pytest's number and its last words."""
        engine = "sglang" if tests[0].startswith("tests/sglang/") else "vllm"
        roots = os.pathsep.join(str(self.folder / root) for root in (".", "kernels", "evals"))
        command = [str(PROJECT / f".venvs/{engine}/bin/python"), "-m", "pytest", "-q", "-x"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *tests],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        return done.returncode, (done.stdout + done.stderr)[-2000:]

    def noticed(self, fault: Fault) -> str:
        """Nothing where the test fails with the fault in; else what is wrong with either."""
        file = self.folder / fault.file
        text = file.read_text()
        if text.count(fault.right) != 1:
            return f"{fault.right!r} stands {text.count(fault.right)} times in {fault.file}"
        file.write_text(text.replace(fault.right, fault.wrong))
        try:
            number, said = self.run([fault.test])
        finally:
            file.write_text(text)
        if number == FAILED:
            return ""
        return "NOT NOTICED" if number == PASSED else f"the test did not run:\n{said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of the names of faults; all if none")
    words = parser.parse_args().words
    chosen = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    if not chosen:
        print("no fault's name holds that; there are\n" + "\n".join(f.name for f in FAULTS))
        return 2
    with tempfile.TemporaryDirectory(prefix="kvplug-faults-") as folder:
        tree = Tree(Path(folder))
        tests = sorted({fault.test for fault in chosen})
        for there in ("tests/sglang/", ""):
            mine = [t for t in tests if t.startswith("tests/sglang/") == bool(there)]
            number, said = tree.run(mine) if mine else (PASSED, "")
            if number != PASSED:
                print(f"the tests fail without any fault:\n{said}")
                return 2
        missed = 0
        for fault in chosen:
            wrong = tree.noticed(fault)
            missed += bool(wrong)
            print(f"{fault.name}: {wrong or 'noticed'} ({fault.test})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
