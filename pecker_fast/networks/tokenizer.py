"""CLIP tokenizers of a model folder, checked against the tables of the text encoder that reads their tokens."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import ModelError

_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_ADDED = "added_tokens.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_PIECES = (
    *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Replace", "Lowercase", "Strip", "StripAccents", "BertNormalizer"),
    *("Split", "ByteLevel", "Whitespace", "WhitespaceSplit", "BPEDecoder", "Fuse"),
    *("RobertaProcessing", "TemplateProcessing"),
)
_MOST_WORDS = 1 << 17
_NUMBERS = 1 << 31


def load_tokenizer(folder: Path, positions: int) -> Any:
    """The CLIPTokenizer of a folder. positions: of the text encoder that reads its tokens.

    Raises ModelError for a damaged file, a missing special token, and for prompts longer than the positions.
    """
    import transformers

    with _plain_copy(folder) as plain, files.guarded(folder, "not a CLIP tokenizer"):
        for name in _CONFIGS:
            if (plain / name).exists():
                config = files.read_config(plain / name, "tokenizer")
                kept = {key: value for key, value in config.items() if key in files.TOKENIZER}
                _check_added(plain / name, kept.get("added_tokens_decoder"))
                (plain / name).write_text(json.dumps(kept))
        _check_words(plain)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(plain, local_files_only=True)
        _check_specials(folder, tokenizer, positions)
    return tokenizer


@contextlib.contextmanager
def _plain_copy(folder: Path) -> Iterator[Path]:
    """A folder with the known files of a tokenizer's folder, and nothing else for a library to find: no templates, no other
    versions, no links. Errors that name it name the tokenizer's folder."""
    tree = files.tree_of(folder.parent)
    with tempfile.TemporaryDirectory(prefix="pecker-fast-") as name:
        plain = Path(name)
        try:
            for file in files.SMALL_FILES["tokenizer"]:
                if os.path.lexists(folder / file):
                    (plain / file).write_bytes(files.read_inside(folder / file, tree))
            yield plain
        except ModelError as error:
            raise ModelError(str(error).replace(str(plain), str(folder))) from error


def _check_words(folder: Path) -> None:
    """Of files whose damage the library would meet with a panic, with much work, or take for something else."""
    vocab, merges, whole, added = (folder / n for n in ("vocab.json", "merges.txt", "tokenizer.json", _ADDED))
    if vocab.exists():
        _check_numbers(vocab, files.read_json(vocab, error=ModelError), _MOST_WORDS)
    if added.exists():
        _check_numbers(added, files.read_object(added), files.MOST_ADDED)
    if whole.exists():
        _check_whole(whole, files.read_object(whole))
    if merges.exists():
        for count, line in enumerate(files.read_text(merges, error=ModelError).splitlines()):
            if line.strip() and not line.startswith("#version") and len(line.split(" ")) != 2:
                raise ModelError(
                    f"{merges}: line {count + 1} is {files.shown(line)}; two pieces of a word were expected"
                )


def _check_whole(path: Path, content: dict[str, Any]) -> None:
    """tokenizer.json: of pieces that the library reads without a panic, and of words as in vocab.json."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ModelError(f"{path}: its model is {files.shown(model)}; a CLIP tokenizer's is BPE")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (other := next((kind for kind in _kinds(content.get(part)) if kind not in _PIECES), None)) is not None:
            raise ModelError(f"{path}: {part} is {files.shown(other)}, which is none of a CLIP tokenizer")
    if isinstance(model.get("vocab"), dict):
        _check_numbers(path, model["vocab"], _MOST_WORDS)
    _check_added(path, content.get("added_tokens"))


def _kinds(piece: Any) -> Iterator[Any]:
    """`type` of a piece of a tokenizer and of all pieces in it."""
    if isinstance(piece, dict):
        yield from (piece["type"],) if "type" in piece else ()
    for inner in piece.values() if isinstance(piece, dict) else piece if isinstance(piece, list) else ():
        yield from _kinds(inner)


def _check_numbers(path: Path, words: Any, most: int) -> None:
    """Words with their numbers, at most so many."""
    if not isinstance(words, dict) or not words:
        raise ModelError(f"{path}: damaged: an object of words with their numbers was expected")
    if len(words) > most:
        raise ModelError(f"{path}: holds {len(words):,} words; at most {most:,} are expected there")
    wrong = next((word for word, i in words.items() if type(i) is not int or not 0 <= i < _NUMBERS), None)
    if wrong is not None:
        raise ModelError(f"{path}: {files.shown(wrong)} has the number {files.shown(words[wrong])}; it is damaged")


def _check_added(path: Path, added: Any) -> None:
    """Tokens beside the vocabulary: as many as a model can have been given by hand, with numbers that a table can have."""
    if not isinstance(added, list | dict):
        return
    if len(added) > files.MOST_ADDED:
        raise ModelError(f"{path}: adds {len(added):,} tokens; at most {files.MOST_ADDED:,} are expected")
    tokens = added.values() if isinstance(added, dict) else added
    if (wrong := next((token for token in tokens if not files.is_token(token)), None)) is not None:
        raise ModelError(f"{path}: the added token {files.shown(wrong)} is none; it is damaged")
    for number in added if isinstance(added, dict) else [token.get("id") for token in added]:
        digits = str(number)[:20]
        if not (digits.isascii() and digits.isdecimal()) or int(digits) >= _NUMBERS:
            raise ModelError(f"{path}: an added token has the number {files.shown(number)}; it is damaged")


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
