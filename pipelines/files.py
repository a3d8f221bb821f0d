"""Picture files written from top to bottom: TIFF as it is, PNG compressed by several threads, others through Pillow."""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from .vae import decode_rows, to_bytes

LEVEL = 1  # zlib's: the higher ones take several times as long for a few percent
CHUNK = 2**22  # bytes of pixels that one thread compresses at a time


def save_latents(vae: Any, latents: Tensor, path: str | Path, shape: tuple[int, int]) -> None:
    """Decode latents `[1, C, h, w]` in the VAE's scale straight into a file; a failure leaves no file behind.

    Args:
        shape: of the picture, height and width in pixels.
    """
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        with picture_writer(path, shape[1], shape[0], part) as writer:
            decode_rows(vae, latents, lambda first, rows: writer.write(to_bytes(rows)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def picture_writer(path: str | Path, width: int, height: int, part: Path | None = None) -> Writer:
    """The writer for the name's ending; it writes to `part` where that is given."""
    return check_picture(path, width, height)(Path(part or path), width, height)


def check_picture(path: str | Path, width: int, height: int) -> type[Writer]:
    """What writes a picture of this size to a file of this name.

    Raises:
        ValueError: an ending that no picture has, or a format that holds no such size.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".tif", ".tiff"):
        if width * height * 3 > 2**32 - 2**20:
            raise ValueError(f"A TIFF file holds 4 GiB, too little for {width} x {height} pixels; choose .png.")
        return TiffWriter
    if suffix == ".png":
        return PngWriter
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise ValueError(f"{path} must end as a picture does, such as .png or .tif.")
    return type(f"{kind}Writer", (PillowWriter,), {"kind": kind})


class Writer:
    """Rows `[h, width, 3]` of uint8 in, from top to bottom; the file is whole when the with block ends."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        self.path, self.width, self.height, self.rows = path, width, height, 0
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self.rows != self.height:
                    raise ValueError(f"The picture has {self.height} rows, and {self.rows} were written.")
                self.finish()
        finally:
            self.file.close()

    def write(self, rows: np.ndarray) -> None:
        if rows.shape[1:] != (self.width, 3) or rows.dtype != np.uint8:
            raise ValueError(f"rows must be [n, {self.width}, 3] uint8, got {rows.shape=} {rows.dtype=}.")
        self.rows += len(rows)
        self.add(np.ascontiguousarray(rows))

    def add(self, rows: np.ndarray) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError


class TiffWriter(Writer):
    """Uncompressed RGB TIFF, one strip a call: up to 4 GiB, 37,800 pixels a side."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        super().__init__(path, width, height)
        self.file.write(struct.pack("<2sHI", b"II", 42, 0))  # where the directory is, is known in the end

    def add(self, rows: np.ndarray) -> None:
        self.file.write(rows.data)

    def finish(self) -> None:
        size = self.width * self.height * 3
        self.file.write(b"\0" * (size % 2))
        directory = 8 + size + size % 2
        bits = directory + 2 + 11 * 12 + 4
        resolution = bits + 6
        short, long, rational = 3, 4, 5
        # the pixels lie in one piece, so they are one strip whatever calls brought them
        entries = [
            (256, long, 1, self.width), (257, long, 1, self.height), (258, short, 3, bits), (259, short, 1, 1),
            (262, short, 1, 2), (273, long, 1, 8), (277, short, 1, 3), (278, long, 1, self.height),
            (279, long, 1, size), (282, rational, 1, resolution), (283, rational, 1, resolution),
        ]  # fmt: skip
        self.file.write(struct.pack("<H", len(entries)))
        for tag, kind, count, value in entries:
            self.file.write(struct.pack("<HHII", tag, kind, count, value))
        self.file.write(struct.pack("<I3H2I", 0, 8, 8, 8, 72, 1))
        self.file.seek(4)
        self.file.write(struct.pack("<I", directory))


class PngWriter(Writer):
    """RGB PNG, each row as its difference to the one above; chunks of rows are compressed side by side.

    A deflate stream may be cut at any flush: every thread makes whole blocks that end on a byte (as pigz does), and the
    checksum runs over the rows in order.
    """

    def __init__(self, path: Path, width: int, height: int) -> None:
        super().__init__(path, width, height)
        self.threads = ThreadPoolExecutor(os.cpu_count() or 1)
        self.waiting: deque[Future[bytes]] = deque()
        self.above = np.zeros((1, width * 3), np.uint8)
        self.checksum = 1
        self.file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        self._chunk(b"IDAT", b"\x78\x01")

    def add(self, rows: np.ndarray) -> None:
        flat = rows.reshape(len(rows), -1)
        count = max(1, CHUNK // flat.shape[1])
        for first in range(0, len(flat), count):
            part = flat[first : first + count]
            lines = np.empty((len(part), flat.shape[1] + 1), np.uint8)
            lines[:, 0] = 2  # the filter "up"
            np.subtract(part, np.concatenate((self.above, part[:-1])), out=lines[:, 1:])
            self.above = part[-1:].copy()
            self.checksum = zlib.adler32(lines.data, self.checksum)
            self.waiting.append(self.threads.submit(_deflate, lines))
            self._drain(2 * (os.cpu_count() or 1))

    def finish(self) -> None:
        self._drain(0)
        self._chunk(b"IDAT", zlib.compressobj(wbits=-15).flush() + struct.pack(">I", self.checksum))
        self._chunk(b"IEND", b"")

    def __exit__(self, *reason: Any) -> None:
        try:
            super().__exit__(*reason)
        finally:
            self.threads.shutdown(cancel_futures=True)

    def _drain(self, leave: int) -> None:
        while len(self.waiting) > leave:
            self._chunk(b"IDAT", self.waiting.popleft().result())

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _deflate(lines: np.ndarray) -> bytes:
    packer = zlib.compressobj(LEVEL, wbits=-15)
    return packer.compress(lines.data) + packer.flush(zlib.Z_FULL_FLUSH)


class PillowWriter(Writer):
    """Formats that need the whole picture: it is gathered in 8 bits."""

    kind: str

    def __init__(self, path: Path, width: int, height: int) -> None:
        super().__init__(path, width, height)
        self.parts = [np.empty((0, width, 3), np.uint8)]

    def add(self, rows: np.ndarray) -> None:
        self.parts.append(rows)

    def finish(self) -> None:
        Image.fromarray(np.concatenate(self.parts)).save(self.file, self.kind)
