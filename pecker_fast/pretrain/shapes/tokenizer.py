"""A CLIP tokenizer made for the captions: their words are single tokens, any other text falls into bytes."""

from __future__ import annotations

import itertools
import re
from typing import Any

from pecker_fast.data import ATTRIBUTES, TEMPLATES

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    text = re.sub(r"\{\w+\}", " ", " ".join(TEMPLATES))
    return sorted({*re.findall(r"[a-z]+", text), *(word for words in ATTRIBUTES.values() for word in words)})


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges, in order, after which each of `words` is one token.

    Each word in turn is merged as far as the merges so far go, and the pieces that are left from left to right by new
    ones. New merges come last, so that they never change a word before. (The trainer of `tokenizers` breaks ties by
    chance: its token ids differ from run to run.)
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + END_OF_WORD]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min((pair for pair in pairs if pair in ranks), key=ranks.__getitem__, default=pairs[0])
            ranks.setdefault(best, len(ranks))
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
    return list(ranks)


def build_tokenizer(words: list[str], length: int) -> Any:
    """A transformers CLIPTokenizer for prompts of `length` tokens, both ends included.

    Byte-level pair encoding: 256 bytes, inside and at the end of a word, and as many merges as make each of `words`
    (lower case, ASCII) one token. Padding is the end token, as CLIP has it.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges: Any = merges_for(words)
    tokens = [*alphabet, *(f"{byte}{END_OF_WORD}" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), START, END])}
    pairs: Any = merges  # as tuples, whatever the signature says
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=length)


def token_ids(tokenizer: Any, texts: list[str]) -> Any:
    """int64 `[n, length]`, padded and cut to the tokenizer's length, as Stable Diffusion's pipelines do it."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
