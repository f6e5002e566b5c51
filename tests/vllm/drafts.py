"""Drafters: one that knows the answers, so that how many of its drafts are right is the test's to
say, and two with layers of their own that are right and wrong as it happens."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import twin

K = 3
"""Drafts of a step."""
SPECULATIVE = {
    "method": "ngram",
    "num_speculative_tokens": K,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


class Oracle:
    """In place of n-grams. Of the tokens that follow it drafts some right and one wrong, or none.

    right: tokens of the answer so far -> how many, so that steps accept 0 to K of them.
    """

    def __init__(self, right: Callable[[int], int] = lambda n: n * 3 % (K + 2) - 1) -> None:
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.right = right

    def knows(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self.answers.update(zip(map(tuple, prompts), answers, strict=True))

    def drafts(self, tokens: list[int]) -> list[int]:
        for prompt, answer in self.answers.items():
            done = len(tokens) - len(prompt)
            if 0 < done < len(answer) and tuple(tokens) == prompt + tuple(answer[:done]):
                right = self.right(done)
                if right < 0:
                    return []
                ahead = answer[done : done + K]
                return ahead[:right] + [(token + 1) % 512 for token in ahead[right : right + 1]]
        return []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the model runner of this process."""

        def propose(
            proposer: Any, count: int, sampled: Any, lengths: Any, tokens: Any, **_: Any
        ) -> list[list[int]]:
            return [
                self.drafts(tokens[row, : lengths[row]].tolist()) if new else []
                for row, new in enumerate(sampled)
            ]

        def propose_all(
            speculator: Any, input_batch: Any, *_: Any, dummy_run: bool = False, **__: Any
        ) -> torch.Tensor:
            """V2 drafts K for each row, right or wrong."""
            states, slots = speculator.req_states, input_batch.idx_mapping_np.tolist()
            for row, slot in enumerate([] if dummy_run else slots):
                length = int(states.total_len.gpu[slot])
                drafts = self.drafts(states.all_token_ids.gpu[slot, :length].tolist())
                padded = torch.tensor([*drafts, *[511] * K][:K])
                speculator.drafts[row] = padded
            return speculator.drafts[: input_batch.num_reqs]

        if twin.MODE:
            from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

            monkeypatch.setattr(NgramGPUSpeculator, "propose", propose_all)
        else:
            # Its module compiles with Numba, beside which vLLM 0.32 starts no engine in a process
            # (_rebind_kernels asks llvmlite's functions for attributes).
            proposer = type("NgramProposer", (), {"__init__": lambda *_: None})
            proposer.propose = propose
            proposer.load_model = lambda *_: None
            module = ModuleType("vllm.v1.spec_decode.ngram_proposer")
            module.NgramProposer = proposer
            monkeypatch.setitem(sys.modules, module.__name__, module)


def build_draft_model(model: Path, folder: Path) -> None:
    """The model itself, but for a little noise."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    random = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.03 * weight.std() * torch.randn(weight.shape, generator=random)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def build_eagle_head(model: Path, folder: Path) -> None:
    """A Llama's own layers as an EAGLE head, which sees each token but the first: its projection
    takes the token and leaves the model's hidden state out. The first layer has no norm, which
    random embeddings hardly need."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    own = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name.startswith("model.layers.") and "layers.0.input_layernorm" not in name
    }
    size = weights["model.embed_tokens.weight"].shape[1]
    own["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    save_file(own, folder / "model.safetensors", {"format": "pt"})


BUILD = {"draft_model": build_draft_model, "eagle": build_eagle_head}


def speculative(method: str, model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """What ``--speculative-config`` says. folder: of a drafter with layers, built there once."""
    if method == "ngram":
        return SPECULATIVE
    if not folder.exists():
        BUILD[method](model, folder)
    return {"method": method, "model": str(folder), "num_speculative_tokens": K, **more}


def verified(engine: Any) -> tuple[int, int]:
    """Drafts that the engine accepted and rejected so far."""
    name = "vllm:spec_decode_num_{}_tokens"
    found = {metric.name: metric for metric in engine.llm.get_metrics()}
    accepted = found[name.format("accepted")].value
    return accepted, found[name.format("draft")].value - accepted
