"""Lines of a dump of any size, one at a time: plain, zstd-compressed, in a tar archive, or both.

The first bytes of the file decide its format, not its name. Memory is bounded for any file: zstd windows of more than
128 MiB are refused, as `unzstd` does; compressed input is decompressed in small pieces, so that no piece expands
without limit; and a line above the limit is skipped, not read.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

import zstandard

from circuit_breaking.errors import UserError

MAX_LINE = 16 * 2**20  # bytes; a thread of the 4chan dump has about 14 KB, the longest ones a few MB
GIVE_UP = 2**30  # bytes; a file with a longer line is refused, since skipping it could take for ever
_PIECE = 64 * 2**10  # bytes per read
_ZSTD_PIECE = 128  # bytes per call of zstd: a block of 4 bytes can expand to 128 KiB, so a call returns at most 4 MiB
_ZSTD_WINDOW = 2**27  # bytes; the limit of zstd without --long
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SUFFIXES = (".ndjson", ".jsonl", ".json")
_TAR_HEADER = 2**20  # bytes of an extended header (long names), which tarfile reads into memory as a whole


def read_lines(file: BinaryIO, name: str, max_line: int = MAX_LINE) -> Iterator[tuple[int, bytes | None]]:
    """Read the lines of an open dump.

    From a tar archive, all members that end in .ndjson, .jsonl or .json are read in order, and their lines are numbered
    without a break.

    Args:
        file: the dump.
        name: its name in error messages.
        max_line: bytes; a longer line is returned as None.

    Yields:
        The number of each line, from 1, and its bytes.

    Raises:
        UserError: the file is truncated, damaged or cannot be read.
    """
    try:
        head, pieces = _head(iter(lambda: file.read(_PIECE), b""))
        if _is_zstd(head):
            head, pieces = _head(_decompress(pieces, name))
        stream = io.BufferedReader(_Stream(pieces), _PIECE)
        if head[257:262] == b"ustar":
            parts = (_lines(part, max_line, name) for part in _members(stream, name))
            yield from enumerate(chain.from_iterable(parts), 1)
        else:
            yield from enumerate(_lines(stream, max_line, name), 1)
    except zstandard.ZstdError as error:
        if "memory" in str(error).lower() or "window" in str(error).lower():
            raise UserError(
                f"{name} needs a zstd window of more than {_ZSTD_WINDOW >> 20} MiB. "
                "Unpack it with `zstd -d --long=31` and give the unpacked file."
            ) from error
        raise UserError(f"{name} is damaged ({error}). Download or copy it again.") from error
    except (tarfile.TarError, EOFError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"{name} is a damaged tar archive ({error}). Download or copy it again.") from error
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}.") from error


def _is_zstd(head: bytes) -> bool:
    """Whether a zstd frame starts here: an ordinary one, or a skippable one, which pzstd writes first."""
    return head.startswith(_ZSTD_MAGIC) or (len(head) >= 8 and head[0] >> 4 == 5 and head[1:4] == b"\x2a\x4d\x18")


def _head(pieces: Iterator[bytes], size: int = 512) -> tuple[bytes, Iterator[bytes]]:
    """The first `size` bytes, or all if there are fewer, and an iterator over all pieces."""
    head = b""
    while len(head) < size and (piece := next(pieces, b"")):
        head += piece
    return head[:size], chain([head], pieces)


def _decompress(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Decompress one frame after the other. zstandard's `stream_reader` would not notice a truncated file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = decompressor.decompressobj()
    for piece in pieces:
        for start in range(0, len(piece), _ZSTD_PIECE):
            data = piece[start : start + _ZSTD_PIECE]
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                if output := frame.decompress(data):
                    yield output
                data = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise UserError(f"{name} ends in the middle of its compressed data. Download or copy it again.")


class _Stream(io.RawIOBase):
    """A raw stream over pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]):
        self.pieces = pieces
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            self.rest = memoryview(b"")  # frees the last piece before the next is made
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count


class _TarInfo(tarfile.TarInfo):
    """Refuses members that tarfile would read into memory without limit: huge extended headers, many global headers,
    and sparse members, whose maps and holes can have any size. The methods override hooks of tarfile."""

    def _proc_member(self, tar):
        extended = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*extended, tarfile.SOLARIS_XHDTYPE) and self.size > _TAR_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        if self.type == tarfile.XGLTYPE:
            tar.of_all = getattr(tar, "of_all", 0) + self.size
            if tar.of_all > _TAR_HEADER:
                raise tarfile.ReadError(f"global headers of {tar.of_all} bytes")
        return super()._proc_member(tar)

    def _no_sparse(self, *_):
        raise tarfile.ReadError("a sparse member; pack the archive without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _no_sparse


def _members(stream: BinaryIO, name: str) -> Iterator[BinaryIO]:
    found = False
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_PIECE, tarinfo=_TarInfo) as archive:
        for member in archive:
            archive.members = []  # tarfile would keep all headers
            base = member.name.rpartition("/")[2]
            # macOS adds a "._name" with attributes for each file
            if member.isreg() and base.lower().endswith(_SUFFIXES) and not base.startswith("._"):
                found = True
                yield archive.extractfile(member)
    if not found:
        raise UserError(f"the archive {name} holds no {', '.join(_SUFFIXES)} file.")


def _lines(stream: BinaryIO, max_line: int, name: str) -> Iterator[bytes | None]:
    while line := stream.readline(max_line + 1):
        if len(line) <= max_line or line.endswith(b"\n"):
            yield line
            continue
        skipped = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(_PIECE)):
            skipped += len(line)
            if skipped > GIVE_UP:
                raise UserError(f"{name} has a line of more than {GIVE_UP >> 20} MiB: it is no newline-delimited dump.")
        yield None
