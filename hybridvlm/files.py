"""Files that several processes share: a lock on a folder that names its holder, and JSON that means one thing only."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import os
import pathlib
import shlex
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from hybridvlm.plain import shown
from hybridvlm.storage import BEAT, SILENCE, as_path, is_url, object_lock, released

LOCK = ".lock"


class FolderBusy(RuntimeError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def folder_lock(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold a folder (made where it is missing) for one run; of a run of several processes the first one alone calls this.

    The file `.lock` in it names the holder. A lock whose process is gone is taken over: one of this machine at once, one of
    another machine where it has given no sign of life for ten minutes. Of a folder in a store, see `storage.object_lock`.

    Args:
        path: the folder.
        what: what the run is, such as "an evaluation", for whoever finds the folder held.

    Raises:
        FolderBusy: somebody else is at work in there; the message says who, since when, and the way out.
    """
    if is_url(path):
        folder = as_path(path)
        mine = _holder(what, uuid.uuid4().hex)
        with object_lock(
            folder / LOCK, mine, FolderBusy, lambda held: held.get("host") == _machine() and _stale(held, 0)
        ):
            yield
        return
    folder = pathlib.Path(path)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock, token = folder / LOCK, uuid.uuid4().hex
    _take(lock, _holder(what, token))
    done = threading.Event()
    beat = threading.Thread(target=_live, args=(lock, token, done), name="folder-lock", daemon=True)
    beat.start()

    def release() -> None:
        done.set()
        beat.join()
        if _read(lock).get("token") == token:
            lock.unlink(missing_ok=True)
        if made:  # a run that came to nothing leaves no empty folder
            with contextlib.suppress(OSError):
                folder.rmdir()

    with released(release):
        yield


def _holder(what: str, token: str) -> dict[str, Any]:
    return {
        "what": what,
        "host": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
        "token": token,
    }


def _take(lock: pathlib.Path, holder: dict[str, Any]) -> None:
    """Put the lock there whole, or raise FolderBusy."""
    handle, new = tempfile.mkstemp(prefix=f"{lock.name}.", dir=lock.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(holder, file)
        with contextlib.suppress(OSError):  # not every file system knows modes
            os.chmod(new, 0o644)
        now = os.stat(new).st_mtime  # the clock of the file system, which machines share
        for _ in range(20):
            try:
                _place(new, lock)
                return
            except FileExistsError:
                if _take_over(lock, new, now):
                    return
        raise FolderBusy(f"{lock.parent}: others take its lock again and again; give another folder")
    finally:
        pathlib.Path(new).unlink(missing_ok=True)


def _place(new: str, lock: pathlib.Path) -> None:
    """Put what is in `new` at `lock`; FileExistsError where something stands there."""
    try:
        # a link is made whole or not at all, and never over what stands there
        os.link(new, lock)
        return
    except FileExistsError:
        raise
    except OSError:  # exFAT, and folders of another machine, know no links
        pass
    data = pathlib.Path(new).read_bytes()
    handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError:
        lock.unlink(missing_ok=True)
        raise


def _take_over(lock: pathlib.Path, new: str, now: float) -> bool:
    """Put `new` instead of a stale lock: False where it has meanwhile gone, or was another's to replace."""
    try:
        with open(lock, "rb") as file, _alone(file.fileno()):
            stat = os.fstat(file.fileno())
            held = _read(lock)
            if not os.path.samestat(stat, os.stat(lock)):
                return False
            if not _stale(held, now - stat.st_mtime):
                raise FolderBusy(_busy(lock, held))
            os.replace(new, lock)
            return True
    except FileNotFoundError:
        # a link to nowhere is no file, and stands there all the same
        if lock.is_symlink():
            raise FolderBusy(_busy(lock, {})) from None
        return False
    except (IsADirectoryError, PermissionError):
        raise FolderBusy(_busy(lock, _read(lock))) from None


@contextlib.contextmanager
def _alone(handle: int) -> Iterator[None]:
    """Of several that find the same stale lock, one at a time; where the file system knows such a thing."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    yield  # closing the file lets go


def _stale(held: dict[str, Any], silent: float) -> bool:
    if held and held["host"] == _machine():
        born = _born(held["pid"])
        # numbers of processes are used again: then the start is another one
        return not runs(held["pid"]) or (None not in (born, held.get("born")) and born != held["born"])
    return silent > SILENCE


def _busy(lock: pathlib.Path, held: dict[str, Any]) -> str:
    if not held:
        return f"{lock.parent} is held by an unknown process; if none works in there, remove {lock}"
    host = held["host"].split()[0]
    return (
        f"{lock.parent} is in use: {held.get('what')} (process {held['pid']} on {host}, since {held.get('since')}: "
        f"{held.get('command')}); wait for it, choose another folder, or, if it no longer runs, remove {lock}"
    )


def _live(lock: pathlib.Path, token: str, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            if _read(lock).get("token") == token:
                os.utime(lock)


def _read(lock: pathlib.Path) -> dict[str, Any]:
    """The holder that a lock names; {} for one that names none: the process is unknown then."""
    try:
        held = parse_json(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(held, dict) or not isinstance(held.get("host"), str) or not held["host"].strip():
        return {}
    known = type(held.get("pid")) is int and 0 < held["pid"] < 1 << 31
    return held if known else {}


def _machine() -> str:
    """This machine, and the world of process numbers on it: containers may share a name and not their numbers."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _born(process: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks; None where that cannot be told."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def runs(process: int) -> bool:
    """Whether a process of this machine is there; a number that no process has is none."""
    if not 0 < process < 1 << 31:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def parse_json(text: str | bytes) -> Any:
    """A JSON document, with or without a byte-order mark. ValueError for one that is none, or names a key of an object twice."""
    data = text.encode() if isinstance(text, str) else text
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except MemoryError:
        raise ValueError("too large for the memory there is") from None


def parse_object(data: str | bytes) -> dict[str, Any]:
    """A JSON document that is one object. ValueError for anything else."""
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError(f"not an object but {shown(found)}")
    return found


def read_object(path: pathlib.Path, error: type[ValueError] = ValueError, what: str = "JSON") -> dict[str, Any]:
    """The object that a JSON file holds; `error`, which says that the file is not `what`, for anything else.

    FileNotFoundError if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        return parse_object(path.read_bytes())
    except ValueError as wrong:
        raise error(f"{path} is not {what}: {wrong}") from wrong


def json_rows(path: pathlib.Path) -> Iterator[tuple[int, str, Callable[[], Any]]]:
    """(number, position for messages, function that parses it) of every entry of a JSONL file, or of one JSON array.

    Raises:
        ValueError: the file begins and ends as an array and is none; the functions raise it for a line that is no JSON.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.lstrip().startswith(b"["):
        try:
            listed = parse_json(data)
        except ValueError as error:
            if data.strip().endswith(b"]"):  # one array, and no lines
                raise ValueError(f"{path} is no JSON array, as which it begins and ends: {error}") from None
        else:
            yield from ((number, f"entry {number}", lambda row=row: row) for number, row in enumerate(listed, 1))
            return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, f"line {number}", functools.partial(parse_json, line)


def text_problem(value: Any) -> str | None:
    """What is wrong with the texts of a JSON value: half a surrogate pair is no text, and no tokenizer takes it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{value[error.start]!r} is half a surrogate pair, and no character: {value!a:.80}"
        return None
    parts = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else []
    return next((problem for part in parts if (problem := text_problem(part))), None)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        found[key] = value
    return found
