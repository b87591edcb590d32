"""`ShardStore`: records on disk, safe against being killed at any time."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from llm2_fast.errors import ArgumentError
from llm2_fast.supervision import SHARD_PATTERN, UNFINISHED, Manifest, manifest_path

_LOCK = ".lock"
_NUMBER = re.compile(r"(\d+)")
_SHARD_SIZE = 1000


class Record(Protocol):
    """What a store keeps, a line each."""

    @property
    def id(self) -> str | None:
        """What tells it from the others."""

    def to_json(self) -> str:
        """One line, without its end."""


RecordT = TypeVar("RecordT", bound=Record)


class ShardStore(Generic[RecordT]):
    """A directory with a manifest and shards of records.

    A record is on disk when `append` returns. The shard under way is called `shard-….jsonl.part` and may end in half
    a line after a crash, which the next store over the directory drops. When it is full, or at `close`, it is renamed,
    so files without that suffix are complete and never written again.

    Args:
        directory: Made if it is not there.
        manifest: What the records are made with.
        parse: The record of a line; the second argument is what errors call it.

    Attributes:
        ids: Of the records on disk.

    Raises:
        ArgumentError: The directory belongs to records made otherwise, to another process, or to something else.
    """

    def __init__(
        self, directory: str | os.PathLike[str], manifest: Manifest, parse: Callable[[str, str], RecordT]
    ) -> None:
        self._directory, self._parse = Path(directory), parse
        if self._directory.exists() and not self._directory.is_dir():
            raise ArgumentError("output_dir", "a directory", str(directory))
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self._directory / _LOCK).open("wb")
        try:
            self._take_lock()
            self._check_manifest(manifest)
            shards = sorted(self._directory.glob(SHARD_PATTERN))
            self.ids = {record_id for shard in shards for record_id in self._read_ids(shard)}
            # Behind the last one: shards may have been taken away.
            self._number = 1 + max(
                (int(found[1]) for shard in shards if (found := _NUMBER.search(shard.name))), default=-1
            )
            self._open_part()
        except BaseException:
            self._lock.close()
            raise

    def append(self, record: RecordT) -> None:
        """Write one record, durably.

        Raises:
            ArgumentError: Its id is there already.
        """
        if record.id in self.ids:
            raise ArgumentError("record", "an id that is not on disk yet", record.id)
        line = memoryview(f"{record.to_json()}\n".encode())
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except BaseException:  # a full disk, Ctrl-C
            self._file.truncate(self._size)
            raise
        self._size += written
        self.ids.add(record.id)
        self._count += 1
        if self._count == _SHARD_SIZE:
            self._finish_shard()
            self._open_part()

    def close(self) -> None:
        """Finish the shard under way and let go of the directory."""
        if self._count:
            self._finish_shard()
        else:
            self._file.close()
            self._part_path.unlink()
        self._lock.close()

    def __enter__(self) -> ShardStore[RecordT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _shard_path(self) -> Path:
        return self._directory / SHARD_PATTERN.replace("*", f"{self._number:05d}")

    @property
    def _part_path(self) -> Path:
        return self._shard_path.with_name(self._shard_path.name + UNFINISHED)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends, however it does
        except BlockingIOError as error:
            raise ArgumentError(
                "output_dir", "a directory that no other process writes", str(self._directory)
            ) from error

    def _check_manifest(self, manifest: Manifest) -> None:
        path = manifest_path(self._directory)
        if path.is_file():
            if differences := Manifest.read(path).differences(manifest):
                raise ArgumentError("output_dir", "results of the same model and options", differences)
        elif any(self._directory.glob(SHARD_PATTERN)):
            raise ArgumentError("output_dir", "an empty directory, or one with a manifest", str(self._directory))
        else:
            staging = path.with_name(path.name + UNFINISHED)
            with staging.open("w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            self._rename(staging, path)

    def _open_part(self) -> None:
        """Open the shard under way; half a line at its end is cut off."""
        self._file = self._part_path.open("a+b", buffering=0)
        self._file.seek(0)
        self._size = self._file.read().rfind(b"\n") + 1
        self._file.truncate(self._size)
        ids = self._read_ids(self._part_path)
        self.ids |= ids
        self._count = len(ids)

    def _finish_shard(self) -> None:
        self._file.close()
        self._rename(self._part_path, self._shard_path)
        self._number += 1

    def _rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the name, too, is on disk now
        finally:
            os.close(descriptor)

    def _read_ids(self, path: Path) -> set[str | None]:
        lines = path.read_text(encoding="utf-8").split("\n")
        return {self._parse(line, f"{path.name}:{number}").id for number, line in enumerate(lines, 1) if line}
