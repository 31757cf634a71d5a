"""JAX's persistent compilation cache for the commands: what was compiled once is read from a folder at the next start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile

import jax

from hybridvlm.storage import as_path, is_url

OFF = "off"
LEAST_SECONDS = 0.3  # of compilation, for a program to be kept
MOST_BYTES = 8 << 30  # of all that is kept; what was not used for longest goes first


def keep_compiled(folder: str = "") -> pathlib.Path | str | None:
    """Keep compiled programs in a folder, and read those that are there. Call it before anything is compiled.

    A folder that cannot be written, as in a read-only home, is left alone: everything is compiled, as without a cache. Where JAX has
    been told of a folder already (JAX_COMPILATION_CACHE_DIR, or `jax.config`), that one stays; JAX_ENABLE_COMPILATION_CACHE=false is
    obeyed.

    A folder of a store (gs://bucket/folder) is JAX's to read and write, and keeps all that is put there.

    Args:
        folder: where; "off" for nowhere (default: `hybridvlm/compiled` in the user's cache folder, for each kind of machine).

    Returns:
        The folder in use, None for none.

    Raises:
        ValueError: a folder that was asked for cannot be written, or lies in a store that nothing here can read.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    told = jax.config.values["jax_compilation_cache_dir"]
    if not folder and told:
        return told if is_url(told) else pathlib.Path(told)
    wanted = _wanted(folder)
    if wanted is None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(wanted))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # what makes room holds a lock of the file system meanwhile, which a store has none of
    jax.config.update("jax_compilation_cache_max_size", -1 if is_url(wanted) else MOST_BYTES)
    # an entry that cannot be read or written costs a compilation, and never the run
    jax.config.update("jax_raise_persistent_cache_errors", False)
    return wanted


def _wanted(folder: str) -> pathlib.Path | str | None:
    """The folder to keep programs in, made where it is missing; None where the user's own cache folder cannot be written."""
    if is_url(folder):
        as_path(folder)  # refuses what nothing here can read
        return folder
    home = cache_home()
    try:
        if folder:
            wanted = pathlib.Path(folder).expanduser()
        elif home is not None:
            wanted = home / "hybridvlm" / "compiled" / _machine()
        else:
            return None
    except RuntimeError as error:  # ~ of somebody who has no home
        raise ValueError(f"--compilation-cache {folder}: {error}; give a folder without ~, or off") from None
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            pass
    except OSError as error:
        if folder:
            raise ValueError(f"--compilation-cache {folder} cannot be written: {error.strerror or error}") from None
        return None
    return wanted


def cache_home() -> pathlib.Path | None:
    """The user's cache folder, as the XDG specification has it; None for a user who has no home."""
    named, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(named):
        return pathlib.Path(named)
    return pathlib.Path(home) / ".cache" if os.path.isabs(home) else None


def _machine() -> str:
    """A name for this kind of machine: programs for a CPU use what it has, and a home may be shared with an older one."""
    kind = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        kind += " ".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return hashlib.sha256(kind.encode()).hexdigest()[:12]
