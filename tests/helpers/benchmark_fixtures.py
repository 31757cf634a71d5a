"""The fixtures of published benchmarks by name: `make(name, folder)`, once a test session and process."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile

from helpers.benchmark_files import Row
from helpers.benchmark_fixtures_long import longvideobench, lvbench, videomme
from helpers.benchmark_fixtures_mlvu import egoschema, mlvu, mlvu_test, nextqa
from helpers.benchmark_fixtures_short import hourvideo, mvbench, perceptiontest, tempcompass

MAKERS = {
    maker.__name__: maker
    for maker in (
        videomme, longvideobench, lvbench, mlvu, mlvu_test, egoschema, nextqa, mvbench, hourvideo, tempcompass, perceptiontest,
    )
}  # fmt: skip
# task -> fixture and split
TASKS = {
    "videomme": ("videomme", "test"),
    "videomme-subs": ("videomme", "test"),
    "longvideobench": ("longvideobench", "val"),
    "longvideobench-test": ("longvideobench", "test"),
    "lvbench": ("lvbench", "test"),
    "mlvu": ("mlvu", "dev"),
    "mlvu-test": ("mlvu_test", "test"),
    "egoschema": ("egoschema", "full"),
    "egoschema-subset": ("egoschema", "full"),
    "nextqa": ("nextqa", "test"),
    "nextqa-val": ("nextqa", "val"),
    "mvbench": ("mvbench", "test"),
    "hourvideo": ("hourvideo", "dev"),
    "tempcompass": ("tempcompass", "multi-choice"),
    "perceptiontest": ("perceptiontest", "valid"),
}


def make(name: str, folder: pathlib.Path) -> Row:
    """Write a fixture below a folder; returns what its expected.json holds."""
    root = folder / name
    if not root.exists():
        root.mkdir(parents=True)
        MAKERS[name](root)
    return json.loads((root / "expected.json").read_text(encoding="utf-8"))


@functools.cache
def home() -> pathlib.Path:
    """A folder for the fixtures of this process."""
    _held.append(tempfile.TemporaryDirectory(prefix="benchmarks-"))
    return pathlib.Path(_held[-1].name)


_held: list[tempfile.TemporaryDirectory] = []


def fixture(name: str) -> tuple[pathlib.Path, Row]:
    """(folder, expectations) of a fixture that nobody changes."""
    return home() / name, make(name, home())
