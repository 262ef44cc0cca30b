"""A disk with a volatile write cache: when the power goes, it forgets what was not flushed.

The kernel's loop driver makes a block device of a file, and that file is served over FUSE by a process of ours: a write
stays in its memory until the device is flushed. When the power goes, each block that was not flushed is written as a
whole, in part or not at all: a disk empties its cache in any order, and only a sector is written in one piece.
"""

import contextlib
import errno
import os
import select
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from app.settings import CHECKOUT

SIZE = 2**31
BLOCK = 4096
SECTOR = 512
LARGEST = 2**20
"""Bytes of the largest write that the kernel sends."""
FLUSH_TIME = 0.001
"""Seconds that a flush takes: so the power mostly goes during one, when there is something to lose."""


class Disk:
    """A file system on such a disk: while the power is on it is mounted in `folder`, where a server has its data."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder = folder
        self.place = folder / "postgres"
        self._image = folder / "image"
        self._device = folder / "device"
        self._random = random
        self._process: subprocess.Popen[str] | None = None
        self._loop = ""
        self.place.mkdir()
        self._device.touch()
        with self._image.open("wb") as image:
            image.truncate(SIZE)
        _run("mkfs.ext4", "-q", "-F", self._image)

    def turn_on(self) -> None:
        """Attach the disk and mount its file system, which first recovers by its journal."""
        fuse = os.open("/dev/fuse", os.O_RDWR)
        try:
            arguments = [str(fuse), str(self._image), str(self._random.random())]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.proof.disk", *arguments],
                cwd=CHECKOUT,
                pass_fds=[fuse],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            options = f"fd={fuse},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
            _run("mount", "-i", "-t", "fuse", "-o", options, "forgetful", self._device, pass_fds=[fuse])
        finally:
            os.close(fuse)
        self._loop = _run("losetup", "--find", "--show", self._device).strip()
        _run("mount", self._loop, self.place)

    def flush(self) -> None:
        """Write what the kernel holds back, and flush it."""
        _run("sync", "--file-system", self.place)

    def cut_power(self) -> tuple[int, int]:
        """Return how many blocks were not flushed, and how many of these are not what was written last.

        From now on nothing reaches the disk, and everything that asks for it fails.
        """
        assert self._process is not None
        told, _ = self._process.communicate()
        unflushed, lost = told.split()
        return int(unflushed), int(lost)

    def turn_off(self) -> None:
        """Unmount and detach what is left. Nobody may use the file system any more."""
        for command in (["umount", self.place], ["losetup", "--detach", self._loop], ["umount", self._device]):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):  # it was not turned on so far
                _run(*command)
        if self._process is not None:
            self._process.communicate()


def _run(*command: str | Path, pass_fds: tuple[int, ...] | list[int] = ()) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=pass_fds).stdout


@contextlib.contextmanager
def disk(folder: Path, random: Random) -> Iterator[Disk]:
    """A disk that is turned on."""
    one = Disk(folder, random)
    try:
        one.turn_on()
        yield one
    finally:
        one.turn_off()


class Cache:
    """What is on the disk, and the blocks that are written and not flushed."""

    def __init__(self, image: int) -> None:
        self._image = image
        self._blocks: dict[int, bytes] = {}

    def read(self, offset: int, size: int) -> bytes:
        first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
        found = bytearray(os.pread(self._image, (end - first) * BLOCK, first * BLOCK))
        for number in range(first, end):
            if (block := self._blocks.get(number)) is not None:
                found[(number - first) * BLOCK : (number - first + 1) * BLOCK] = block
        start = offset - first * BLOCK
        return bytes(found[start : start + size])

    def write(self, offset: int, data: bytes) -> None:
        first, end = offset // BLOCK, -(-(offset + len(data)) // BLOCK)
        if offset % BLOCK or len(data) % BLOCK:
            start, whole = offset - first * BLOCK, self.read(first * BLOCK, (end - first) * BLOCK)
            data = whole[:start] + data + whole[start + len(data) :]
        for number in range(first, end):
            self._blocks[number] = data[(number - first) * BLOCK : (number - first + 1) * BLOCK]

    def flush(self) -> None:
        for number, block in self._blocks.items():
            os.pwrite(self._image, block, number * BLOCK)
        self._blocks.clear()

    def lose(self, random: Random) -> tuple[int, int]:
        """Write some of the blocks, some in part, and forget the others; return how many there were and the losses."""
        lost = 0
        for number, block in self._blocks.items():
            kept = random.choice(([], range(0, BLOCK, SECTOR), random.sample(range(0, BLOCK, SECTOR), 4)))
            for start in kept:
                os.pwrite(self._image, block[start : start + SECTOR], number * BLOCK + start)
            lost += len(kept) < BLOCK // SECTOR
        return len(self._blocks), lost


# The kernel's FUSE protocol, version 7.31 (linux/fuse.h)
FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, RELEASE, FSYNC, FLUSH, INIT = 2, 3, 4, 14, 15, 16, 18, 20, 25, 26
INTERRUPT, BATCH_FORGET = 36, 42
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
DIRECT_IO = 1
"""The kernel caches nothing of this file: what is written is here."""
REQUEST, ANSWER = struct.Struct("=4xIQ24x"), struct.Struct("=IiQ")
RANGE = struct.Struct("=8xQI")
WRITE_HEAD = REQUEST.size + 40


def serve(fuse: int, image: int, random: Random) -> None:
    """Answer the kernel until the power is cut: that is when standard input ends."""
    cache, size = Cache(image), os.fstat(image).st_size
    attributes = struct.pack("=16x3Q36x2I12xI4x", 1, size, size // SECTOR, stat.S_IFREG | 0o600, 1, BLOCK)
    waits = [0, fuse]
    while 0 not in select.select(waits, [], [])[0]:
        try:
            request = os.read(fuse, WRITE_HEAD + LARGEST + BLOCK)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            waits = [0]  # it is unmounted
            continue
        operation, unique = REQUEST.unpack_from(request)
        failure, answer = 0, b""
        if operation == WRITE:
            offset, length = RANGE.unpack_from(request, REQUEST.size)
            cache.write(offset, request[WRITE_HEAD : WRITE_HEAD + length])
            answer = struct.pack("=I4x", length)
        elif operation == READ:
            answer = cache.read(*RANGE.unpack_from(request, REQUEST.size))
        elif operation == FSYNC:
            if select.select([0], [], [], FLUSH_TIME)[0]:
                break
            cache.flush()
        elif operation in (GETATTR, SETATTR):
            answer = attributes
        elif operation == OPEN:
            answer = struct.pack("=8xI4x", DIRECT_IO)
        elif operation == INIT:
            answer = struct.pack("=4I2H2IH34x", 7, 31, 0, BIG_WRITES | MAX_PAGES, 64, 48, LARGEST, 1, LARGEST // BLOCK)
        elif operation in (FORGET, BATCH_FORGET, INTERRUPT):  # these want no answer
            continue
        elif operation not in (RELEASE, FLUSH):
            failure = -errno.ENOSYS
        os.write(fuse, ANSWER.pack(ANSWER.size + len(answer), failure, unique) + answer)
    print(*cache.lose(random))


if __name__ == "__main__":
    with Path(sys.argv[2]).open("r+b", buffering=0) as file:
        serve(int(sys.argv[1]), file.fileno(), Random(sys.argv[3]))
