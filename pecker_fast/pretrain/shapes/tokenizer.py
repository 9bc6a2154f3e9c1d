"""A CLIP tokenizer made for the captions: their words are single tokens, any other text falls into bytes."""

from __future__ import annotations

import json
import re
from typing import Any

from pecker_fast.shapes import ATTRIBUTES, TEMPLATES

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    text = re.sub(r"\{\w+\}", " ", " ".join(TEMPLATES))
    return sorted({*re.findall(r"[a-z]+", text), *(word for words in ATTRIBUTES.values() for word in words)})


def build_tokenizer(words: list[str], length: int) -> Any:
    """A transformers CLIPTokenizer for prompts of `length` tokens, both ends included.

    Byte-level pair encoding: 256 bytes, inside and at the end of a word, and as many merges as make each of `words` one
    token. Padding is the end token, as CLIP has it.
    """
    import tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe: Any = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(end_of_word_suffix=END_OF_WORD, show_progress=False)
    bpe.train_from_iterator(sorted(words), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{byte}{END_OF_WORD}" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def token_ids(tokenizer: Any, texts: list[str]) -> Any:
    """int64 `[n, length]`, padded and cut to the tokenizer's length, as Stable Diffusion's pipelines do it."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
