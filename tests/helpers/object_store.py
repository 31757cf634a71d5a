"""A store of whole objects under "fake://", as `etils.epath` finds it: no renaming, no adding to, no making of folders."""

import io
import pathlib
import types

from etils import epath

OBJECTS: dict[str, bytes] = {}
WRITES: list[str] = []
TIMES: dict[str, int] = {}  # when an object was written, of those of which that matters


class Refused(AssertionError):
    """Something that such a store cannot do."""


@epath.register_path_cls("fake://")
class FakePath(pathlib.PurePosixPath):
    """The path of an object, or of a folder: what begins alike."""

    def __new__(cls, *parts):
        text = "/".join(str(part) for part in parts)
        return super().__new__(cls, text.replace("fake://", "/fake/"))

    if hasattr(pathlib.PurePath, "with_segments"):  # Python 3.12

        def __init__(self, *parts):
            super().__init__("/".join(str(part) for part in parts).replace("fake://", "/fake/"))

    def __fspath__(self):
        return str(self)

    def __str__(self):
        return super().__str__().replace("/fake/", "fake://", 1)

    def exists(self):
        return self.is_file() or self.is_dir()

    def is_file(self):
        return str(self) in OBJECTS

    def is_dir(self):
        return any(name.startswith(f"{self}/") for name in OBJECTS)

    def iterdir(self):
        inside = {name[len(str(self)) + 1 :].split("/")[0] for name in OBJECTS if name.startswith(f"{self}/")}
        return iter([self / name for name in inside])

    def glob(self, pattern):
        return (path for path in self.iterdir() if path.match(pattern))

    def stat(self):
        return types.SimpleNamespace(length=len(self.read_bytes()), mtime=TIMES.get(str(self), 1))

    def read_bytes(self):
        if not self.is_file():
            raise FileNotFoundError(str(self))
        return OBJECTS[str(self)]

    def write_bytes(self, data):
        WRITES.append(str(self))
        OBJECTS[str(self)] = bytes(data)

    def open(self, mode="r"):
        if mode != "rb":
            raise Refused(f"open {mode}")
        return io.BytesIO(self.read_bytes())

    def unlink(self, missing_ok=False):
        if OBJECTS.pop(str(self), None) is None and not missing_ok:
            raise FileNotFoundError(str(self))

    def mkdir(self, parents=False, exist_ok=False):
        raise Refused("mkdir")

    def rename(self, target):
        raise Refused("rename")

    replace = rename
