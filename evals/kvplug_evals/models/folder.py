"""A model folder: written whole or not at all, and what one says of its cache."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AUTO = "auto"
BUILD_MODELS = "run make models (outside a checkout: python -m kvplug_evals.models)"
DTYPES = (AUTO, "float32", "bfloat16", "float16")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when the block ends without error.

    A reader, or another process building the same model, never sees a half-written one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        draft = Path(temporary) / "new"
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        draft.rename(folder)


def write_json(file: Path, data: dict[str, object]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")


def write_word_tokenizer(folder: Path, words: Sequence[str], special: Sequence[str] = ()) -> None:
    """A tokenizer for which token i is words[i]; texts are words between spaces, and beside any
    text those of the words that are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False},
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ValueError that says how to get a model."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(
            f"there is no model in {folder}; {BUILD_MODELS}, or give --model a folder"
        )
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def served_dtype(folder: Path, asked: str = AUTO) -> str:
    """What a model is served in; ``auto`` is its weights' own, bfloat16 for those of float32.

    vLLM decides so by itself; SGLang would take float16 for these. Raises ValueError.
    """
    if asked not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {asked!r}")
    if asked != AUTO:
        return asked
    config = read_config(folder)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return "bfloat16" if stored == "float32" else stored


def token_bytes(folder: Path, dtype: str) -> int:
    """KV bytes of a token over all layers, served in dtype. Raises ValueError."""
    config = read_config(folder)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    size = 4 if dtype == "float32" else 2
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * size)
