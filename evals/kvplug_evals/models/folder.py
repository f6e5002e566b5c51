"""A model folder: written whole or not at all, with a tokenizer of one word per token."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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


def write_word_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A tokenizer for which token i is words[i]; texts are words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False},
    )
