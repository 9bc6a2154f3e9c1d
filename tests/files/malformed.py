"""Damaged and hostile safetensors files: forty made by hand, and any number by chance."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

GOOD_HEADER: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
}
GOOD_DATA = bytes(range(24))


def pack(header: Any, data: bytes = GOOD_DATA, length: int | None = None) -> bytes:
    """A file of this header (a value, or its bytes) and data; `length` is what the file claims the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = pack(GOOD_HEADER)


def with_a(**changes: Any) -> bytes:
    """The good file with entries of tensor `a` changed; None removes one."""
    entry = {key: value for key, value in {**GOOD_HEADER["a"], **changes}.items() if value is not None}
    return pack({**GOOD_HEADER, "a": entry})


HEADER_TEXT = json.dumps(GOOD_HEADER).encode()
FIXED: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x00",
    "seven bytes": GOOD[:7],
    "length alone": GOOD[:8],
    "cut in the header": GOOD[:40],
    "cut before the data": GOOD[: 8 + len(HEADER_TEXT)],
    "cut in the data": GOOD[:-1],
    "a byte too many": GOOD + b"\0",
    "a megabyte too many": GOOD + bytes(1 << 20),
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "text": b"this is not a tensor file at all, but it is long enough to be one",
    "length zero": pack(HEADER_TEXT, length=0),
    "length one": pack(HEADER_TEXT, length=1),
    "length one too short": pack(HEADER_TEXT, length=len(HEADER_TEXT) - 1),
    "length one too long": pack(HEADER_TEXT, length=len(HEADER_TEXT) + 1),
    "length of the file": pack(HEADER_TEXT, length=len(GOOD)),
    "length 2**32": pack(HEADER_TEXT, length=1 << 32),
    "length 2**63": pack(HEADER_TEXT, length=1 << 63),
    "length 2**64 - 1": pack(HEADER_TEXT, length=(1 << 64) - 1),
    "header is a list": pack(b"[]"),
    "header is a number": pack(b"7"),
    "header is no JSON": pack(b"{a: 1}"),
    "header is not UTF-8": pack(b'{"\xff\xfe": 1}'),
    "header stops": pack(HEADER_TEXT[:-1]),
    "header nested": pack(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "header of arrays, long": pack(b'{"a":[' + b"[]," * (3 << 20) + b"[]]}"),
    "tensor is null": pack({**GOOD_HEADER, "a": None}),
    "tensor is text": pack({**GOOD_HEADER, "a": "x"}),
    "no type": with_a(dtype=None),
    "unknown type": with_a(dtype="F33"),
    "type is an object": with_a(dtype="O"),
    "no shape": with_a(shape=None),
    "shape too large": with_a(shape=[2, 3]),
    "shape negative": with_a(shape=[-2, -2]),
    "shape overflows": with_a(shape=[1 << 62, 1 << 62]),
    "shape is text": with_a(shape="4"),
    "no offsets": with_a(data_offsets=None),
    "offsets reversed": with_a(data_offsets=[16, 0]),
    "offsets negative": with_a(data_offsets=[-16, 0]),
    "offsets past the end": with_a(data_offsets=[16, 1 << 60]),
    "offsets overlap": pack({**GOOD_HEADER, "b": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}),
    "offsets leave a hole": pack({"b": GOOD_HEADER["b"]}),
    "metadata is no text": pack({"__metadata__": {"a": 1}, **GOOD_HEADER}),
    "metadata is a list": pack({"__metadata__": [], **GOOD_HEADER}),
}


def generated(count: int, seed: int = 0) -> Iterator[bytes]:
    """Good files with a few bytes of length or header changed, removed or added, or cut short."""
    draw = random.Random(seed)
    for _ in range(count):
        content = bytearray(GOOD)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(8 + len(HEADER_TEXT))
            kind = draw.randrange(4)
            if kind == 0:
                content[at : at + 1] = bytes([draw.randrange(256)])
            elif kind == 1:
                del content[at : at + draw.randint(1, 8)]
            elif kind == 2:
                content[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
            else:
                del content[draw.randrange(len(content)) :]
                content += b"\0" * 9
        yield bytes(content)
