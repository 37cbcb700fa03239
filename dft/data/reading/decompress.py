"""Files -> pieces of their bytes, decompressed, with all that could be read in front of any damage."""

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa

from dft.data.reading.records import LONGEST, PIECE

SIP = 1 << 12
"""Bytes decompressed at a time: what was decompressed before it met damage within one call is lost."""
GZIP_MAGIC = b"\x1f\x8b"


class Leftover(Exception):
    """Bytes behind the end of a compressed stream that are no part of it."""

    def __init__(self, rest: bytes) -> None:
        super().__init__(rest)
        self.rest = rest


def read_plain(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


def read_gzip(file: BinaryIO) -> Iterator[bytes]:
    return _gathered(_inflated(file))


def read_zstd(file: BinaryIO) -> Iterator[bytes]:
    with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
        yield from _gathered(iter(lambda: stream.read(SIP), b""))


def _gathered(sips: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces of the usual size, with all that was read before an error."""
    parts: list[bytes] = []
    size = 0
    try:
        for sip in sips:
            parts.append(sip)
            size += len(sip)
            if size >= PIECE:
                yield b"".join(parts)
                parts, size = [], 0
    except (OSError, EOFError, zlib.error, Leftover):
        if parts:
            yield b"".join(parts)
        raise
    if parts:
        yield b"".join(parts)


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    """The members of a gzip file. Zeros behind a member are padding, to gzip too.

    Raises:
        EOFError, zlib.error: it is cut off, damaged, or no gzip file.
        Leftover: behind a whole member follows what is none. gzip itself ignores that with a warning.
    """
    packed = b""
    while True:
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)
        while not member.eof:
            packed = packed or file.read(SIP)
            sip = member.decompress(packed, PIECE)
            if not (packed or sip):
                raise EOFError("it ends before its end mark")
            packed = member.unconsumed_tail
            if sip:
                yield sip
        packed = member.unused_data.lstrip(b"\0")
        while not packed:
            padding = file.read(SIP)
            if not padding:
                return
            packed = padding.lstrip(b"\0")
        packed += file.read(1) if len(packed) == 1 else b""
        if not packed.startswith(GZIP_MAGIC):
            raise Leftover(packed + file.read(LONGEST))


READERS: dict[str | None, Callable[[BinaryIO], Iterator[bytes]]] = {
    None: read_plain,
    "gzip": read_gzip,
    "zstd": read_zstd,
}
