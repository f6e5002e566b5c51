"""A small random model that hears, as ``random_llama``'s."""

from __future__ import annotations

from pathlib import Path

from kvplug_evals.models.folder import new_folder, write_json, write_word_tokenizer
from kvplug_evals.models.random_llama import randomize, shape_of

SPECIAL = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
VOCAB = 512
AUDIO = VOCAB - len(SPECIAL)
"""The token in whose place an audio's embeddings come; words are the tokens below it."""
RATE = 16_000
"""Samples of a second, which has 25 embeddings."""
PUBLISHED = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.": "",
}
"""How the names of weights begin in transformers, and in the model's files, which vLLM reads;
what transformers 5.19 itself saves has one ``model.`` too many."""


def build_random_qwen2_audio(folder: Path, *, seed: int = 0) -> None:
    """Qwen2-Audio: a Qwen 2 of which some embeddings are a Whisper-like encoder's."""
    from safetensors.torch import save_file
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    shape = shape_of(heads=4, kv_heads=2, head_dim=64, layers=2, vocab=VOCAB, max_positions=8192)
    encoder = Qwen2AudioEncoderConfig(
        num_mel_bins=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        d_model=64,
    )
    config = Qwen2AudioConfig(
        audio_config=encoder,
        text_config=Qwen2Config(**shape, tie_word_embeddings=False),
        audio_token_index=AUDIO,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    randomize(model, embedding=1.0, seed=seed)
    with new_folder(folder) as draft:
        config.architectures = [type(model).__name__]
        config.save_pretrained(draft)
        weights = {_published(name): weight for name, weight in model.state_dict().items()}
        save_file(weights, draft / "model.safetensors", {"format": "pt"})
        WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE).save_pretrained(draft)
        write_word_tokenizer(draft, [*(f"t{token}" for token in range(AUDIO)), *SPECIAL], SPECIAL)
        write_json(draft / "processor_config.json", {"processor_class": "Qwen2AudioProcessor"})


def _published(name: str) -> str:
    ours = next(each for each in PUBLISHED if name.startswith(each))
    return PUBLISHED[ours] + name.removeprefix(ours)
