"""Mamba-2's kernels as SGLang calls them, in PyTorch: its CPU engine has none.

``MambaMixer2`` binds the names of its convolution on CUDA, NPUs and XPUs alone, and its scans are
Triton, as are the norm of gated delta nets and the gate of experts beside them. The layers, their
states' pool and the tree over it are SGLang's own. ``test_hybrids`` holds what a server answers
over these to transformers' models.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from sgl_kernel.mamba import causal_conv1d_fn_cpu, causal_conv1d_update_cpu
from torch import Tensor
from torch.nn import functional


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """state [..., H, P, N], x [..., H, P], dt [..., H] behind its softplus, A, D [H], B, C
    [..., G, N] -> the next state, and y [..., H, P]"""
    groups = state.shape[-3] // B.shape[-2]
    B, C = (each.repeat_interleave(groups, -2)[..., None, :] for each in (B, C))
    decay = torch.exp(dt * A)[..., None, None]
    state = state * decay + (dt[..., None] * x)[..., None] * B
    return state, (state * C).sum(-1) + D[:, None] * x


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, dt_bias: Tensor,
    dt_softplus: bool, cu_seqlens: Tensor, initial_states: Tensor | None, out: Tensor,
    state_dtype: torch.dtype, chunk_size: int, track_seq_idx: Tensor | None,
    track_end_locs: Tensor | None, **_: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x, out [1, T, H, P] of sequences side by side -> states before each chunk of the T tokens,
    the sequences' last ones, and those before ``track_end_locs``"""
    assert dt_softplus
    tokens, shape = x.shape[1], (*x.shape[2:], B.shape[3])
    rate, ends = functional.softplus(dt[0] + dt_bias), []
    before = x.new_zeros(tokens + 1, *shape)
    for which, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = x.new_zeros(shape) if initial_states is None else initial_states[which]
        for t in range(begin, end):
            before[t] = state
            state, out[0, t] = step(state, x[0, t], rate[t], A, B[0, t], C[0, t], D)
        ends.append(state)
    before[tokens] = state
    tracked = None if track_seq_idx is None else before[track_end_locs.long()][None]
    return before[None, ::chunk_size], torch.stack(ends).to(state_dtype), tracked


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
    z: None, dt_bias: Tensor, dt_softplus: bool, state_batch_indices: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """state [slots, H, P, N], x, dt, out [B, H, P], a token of each; A, D, dt_bias by channel,
    alike within a head."""
    assert dt_softplus
    assert z is None
    slots = state_batch_indices.long()
    rate = functional.softplus(dt[..., 0] + dt_bias[:, 0])
    state[slots], found = step(state[slots], x, rate, A[:, 0, 0], B, C, D[:, 0])
    out.copy_(found)


def track_mamba_states_if_needed(
    conv_states: Tensor, ssm_states: Tensor, cache_indices: Tensor, mamba_track_mask: Tensor,
    mamba_track_indices: Tensor, batch_size: int, check_freed_slots: bool = False,
) -> None:  # fmt: skip
    """Copy the states of the requests that the mask names."""
    source, target = cache_indices[mamba_track_mask].long(), mamba_track_indices[mamba_track_mask]
    for states in (conv_states, ssm_states):
        states[target] = states[source]


def rms_norm_gated(
    x: Tensor, g: Tensor, weight: Tensor, bias: None, activation: str, *, eps: float, **_: Any
) -> Tensor:
    """x, g [N, V] -> [N, V]"""
    assert activation in ("silu", "swish")
    normed = functional.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return (normed * functional.silu(g.float())).to(x.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """Of experts that are shared: in place, all but the gate [C] by token [T, C]."""
    gate = (hidden_states @ gate_weight).sigmoid()
    final_hidden_states += gate[:, None] * shared_output


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a scheduler is started."""
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.layers.attention.mamba import mamba
    from sglang.srt.models import qwen2_moe

    for name in ("", "_triton"):
        monkeypatch.setattr(mamba, f"causal_conv1d_fn{name}", causal_conv1d_fn_cpu, False)
        monkeypatch.setattr(mamba, f"causal_conv1d_update{name}", causal_conv1d_update_cpu, False)
    monkeypatch.setattr(mamba, "mamba_chunk_scan_combined", mamba_chunk_scan_combined)
    monkeypatch.setattr(mamba, "selective_state_update", selective_state_update)
    monkeypatch.setattr(fused_norm_gate, "rms_norm_gated", rms_norm_gated)
    monkeypatch.setattr(
        hybrid_linear_attn_backend, "track_mamba_states_if_needed", track_mamba_states_if_needed
    )
    monkeypatch.setattr(qwen2_moe, "fused_gate_sigmoid_mul_add", fused_gate_sigmoid_mul_add)
