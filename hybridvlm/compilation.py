"""JAX's persistent compilation cache for the commands: what was compiled once is read from a folder at the next start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile

import jax

OFF = "off"
LEAST_SECONDS = 0.3  # of compilation, for a program to be kept
MOST_BYTES = 8 << 30  # of all that is kept; what was not used for longest goes first


def keep_compiled(folder: str = "") -> pathlib.Path | None:
    """Keep compiled programs in a folder, and read those that are there. Call it before anything is compiled.

    A folder that cannot be written, as in a read-only home, is left alone: everything is compiled, as without a cache. Where JAX has
    been told of a folder already (JAX_COMPILATION_CACHE_DIR, or `jax.config`), that one stays; JAX_ENABLE_COMPILATION_CACHE=false is
    obeyed.

    Args:
        folder: where; "off" for nowhere (default: `hybridvlm/compiled` in the user's cache folder, for each kind of machine).

    Returns:
        The folder in use, None for none.

    Raises:
        ValueError: a folder that was asked for cannot be written.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    told = jax.config.values["jax_compilation_cache_dir"]
    if not folder and told:
        return pathlib.Path(told)
    wanted = pathlib.Path(folder).expanduser() if folder else cache_home() / "hybridvlm" / "compiled" / _machine()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            pass
    except OSError as error:
        if folder:
            raise ValueError(f"--compilation-cache {folder} cannot be written: {error.strerror or error}") from None
        return None
    jax.config.update("jax_compilation_cache_dir", str(wanted))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # an entry that cannot be read or written costs a compilation, and never the run
    jax.config.update("jax_raise_persistent_cache_errors", False)
    return wanted


def cache_home() -> pathlib.Path:
    """The user's cache folder, as the XDG specification has it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return pathlib.Path(named) if os.path.isabs(named) else pathlib.Path(os.path.expanduser("~")) / ".cache"


def _machine() -> str:
    """A name for this kind of machine: programs for a CPU use what it has, and a home may be shared with an older one."""
    kind = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        kind += " ".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return hashlib.sha256(kind.encode()).hexdigest()[:12]
