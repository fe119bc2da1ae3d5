"""What was read of a remote store, on this machine's disk: bounded, shared by all processes, and never relied upon.

A file for each range that was read. What is not found there, is damaged or cannot be written is read from the store, as
if there were no cache. The space is shared out among `BUCKETS` folders: who has written a sixteenth of a folder's share
removes what was not used for longest there, so nobody has to look at all files or to wait for another process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import secrets
import shutil
import zlib
from pathlib import Path

from absl import logging

from visionfm_jax.errors import ConfigError

LIMIT = "VISIONFM_CACHE_GB"  # environment variable: 10^9 bytes of it, 0 for none
DEFAULT_GB = 20.0
BUCKETS = 64
RESERVE = 0.1  # share of the disk that stays free
_CRC = 4  # bytes at the end
_written: dict[Path, int] = {}  # bytes in a bucket since this process last looked into it


def get(key: str) -> bytes | None:
    """What was kept for a key; None: nothing, or it is damaged."""
    if not key or not _limit():
        return None
    path = _path(key)
    try:
        data = path.read_bytes()
        os.utime(path)  # it is the last that was used
    except OSError:
        return None
    content, crc = data[:-_CRC], data[-_CRC:]
    return content if zlib.crc32(content).to_bytes(_CRC, "little") == crc else None


def put(key: str, content: bytes) -> None:
    """Keep something, if there is room."""
    share = _limit() / BUCKETS
    if not key or len(content) > share / 4:
        return
    path = _path(key)
    part = path.with_name(f".{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(path.parent)
        if disk.free < RESERVE * disk.total:
            _say(path.parent.parent, f"less than {RESERVE:.0%} of the disk is free")
            return
        try:
            part.write_bytes(content + zlib.crc32(content).to_bytes(_CRC, "little"))
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        _written[path.parent] = _written.get(path.parent, math.ceil(share)) + len(content)
        if _written[path.parent] > share / 16:
            _written[path.parent] = 0
            _make_room(path.parent, share)
    except OSError as error:
        _say(path.parent.parent, error.strerror)


def _make_room(bucket: Path, share: float) -> None:
    """Remove what was not used for longest, until nine tenths of the share are left."""
    found = []
    with os.scandir(bucket) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has removed it
                state = entry.stat()
                found.append((state.st_mtime_ns, state.st_size, entry.path))
    used = sum(size for _, size, _ in found)
    if used <= share:
        return
    for _, size, path in sorted(found):
        if used <= 0.9 * share:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        used -= size


def _path(key: str) -> Path:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "visionfm_jax" / "store" / f"{int(digest[:8], 16) % BUCKETS:02d}" / digest


def _limit() -> float:
    """Bytes.

    Raises:
      ConfigError: the variable is no number.
    """
    return _parsed(os.environ.get(LIMIT, ""))


@functools.cache
def _parsed(text: str) -> float:
    try:
        limit = float(text or DEFAULT_GB)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e9:
        raise ConfigError(f"{LIMIT}={text}: must be a number of GB from 0 (no cache) on; {DEFAULT_GB:g} is the default")
    return limit * 1e9


@functools.cache
def _say(folder: Path, why: str) -> None:
    """Once."""
    logging.warning("%s: nothing more is kept of what is read from remote stores (%s)", folder, why)
