"""CLIP tokenizers of a model folder, checked against the tables of the text encoder that reads their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import ModelError

_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_WORDS = ("vocab.json", "tokenizer.json")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_tokenizer(folder: Path, positions: int) -> Any:
    """The CLIPTokenizer of a folder. positions: of the text encoder that reads its tokens.

    Raises ModelError for a damaged file, a missing special token, and for prompts longer than the positions.
    """
    import transformers

    for name in _CONFIGS:
        if (folder / name).exists():
            files.read_config(folder / name, "tokenizer")
    _check_words(folder)
    with files.guarded(folder, "not a CLIP tokenizer"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        _check_specials(folder, tokenizer, positions)
    return tokenizer


def _check_words(folder: Path) -> None:
    """Of files whose damage the library would meet with a panic, or take for something else."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.exists():
        words = files.read_json(vocab, error=ModelError)
        if not isinstance(words, dict) or not words:
            raise ModelError(f"{vocab}: damaged: an object of words with their numbers was expected")
        wrong = next((word for word, i in words.items() if type(i) is not int or not 0 <= i < 1 << 31), None)
        if wrong is not None:
            raise ModelError(f"{vocab}: {files.shown(wrong)} has the number {files.shown(words[wrong])}; it is damaged")
    if merges.exists():
        for count, line in enumerate(files.read_text(merges, error=ModelError).splitlines()):
            if line.strip() and not line.startswith("#version") and len(line.split(" ")) != 2:
                raise ModelError(
                    f"{merges}: line {count + 1} is {files.shown(line)}; two pieces of a word were expected"
                )


def _check_specials(folder: Path, tokenizer: Any, positions: int) -> None:
    for name in _SPECIAL:
        if getattr(tokenizer, name) is None:
            raise ModelError(f"{folder}: {name} is missing; a CLIP tokenizer needs it")
    length = tokenizer.model_max_length
    if not 2 < length <= positions:
        raise ModelError(
            f"{folder}: model_max_length is {files.shown(length)} tokens, the text encoder has {positions} positions; "
            "the tokenizer_config.json is missing or damaged"
        )


def check_tokens(tokenizer: Any, rows: int, prompts: Sequence[str], where: Path) -> None:
    """Raise ModelError where a token of the prompts has no row in the encoder's table of `rows`, as an added one that was not
    trained."""
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    length = tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        for token in ids:
            if token >= rows:
                name = str(tokenizer.convert_ids_to_tokens(token))[:80]
                raise ModelError(
                    f"{where}: the token {name!r} of the prompt {prompt[:80]!r} has no row in the text encoder's table of "
                    f"{rows}; tokenizer and text encoder are not of one model"
                )
