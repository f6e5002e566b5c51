"""MODEL JOBS RANKS OUT: the answers of each server by an engine of so many tensor-parallel ranks.

A process of its own with the scheduler in it; each rank is a process too where there are two.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    model, jobs, ranks, out = sys.argv[1:]
    asked = json.loads(Path(jobs).read_text())
    answers = []
    for server in asked["servers"]:
        llm = LLM(
            model,
            attention_backend="kvplug",
            additional_config={"kvplug": server["kvplug"]},
            tensor_parallel_size=int(ranks),
            distributed_executor_backend="mp" if int(ranks) > 1 else "uni",
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=2048,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=128 << 20,
            skip_tokenizer_init=True,
        )
        requests = [(prompt, line) for line in server["asks"] for prompt in asked["prompts"]]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=asked["tokens"],
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=None if line is None else {"kvplug": line},
                )
                for _, line in requests
            ],
            use_tqdm=False,
        )
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    main()
