"""The disk tier: activations in a file, written and read by two threads while compute goes on.

A disk is slow beside memory, so two things matter more than speed: that memory never grows because the disk lags, and
that what comes back is what was put. `put` waits while too much is being written, or leaves the tensor where it is, up
to a bound; the checksum of each chunk is taken of the bytes as they are written and compared as they are read. Somebody
waits for a read: reads go before writes that still queue, and the threads share the chunks of one tensor.

```
caller   put: 1 allocate an extent, queue the write, return             get: 4 allocate the result, queue the read, wait
thread             2 [load a chunk, checksum, pwrite] ... 3 drop the tensor            5 [pread, checksum, unload] ...
```

On a GPU, steps 2 and 5 begin when the caller's stream has come as far as steps 1 and 4: the tensor is computed, and
whoever had the result's memory before is done with it. Every copy is waited for by the thread, so after steps 3 and 5
the memory is in nobody's use and needs no record_stream.

It closes itself when nothing refers to it: the pool's threads end with the pool, the file with its last write.
"""

import os
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packlight.activations.copies import lend, present_stream, stamp, wait_for
from packlight.activations.extents import Extent, Extents
from packlight.activations.shelf import Late, OnFull, Shelf
from packlight.activations.spill import BLOCK_BYTES, SpillFile
from packlight.activations.staging import CHUNK_BYTES, Staging, make_staging
from packlight.activations.tier import Arrival, OffloadError, Record

NUM_THREADS = 2
"""One computes a checksum while the other waits for the disk."""
_Job = Callable[[], Any]
_Parts = list[tuple[int, Tensor]]


class DiskTier(Shelf[Extent]):
    """Stores tensors of one device, CPU or CUDA, in a nameless file."""

    name = "disk"

    def __init__(
        self,
        *,
        device: torch.device,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
        max_in_flight_bytes: int = 256 * 2**20,
        on_full: OnFull = "raise",
        late: Late = "wait",
        keep_bytes: int | None = None,
    ) -> None:
        """Open the file and start no thread yet.

        Args:
            device: where the tensors live.
            folder: where the file is made; None for the folder for temporary files.
            max_bytes: bound on the file's size; None for what the disk holds.
            max_in_flight_bytes: bound on what is being written, and again on what was read ahead.
            on_full: "raise" tells the next caller; "keep" warns once and leaves tensors in memory.
            late: "wait" makes `put` wait where a tensor would exceed the bound; "keep" leaves it in memory. "steady"
                waits too, and a tensor that has been written is let go of when the bound needs its room, or at `flush`,
                and not before: so what lives in memory does not depend on how fast the disk is.
            keep_bytes: bound on what is left there for being late, above which `put` waits; None for
                `max_in_flight_bytes`.

        Raises:
            OffloadError: no file can be made in the folder.
            ValueError: a bound that nothing can move under.
        """
        super().__init__(
            device=device,
            max_in_flight_bytes=max_in_flight_bytes,
            on_full=on_full,
            late=late,
            keep_bytes=keep_bytes,
        )
        self._extents = Extents(max_bytes, alignment=BLOCK_BYTES)
        self._max_bytes = max_bytes
        self._file = SpillFile(Path(folder or tempfile.gettempdir()))
        self._pool, self._is_steady = _Pool(), late == "steady"
        self._under_way: deque[Record[Extent]] = deque()
        self._written: dict[Record[Extent], OffloadError | None] = {}
        self._stagings: list[Staging] = []
        self._staging_bytes = 0
        for _ in range(NUM_THREADS if self._is_steady else 0):  # their memory, too, is there from the beginning
            self._stagings.append(self._make_staging())

    @property
    def direct(self) -> bool:
        """Whether the file bypasses the page cache (O_DIRECT)."""
        return self._file.direct

    def close(self) -> None:
        """Drop what still waits to be written, end the threads, close the file."""
        if self._pid == os.getpid():
            if not self._closed:
                self._check_caller()
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._pool.close()
            with self._changed:
                self._under_way.clear()
                self._written.clear()
            while self._stagings:
                self._stagings.pop().close()
            self._staging_bytes = 0
        self._file.close()

    # What Shelf asks for

    def _make_room(self, num_bytes: int) -> None:
        room_bytes = self.max_in_flight_bytes - num_bytes if num_bytes else 0
        room_bytes = max(room_bytes, 0)  # one tensor larger than the window moves alone
        if not self._is_steady:
            self._changed.wait_for(lambda: self._in_flight_bytes <= room_bytes or self._closed)
        while self._under_way and self._in_flight_bytes > room_bytes and not self._closed:
            self._let_go_of_oldest()

    def _let_go(self, record: Record[Extent]) -> None:
        if not self._is_steady:
            self._changed.wait_for(lambda: record.source is None or record.kept or self._closed)
        while self._under_way and record.source is not None and not (record.kept or self._closed):
            self._let_go_of_oldest()

    def _let_go_of_oldest(self) -> None:
        self._changed.wait_for(self._is_oldest_written)
        if self._under_way and not self._closed:  # another thread may have let go of the last one meanwhile
            first = self._under_way.popleft()
            self._moved(first, self._written.pop(first))

    def _is_oldest_written(self) -> bool:
        return self._closed or not self._under_way or self._under_way[0] in self._written

    def _reap(self) -> None:
        """The threads do."""

    def _reserve(self, num_bytes: int) -> Extent | None:
        return self._extents.allocate(num_bytes)

    def _release(self, place: Extent) -> None:
        self._extents.release(place)

    def _stored_bytes(self) -> int:
        return self._extents.used_bytes

    def _pinned_bytes(self) -> int:
        return self._staging_bytes

    def _full(self, wanted_bytes: int) -> OffloadError:
        return OffloadError(
            f"the disk tier in {self._file.folder} is full: {wanted_bytes} bytes were to be stored, "
            f"{self._extents.used_bytes} are, of {self._max_bytes} allowed, and the largest gap has "
            f"{self._extents.largest_free_bytes}; raise max_bytes, or offload less"
        )

    def _send(self, record: Record[Extent], place: Extent) -> None:
        self._pool.submit(partial(self._write, record, place, stamp(self.device)), urgent=False)
        if self._is_steady:
            self._under_way.append(record)

    def _bring(self, record: Record[Extent], place: Extent) -> Arrival:
        result = torch.empty(record.numel, dtype=record.dtype, device=self.device)  # step 4
        ready, parts, reads = stamp(self.device), _parts(result), []
        for share in range(min(NUM_THREADS, len(parts))):
            record.busy += 1
            read = partial(self._read, record, parts[share::NUM_THREADS], place, ready)
            reads.append(self._pool.submit(read, urgent=True))
        return _Reading(result, reads, present_stream(self.device))

    # What the threads do

    def _write(self, record: Record[Extent], place: Extent, ready: torch.cuda.Event | None) -> None:
        failure = None
        try:
            if not (record.freed or self._closed):
                self._write_chunks(record, place, ready)
        except Exception as error:  # whatever it is, the tensor is still here and the next caller hears of it
            failure = self._failure_of(error, record.num_bytes, self._extents.used_bytes - place.num_bytes)
        with self._changed:
            if self._is_steady:
                self._written[record] = failure
                self._changed.notify_all()
            else:
                self._moved(record, failure)  # step 3: nothing else refers to the tensor, so its memory is free now

    def _write_chunks(self, record: Record[Extent], place: Extent, ready: torch.cuda.Event | None) -> None:
        """Step 2."""
        wait_for(ready)
        assert record.source is not None
        with self._staging() as staging, self._out.timing(record.num_bytes):
            for at, part in _parts(record.source):
                chunk = staging.load(part)
                record.checksums.append(zlib.crc32(chunk[: part.numel()]))
                self._file.write(place.start + at * CHUNK_BYTES, chunk)

    def _read(self, record: Record[Extent], parts: _Parts, place: Extent, ready: torch.cuda.Event | None) -> None:
        try:
            self._read_chunks(record, parts, place, ready)
        except OSError as error:
            raise self._failure_of(error, record.num_bytes, self._extents.used_bytes) from error
        finally:
            with self._changed:
                self._copied(record)

    def _read_chunks(
        self, record: Record[Extent], parts: _Parts, place: Extent, ready: torch.cuda.Event | None
    ) -> None:
        """Step 5."""
        wait_for(ready)
        with self._staging() as staging, self._in.timing(sum(part.numel() for _, part in parts)):
            for at, part in parts:
                chunk = staging.room(part)
                self._file.read(place.start + at * CHUNK_BYTES, chunk)
                self._check(chunk[: part.numel()], record.checksums[at])
                staging.unload(part)

    def _check(self, chunk: memoryview, written: int) -> None:
        read = zlib.crc32(chunk)
        if read != written:
            raise OffloadError(
                f"the disk tier in {self._file.folder} read {len(chunk)} bytes with checksum {read:08x} where it had "
                f"written {written:08x}; do not trust that disk: name another folder"
            )

    @contextmanager
    def _staging(self) -> Iterator[Staging]:
        """Lend a staging that no other thread uses meanwhile; as many are made as threads ever run at once."""
        try:
            staging = self._stagings.pop()
        except IndexError:
            staging = self._make_staging()
        try:
            yield staging
        finally:
            self._stagings.append(staging)

    def _make_staging(self) -> Staging:
        staging = make_staging(self.device, direct=self.direct)
        with self._changed:
            self._staging_bytes += staging.num_bytes
        return staging

    def _failure_of(self, error: Exception, wanted_bytes: int, stored_bytes: int) -> OffloadError:
        if isinstance(error, OSError):
            return self._file.failure(error, wanted_bytes=wanted_bytes, stored_bytes=stored_bytes)
        return OffloadError(
            f"the disk tier in {self._file.folder} could not move {wanted_bytes} bytes ({error!r}); offload less, or "
            "use another tier"
        )


@dataclass
class _Reading:
    """A tensor that threads are reading."""

    result: Tensor
    reads: list[Future[None]]
    stream: torch.cuda.Stream | None

    def take(self) -> Tensor:
        for read in self.reads:
            read.result()
        return lend(self.result, self.stream)

    def abandon(self) -> None:
        """The threads refer to the tensor until the last byte is in it."""


class _Pool:
    """Two threads and two queues, of which one goes first."""

    def __init__(self) -> None:
        # Not daemons; the executor ends them at interpreter exit too, and when it is collected.
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="packlight-disk-")
        self._urgent: deque[tuple[Future[Any], _Job]] = deque()
        self._others: deque[tuple[Future[Any], _Job]] = deque()

    def submit(self, job: _Job, *, urgent: bool) -> Future[Any]:
        future: Future[Any] = Future()
        queue, entry = self._urgent if urgent else self._others, (future, job)
        queue.append(entry)
        try:
            self._executor.submit(self._run_first)
        except BaseException:
            queue.remove(entry)
            raise
        return future

    def _run_first(self) -> None:
        """Run one job; each was submitted with one call of this."""
        try:
            future, job = self._urgent.popleft()
        except IndexError:
            future, job = self._others.popleft()
        try:
            result = job()
            del job  # it refers to a tensor, which shall not outlive the moment at which its reader goes on
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)
        finally:
            del future  # an exception refers to this frame, the frame must not refer back

    def close(self) -> None:
        self._executor.shutdown(wait=True)


def _parts(flat: Tensor) -> _Parts:
    """Cut a tensor's bytes into numbered chunks."""
    return list(enumerate(flat.view(torch.uint8).split(CHUNK_BYTES)))
