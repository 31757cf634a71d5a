"""Files that may lie in an object store (gs://…): whole objects, which nothing renames and nothing adds to.

A path is a `pathlib.Path`, or for a URL what `etils.epath` makes of it. On a file system a file is written whole or not at all by a
rename; an object is whole by itself. What grows is a file that lines are added to, or, in a store, objects of one process, each written
anew until it has its size.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# of the stores that epath knows, what reads them
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
PART_BYTES = 4 << 20  # of an object that grows, before the next one begins
BEAT, SILENCE = 30.0, 600.0  # seconds between signs of life of a holder, and without any after which it counts as gone
SETTLE = 1.0  # seconds in which two that take a folder at once see each other
# file systems that machines share
NETWORK = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "ceph",
    "cifs",
    "smb3",
    "9p",
    "beegfs",
    "glusterfs",
    "afs",
    "pvfs2",
    "fuse.",
)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an object of a store, and no file of this machine."""
    return URL.match(os.fspath(path)) is not None


def as_path(path: str | os.PathLike[str]) -> Any:
    """A `pathlib.Path`, or an `epath.Path` for a URL.

    Raises:
        ValueError: for a URL of a store that nothing here can read; the message names the package.
    """
    if not is_url(path):
        return pathlib.Path(path)
    from etils import epath

    text = os.fspath(path)
    scheme = text.partition("://")[0].lower()
    package = PACKAGES.get(scheme)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{text}: {scheme}:// takes the package {package}, which is not installed (pip install {package})"
        )
    try:
        made = epath.Path(text)
    except KeyError:  # of a scheme that nobody has registered
        made = None
    if made is None or not is_url(made):
        known = ", ".join(f"{s}://" for s in PACKAGES)
        raise ValueError(f"{text}: no store is known as {scheme}://; there are {known}")
    return made


def write_atomic(path: Any, content: str | bytes) -> None:
    """Write a file or object whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    if is_url(path):
        path.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def make_folder(path: Any) -> None:
    """Make a folder and those above it, where there is none; a store has no folders."""
    if not is_url(path):
        path.mkdir(parents=True, exist_ok=True)


class GrowingFile:
    """A file that lines are added to: every call is on disk, or in the store, before it returns.

    Args:
        path: of a file; in a store it stands for objects `stem-0.suffix`, `stem-1.suffix`, …, of which a new one begins with every
            `GrowingFile`, so that none of an earlier run is written over.
    """

    def __init__(self, path: Any):
        self.path: Any = path
        self._held: bytes = b""
        self._object: Any = None

    def add(self, data: bytes) -> None:
        """Add `data`, all of it or, where that fails, nothing."""
        if is_url(self.path):
            self._add_to_object(data)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)  # of several hosts each may have a disk of its own
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)  # no half a line where the disk is full
                raise

    def _add_to_object(self, data: bytes) -> None:
        if self._object is None or len(self._held) > PART_BYTES:
            self._object, self._held = self._next_object(), b""
        self._object.write_bytes(self._held + data)
        self._held += data

    def _next_object(self) -> Any:
        name = re.compile(rf"{re.escape(self.path.stem)}-(\d+){re.escape(self.path.suffix)}")
        folder = self.path.parent
        found = [name.fullmatch(other.name) for other in folder.iterdir()] if folder.exists() else []
        number = 1 + max((int(match[1]) for match in found if match), default=-1)
        return folder / f"{self.path.stem}-{number}{self.path.suffix}"

    def remove(self) -> None:
        """Remove a file; objects of a store are their readers' to remove."""
        if not is_url(self.path):
            self.path.unlink(missing_ok=True)


def is_shared(path: str | os.PathLike[str], mounts: str = "/proc/mounts") -> bool:
    """Whether other machines may see this folder: of a store, or on a file system of a network."""
    if is_url(path):
        return True
    try:
        lines = pathlib.Path(mounts).read_text().splitlines()
    except OSError:
        return False
    here, best, kind = os.path.realpath(path), "", ""
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].encode().decode("unicode_escape")
        inside = here == point or here.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind.startswith(NETWORK)


@contextlib.contextmanager
def object_lock(
    lock: Any, holder: dict[str, Any], busy: type[Exception], gone: Callable[[dict[str, Any]], bool]
) -> Iterator[None]:
    """Hold a folder of a store by the object `lock` in it, which says who and when.

    A store creates nothing exclusively: whoever writes last holds it, and looks again after a moment. A holder without a sign of life
    for ten minutes counts as gone.

    Args:
        lock: the object.
        holder: what this process writes there, with "token".
        busy: the error.
        gone: whether a holder of this machine no longer runs.

    Raises:
        busy: somebody else holds it.
    """
    found = _holder(lock)
    if found and time.time() - float(found.get("alive", 0)) < SILENCE and not gone(found):
        raise busy(
            f"{lock.parent} is in use: {found.get('what')} (process {found.get('pid')} on {found.get('host')}, since "
            f"{found.get('since')}: {found.get('command')}); wait for it, choose another folder, or, if it no longer runs, "
            f"remove {lock}"
        )

    def sign() -> None:
        lock.write_bytes(json.dumps(holder | {"alive": time.time()}).encode())

    sign()
    time.sleep(SETTLE)
    if (found := _holder(lock)).get("token") != holder["token"]:
        raise busy(f"{lock.parent}: process {found.get('pid')} on {found.get('host')} takes it at the same moment")
    done = threading.Event()

    def live() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(Exception):  # a store that does not answer now does at the next beat
                sign()

    beat = threading.Thread(target=live, name="object-lock", daemon=True)
    beat.start()

    def release() -> None:
        done.set()
        beat.join()
        if _holder(lock).get("token") == holder["token"]:
            lock.unlink(missing_ok=True)

    with released(release):
        yield


def _holder(lock: Any) -> dict[str, Any]:
    """What a lock says; {} for none."""
    try:
        found = json.loads(lock.read_bytes()) if lock.exists() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_releases: dict[object, Callable[[], None]] = {}


@contextlib.contextmanager
def released(release: Callable[[], None]) -> Iterator[None]:
    """Call `release` once: at the end of the block, or in `release_all` where the process ends without coming to it."""
    mark = object()
    _releases[mark] = release
    try:
        yield
    finally:
        if _releases.pop(mark, None) is not None:
            release()


def release_all(seconds: float = 5.0) -> None:
    """Let go of whatever this process holds, before `os._exit`, which runs no `finally`; a store that hangs is not waited for."""

    def each() -> None:
        while _releases:
            with contextlib.suppress(Exception):  # the others are to be let go too
                _releases.popitem()[1]()

    thread = threading.Thread(target=each, name="release", daemon=True)
    thread.start()
    thread.join(seconds)


def copy_folder(source: Any, target: pathlib.Path, patterns: tuple[str, ...] = ("*",)) -> pathlib.Path:
    """Make a copy of a folder of a store on this machine that is like the store's now.

    What lies here already stays where the store still has that version of it; `<target>.json` next to the folder says which versions
    those are. What the store no longer lists goes.

    Args:
        source: the folder in the store.
        target: here.
        patterns: of the names of files that are copied.

    Returns:
        `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    noted = target.with_name(f"{target.name}.json")
    try:
        versions = json.loads(noted.read_bytes())
    except (OSError, ValueError):
        versions = {}
    versions = versions if isinstance(versions, dict) else {}
    stored = dict(_walk(source))
    for name, item in stored.items():
        if not any(fnmatch.fnmatch(item.name, pattern) for pattern in patterns):
            continue
        here, version = target / name, _version(item)
        if here.is_file() and versions.get(name) == [*version, here.stat().st_mtime_ns]:
            continue
        here.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(item, here)
        # with the copy's own time: another process may have put an older version over it meanwhile
        versions[name] = [*version, here.stat().st_mtime_ns]
        write_atomic(noted, json.dumps(versions))
    for path in target.rglob("*"):
        name = path.relative_to(target).as_posix()
        # what begins with a dot and is not ours may be another process's copy on its way
        if name not in stored and path.is_file() and (name in versions or not path.name.startswith(".")):
            path.unlink(missing_ok=True)
    return target


def _walk(folder: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(name below the folder, path) of every file in it, in the order of their names."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _walk(item, f"{above}{item.name}/")
        else:
            yield f"{above}{item.name}", item


def _version(item: Any) -> list[Any]:
    """What differs between two contents of an object: its size and when it was written, or what else its store says of it."""
    stat = item.stat()
    if stat.mtime:
        return [stat.length, stat.mtime]
    from fsspec.core import url_to_fs

    # epath knows no times of this store (s3 and az): all that there is to know, with tag and date
    system, path = url_to_fs(os.fspath(item))
    return [stat.length, system.ukey(path)]


def _copy_file(item: Any, target: pathlib.Path) -> None:
    handle, part = tempfile.mkstemp(prefix=f".{item.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file, item.open("rb") as stored:
            while block := stored.read(1 << 24):
                file.write(block)
        os.replace(part, target)
    except BaseException:
        pathlib.Path(part).unlink(missing_ok=True)
        raise
