"""Where a benchmark lies below a folder: its marker file, its videos, and archives that nobody has unpacked.

Nothing is downloaded or unpacked. A folder may be the benchmark's own, one that holds it, a snapshot of the Hugging Face
hub (links into blobs/), or a whole HF_HOME, where the harness keeps the videos beside hub/.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import shlex
import zipfile
from collections.abc import Iterator, Sequence

from hybridvlm.eval.benchmarks import tables
from hybridvlm.options import InputError

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
DEPTH = 6  # folders below the given one in which a marker may lie: HF_HOME/hub/datasets--X/snapshots/REV/PART
CROWDED = 500  # folders in one folder, from which it is taken to hold frames and is not searched
_SKIP = {"blobs", "refs", "__MACOSX"}


@dataclasses.dataclass(frozen=True)
class Marker:
    """A file that shows where a benchmark lies.

    Attributes:
        pattern: path of the file below the benchmark's folder, may hold `*`.
        kind: name of the layout.
        columns: what a parquet, CSV or TSV file must have, since benchmarks share file names.
        beside: a file or folder that must be there too.
    """

    pattern: str
    kind: str
    columns: tuple[str, ...] = ()
    beside: str = ""

    def match(self, folder: pathlib.Path) -> pathlib.Path | None:
        """The marker file in a folder."""
        if self.beside and not (folder / self.beside).exists():
            return None
        for path in self._paths(folder):
            if path.is_file() and set(self.columns) <= _columns(path, bool(self.columns)):
                return path
        return None

    def unread(self, folder: pathlib.Path) -> str:
        """What is wrong with a file of this name in a folder that cannot be read as what it is, "" where there is none."""
        for path in self._paths(folder):
            if path.is_symlink() and not path.exists():
                return f"{path} is a link that leads nowhere"
            if path.is_file() and (damage := _damage(path)):
                return f"{path} is there but {damage}"
        return ""

    def _paths(self, folder: pathlib.Path) -> list[pathlib.Path]:
        return sorted(folder.glob(self.pattern)) if "*" in self.pattern else [folder / self.pattern]


def _damage(path: pathlib.Path) -> str:
    """Why a table cannot be read, "" where it can."""
    if told := tables.stub(path):
        return told
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            pyarrow.parquet.read_schema(path)
        except (OSError, ValueError):
            return "is no parquet file; is the download complete?"
    return ""


def _columns(path: pathlib.Path, needed: bool) -> set[str]:
    if not needed:
        return set()
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return set(pyarrow.parquet.read_schema(path).names)
        with open(path, encoding="utf-8-sig", newline="") as file:
            return set(next(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","), []))
    except (OSError, ValueError, csv.Error):
        return set()


def _levels(data: pathlib.Path) -> Iterator[list[pathlib.Path]]:
    """Folders from `data` down, a list per depth."""
    level = [data]
    for _ in range(DEPTH + 1):
        yield level
        below = []
        for folder in level:
            try:
                children = [p for p in folder.iterdir() if p.name not in _SKIP and p.name[0] != "." and p.is_dir()]
            except OSError:
                continue
            below += children if len(children) <= CROWDED else []
        level = sorted(below)


@dataclasses.dataclass
class Found:
    """A benchmark on disk.

    Attributes:
        data: the folder that was given.
        root: the benchmark's folder.
        marker: its file of questions.
        kind: the layout's name.
        notes: what a reader must know of it.
    """

    data: pathlib.Path
    root: pathlib.Path
    marker: pathlib.Path
    kind: str
    notes: list[str] = dataclasses.field(default_factory=list)
    _listed: dict[pathlib.Path, dict[str, pathlib.Path]] = dataclasses.field(default_factory=dict, repr=False)

    _globbed: dict[tuple[pathlib.Path, str], list[pathlib.Path]] = dataclasses.field(default_factory=dict, repr=False)

    def bases(self) -> list[pathlib.Path]:
        """Folders below which videos may lie, the nearest first."""
        found = [self.root, self.marker.parent, self.data]
        parts = self.root.parts
        if "snapshots" in parts and len(self.root.parents) > 3:
            found.append(pathlib.Path(*parts[: parts.index("snapshots")]).parent.parent)  # HF_HOME
        elif self.data != self.root:
            found += [p for p in self.root.parents if self.data in p.parents]
        return list(dict.fromkeys(found))

    def listing(self, folder: pathlib.Path) -> dict[str, pathlib.Path]:
        """Names in a folder, in lower case -> path; empty where there is no such folder."""
        if folder not in self._listed:
            try:
                self._listed[folder] = {p.name.lower(): p for p in sorted(folder.iterdir())}
            except (OSError, ValueError):  # a name that no file can have
                self._listed[folder] = {}
        return self._listed[folder]

    def file(self, name: str, folders: Sequence[str], endings: Sequence[str] = VIDEOS) -> pathlib.Path | None:
        """A file by its name, with any of the endings; upper and lower case are one.

        Args:
            name: may hold folders; with an ending or without one.
            folders: below each of `bases()`, may hold `*`.
            endings: tried in this order after the name as it is.

        Returns:
            The first one that is not empty, else an empty one, else None.
        """
        within, _, last = name.replace("\\", "/").rpartition("/")
        stem = last.rpartition(".")[0] if pathlib.PurePosixPath(last).suffix.lower() in endings else last
        names = [last.lower(), *(f"{stem}{ending}".lower() for ending in endings)]
        empty = None
        for base in self.bases():
            for folder in folders:
                for place in self._matching(base, folder):
                    listed = self.listing(place / within if within else place)
                    for wanted in names:
                        path = listed.get(wanted)
                        size = -1 if path is None else _size(path)
                        if size > 0:
                            return path
                        if size == 0:
                            empty = empty or path
        return empty

    def _matching(self, base: pathlib.Path, folder: str) -> list[pathlib.Path]:
        if "*" not in folder:
            return [base / folder]
        if (base, folder) not in self._globbed:
            self._globbed[base, folder] = sorted(base.glob(folder))
        return self._globbed[base, folder]

    def archives(self) -> list[pathlib.Path]:
        """Archives beside the marker that may hold videos or subtitles."""
        folders = [self.root, *(self.root / name for name in ("video", "videos", "subtitle"))]
        found = [p for folder in folders for p in self.listing(folder).values() if p.is_file() and _archive(p.name)]
        return list(dict.fromkeys(found))


def _size(path: pathlib.Path) -> int:
    """Bytes of a file, 1 for a folder; -1 for a link that leads nowhere, or what else cannot be looked at."""
    try:
        return 1 if path.is_dir() else path.stat().st_size
    except OSError:
        return -1


def _archive(name: str) -> bool:
    return name.endswith((".zip", ".tar", ".tar.gz")) or ".tar.part." in name


def find(data: pathlib.Path, markers: Sequence[Marker], title: str) -> Found:
    """The benchmark below a folder: the nearest marker, of several at one depth the preferred one.

    Raises:
        InputError: for a folder that is not there, or without a marker; it names them.
    """
    if str(data).startswith("gs:/"):
        raise InputError(
            f"--data {data}: copy or mount the bucket and give the local folder; videos are read by seeking"
        )
    if not data.is_dir():
        raise InputError(f"--data {data} is no folder; give the one that holds {title}")
    for level in _levels(data):
        hits = []
        for folder in level:
            for place, marker in enumerate(markers):
                path = marker.match(folder)
                if path is not None:
                    hits.append((place, folder, path, marker.kind))
        if hits:
            hits.sort(key=lambda hit: (hit[0], str(hit[1])))
            _, root, path, kind = hits[0]
            found = Found(data, root, path, kind)
            others = sorted({str(hit[2].relative_to(data)) for hit in hits if hit[2] != path})
            if others:
                found.notes.append(f"took {path.relative_to(data)}; also there: {', '.join(others)}")
            return found
    places = ((marker, folder) for level in _levels(data) for folder in level for marker in markers)
    unread = [told for marker, folder in places if (told := marker.unread(folder))]
    if unread:
        raise InputError(f"{title}: {'; '.join(dict.fromkeys(unread))}")
    names = ", ".join(dict.fromkeys(marker.pattern for marker in markers))
    raise InputError(
        f"{title}: nothing of it below {data}; looked for {names} down to {DEPTH} folders. Give --data the folder that holds "
        "one of these (the official archives unpacked, a snapshot of the hub, or HF_HOME)"
    )


def unpack_commands(archives: Sequence[pathlib.Path], root: pathlib.Path, folders: Sequence[str]) -> list[str]:
    """Shell lines that unpack archives where they lie.

    Args:
        archives: below `root`.
        root: the benchmark's folder.
        folders: below it, in which videos are looked for, the usual one first: a zip of files without a folder beside them
            goes there.
    """
    lines: dict[str, None] = {}
    for path in archives:
        folder = shlex.quote(str(path.parent))
        if ".tar.part." in path.name:
            stem = path.name.partition(".part.")[0]
            lines[f"cd {folder} && cat {shlex.quote(stem)}.part.* | tar x"] = None
        elif path.suffix == ".zip":
            into = f" -d {shlex.quote(folders[0])}" if path.parent == root and _bare(path) else ""
            lines[f"cd {folder} && unzip -n {shlex.quote('./' + path.name)}{into}"] = None
        else:
            lines[f"cd {folder} && tar xf {shlex.quote('./' + path.name)}"] = None
    return list(lines)


def _bare(path: pathlib.Path) -> bool:
    """Whether a zip holds files without a folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return bool(names) and "/" not in names[0]
