"""Files that are either whole or absent: temporary name, fsync, rename. And the lock of a folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy

from elegans.errors import StoreError

_hash = functools.partial(hashlib.blake2b, digest_size=16)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, whole and on disk, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN is refused: a missing number is null."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """The mapping in a file of `write_json`. Raises `StoreError` where it is damaged, or lacks a name that is needed."""
    return _mapping(path, _text(path), needed)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file, one a line. Raises `StoreError` where one is damaged."""
    return [_mapping(path, line) for line in _text(path).splitlines()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: unreadable ({error})") from None


def _mapping(path: Path, text: str, needed: Collection[str] = ()) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise StoreError(f"{path}: damaged ({error})") from None
    if not isinstance(found, dict) or (lacking := [name for name in needed if found.get(name) is None]):
        raise StoreError(f"{path}: damaged, {'no mapping' if not isinstance(found, dict) else f'it lacks {lacking[0]!r}'}")
    return found


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically. The same rows give the same bytes."""
    with replacing(path) as temporary:
        _write(table, temporary)


def _write(table: pa.Table, where: Path | io.BytesIO) -> None:
    """Floats byte by byte, all first bytes, then all second ones, since few numbers are alike: three quarters of a dictionary's space."""
    floats = [column.name for column in table.schema if column.type in (pa.float32(), pa.float64())]  # DuckDB reads no others so
    others = [name for name in table.column_names if name not in floats]
    pq.write_table(table, where, compression="zstd", use_dictionary=others, use_byte_stream_split=floats, write_page_checksum=True)


def rows_digest(path: Path) -> str:
    """Digest of a Parquet file's rows, whichever version of whatever library wrote them. Raises `StoreError` where it is damaged."""
    _write(read_table(path), written := io.BytesIO())
    return _hash(written.getvalue()).hexdigest()


def read_table(path: Path) -> pa.Table:
    """The rows of a Parquet file. Raises `StoreError` where it is damaged."""
    return _parquet(_rows, path)


def _rows(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:  # `pq.read_table` takes twice as long for a small one
        return file.read()


def has_columns(path: Path) -> bool:
    """Whether a Parquet file has columns. Raises `StoreError` where it is damaged."""
    return len(_parquet(pq.read_schema, path)) > 0


def read_notes(path: Path) -> dict[str, str]:
    """What a Parquet file notes beside its rows. Raises `StoreError` where it is damaged."""
    return {name.decode(): value.decode() for name, value in (_parquet(pq.read_schema, path).metadata or {}).items()}


def _parquet(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path}: unreadable ({str(error).splitlines()[0]})") from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray], notes: dict[str, str]) -> None:
    """Write named arrays as safetensors, atomically, with a digest of everything in the header."""
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    with replacing(path) as temporary:
        # one entry: several would be written in an order that differs between processes
        entry = json.dumps({"notes": notes, "digest": _digest(arrays, notes)}, sort_keys=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any file; safetensors lets nobody but the owner read
        safetensors.numpy.save_file(arrays, temporary, metadata={"elegans": entry})
        temporary.chmod(mode)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and notes of a file of `write_arrays`. Raises `StoreError` where a single bit differs."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            entry = json.loads((file.metadata() or {}).get("elegans", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path}: unreadable ({str(error).splitlines()[0]})") from None
    notes = entry.get("notes", {})
    if entry.get("digest") != _digest(arrays, notes):
        raise StoreError(f"{path}: damaged, its digest does not match its contents")
    return arrays, notes


def _digest(arrays: dict[str, np.ndarray], notes: dict[str, str]) -> str:
    state = _hash(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        state.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _hash).hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it goes with the process. Raises `StoreError` where another process holds it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{folder}: another process is writing to this store; wait for it or use another --store") from None
        yield
