"""Where a checkpoint is found: a packaged name, a folder, or an id of the Hugging Face hub."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import pathlib
import re
import shutil
import tempfile

from hybridvlm.checkpoints.hf import CONFIG
from hybridvlm.compilation import cache_home
from hybridvlm.storage import as_path, copy_folder, is_url

_DATA = pathlib.Path(__file__).parent.parent / "tiny" / "data"


PACKAGED = {name: _DATA / name for name in ("tiny", "tiny-reduced", "tiny-vamba")}


SETTINGS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
)  # in the folder of the weights


DOWNLOADED = ("*.json", "*.safetensors", "*.jinja")  # nothing else of a repository is fetched, and no code


def resolve(
    name_or_path: str | os.PathLike[str], revision: str | None = None, patterns: tuple[str, ...] = DOWNLOADED
) -> pathlib.Path:
    """The folder of a packaged name (`tiny`, `tiny-reduced`, `tiny-vamba`), a path, or an id of the Hugging Face hub ("owner/name").

    Of the hub, `revision` (a commit, tag or branch) is fetched unless it is there already, of it the files of `patterns`;
    HF_HUB_OFFLINE=1 asks nobody. A folder of a store (gs://bucket/folder) is copied to this machine, into the user's cache folder.
    FileNotFoundError names what there is.
    """
    if is_url(name_or_path):
        return _copy(os.fspath(name_or_path), patterns)
    packaged = PACKAGED.get(str(name_or_path))
    path = packaged or pathlib.Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} goes with an id of the hub, and {path} is a folder")
        return path
    name = str(name_or_path)
    if packaged is None and isinstance(name_or_path, str) and not _is_path(name):
        return _download(name, revision, patterns)
    known = ", ".join(PACKAGED)
    what = "is packaged but not installed" if packaged else "is no folder here, and no packaged name"
    if path.is_file():
        what = "is a file; give the checkpoint's folder"
    raise FileNotFoundError(
        f"{name!r} {what} (packaged: {known}; or the path of a folder with {CONFIG}, or owner/name on the hub)"
    )


# where people keep their own: "runs/tiny" is a folder that is missing, and asked of nobody
LOCAL = frozenset(
    (
        "runs",
        "run",
        "results",
        "checkpoints",
        "checkpoint",
        "ckpt",
        "ckpts",
        "models",
        "model",
        "weights",
        "outputs",
        "output",
    )
    + ("out", "data", "tmp", "cache", "experiments", "exp", "logs", "work", "saved", "build", "dist", "tests")
)


def _is_path(name: str) -> bool:
    """Whether a name that is no folder can only be meant as one: anything but owner/name as the hub has them, or below a folder
    that is here or that is called as such folders are."""
    owner, _, rest = name.partition("/")
    plain = re.fullmatch(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?", owner, re.ASCII) and re.fullmatch(
        r"[\w.-]+", rest, re.ASCII
    )
    return not plain or set(rest) <= {"."} or owner.lower() in LOCAL or pathlib.Path(owner).exists()


def _copy(url: str, patterns: tuple[str, ...]) -> pathlib.Path:
    """The copy on this machine of a checkpoint in a store: of a whole one all there is, else the files of `patterns`."""
    stored = as_path(url.rstrip("/"))
    if not stored.is_dir():
        raise FileNotFoundError(f"{url} is no folder of that store, or may not be read")
    name = f"{stored.name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"
    home = cache_home()
    kept = _while_running() if home is None else home / "hybridvlm" / "checkpoints"
    return copy_folder(stored, kept / name, ("*",) if patterns == DOWNLOADED else patterns)


@functools.cache
def _while_running() -> pathlib.Path:
    """A folder for the copies of a user who has no home, removed at the end of this process."""
    folder = tempfile.mkdtemp(prefix="hybridvlm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name!r} is no folder here, and could not be had from the hub{at}: {(str(error) or 'no answer').splitlines()[0]}"
        ) from error
