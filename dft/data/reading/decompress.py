"""Read and decompress a file in pieces, up to the byte where it is damaged."""

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa

from dft.data.reading.records import MAX_RECORD_BYTES, READ_SIZE

DECOMPRESS_SIZE = 1 << 12
"""Bytes to decompress per call. Small, because a call that encounters damage returns no data."""
GZIP_MAGIC = b"\x1f\x8b"


class TrailingBytes(Exception):
    """Raised when a compressed stream is followed by bytes that are not part of it.

    Attributes:
        data: these bytes, truncated to a little more than `MAX_RECORD_BYTES`.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data


def read_plain(file: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a file that is not compressed."""
    while piece := file.read(READ_SIZE):
        yield piece


def read_gzip(file: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed bytes of a gzip file; see `_inflate` for the errors."""
    return _join_pieces(_inflate(file))


def read_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed bytes of a zstd file. Raises OSError if it is damaged or truncated."""
    with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
        yield from _join_pieces(iter(lambda: stream.read(DECOMPRESS_SIZE), b""))


def _join_pieces(small_pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join pieces to about `READ_SIZE` bytes. If an error is raised, first yield the data read before it."""
    parts: list[bytes] = []
    size = 0
    try:
        for piece in small_pieces:
            parts.append(piece)
            size += len(piece)
            if size >= READ_SIZE:
                yield b"".join(parts)
                parts, size = [], 0
    except (OSError, EOFError, zlib.error, TrailingBytes):
        if parts:
            yield b"".join(parts)
        raise
    if parts:
        yield b"".join(parts)


def _inflate(file: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed bytes of all members of a gzip file.

    The gzip module of the standard library also raises on trailing bytes, but it does not return them, and
    they must be copied to rejected.jsonl. Zeros after a member are treated as padding, like in the gzip
    program.

    Raises:
        EOFError, zlib.error: the file is truncated, damaged or not a gzip file.
        TrailingBytes: a complete member is followed by something other than a member or padding.
    """
    packed = b""
    while True:
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)
        while not member.eof:
            packed = packed or file.read(DECOMPRESS_SIZE)
            piece = member.decompress(packed, READ_SIZE)
            if not (packed or piece):
                raise EOFError("its end marker is missing")
            packed = member.unconsumed_tail
            if piece:
                yield piece
        packed = member.unused_data.lstrip(b"\0")
        while not packed:
            padding = file.read(DECOMPRESS_SIZE)
            if not padding:
                return
            packed = padding.lstrip(b"\0")
        packed += file.read(1) if len(packed) == 1 else b""
        if not packed.startswith(GZIP_MAGIC):
            raise TrailingBytes(packed + file.read(MAX_RECORD_BYTES))


READERS: dict[str | None, Callable[[BinaryIO], Iterator[bytes]]] = {
    None: read_plain,
    "gzip": read_gzip,
    "zstd": read_zstd,
}
"""Reader of a file by its compression."""
