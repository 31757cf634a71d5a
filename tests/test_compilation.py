"""Where compiled programs are kept, and that a second start compiles nothing that the first one did."""

import json
import os
import subprocess
import sys

import jax
import pytest
from helpers.object_store import OBJECTS

from hybridvlm import compilation
from hybridvlm.checkpoints.names import resolve
from hybridvlm.compilation import keep_compiled

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_compilation_cache_max_size",
    "jax_raise_persistent_cache_errors",
)


@pytest.fixture(autouse=True)
def settings():
    """JAX's settings as outside of tests, and afterwards as they were; nothing is compiled in between."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_one_of_the_users_cache_for_this_kind_of_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_compiled()
    assert folder.parent == tmp_path / "hybridvlm" / "compiled" and folder.is_dir() and not list(folder.iterdir())
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification calls invalid
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compilation.cache_home() == tmp_path / "home" / ".cache"


def test_a_home_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert keep_compiled() is None and jax.config.values["jax_compilation_cache_dir"] is None
    with pytest.raises(ValueError, match=r"--compilation-cache .* cannot be written"):
        keep_compiled(str(tmp_path / "home" / "cache"))


def test_what_jax_was_told_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert keep_compiled() == tmp_path / "mine" and not (tmp_path / "cache").exists()
    assert keep_compiled(str(tmp_path / "asked")) == tmp_path / "asked"
    assert keep_compiled("off") is None and jax.config.values["jax_enable_compilation_cache"] is False
    assert keep_compiled(str(tmp_path / "never")) is None and not (tmp_path / "never").exists()


def test_a_user_without_a_home_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    # what it gives with neither HOME nor an entry among the system's users
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert compilation.cache_home() is None and keep_compiled() is None
    with pytest.raises(ValueError, match=r"--compilation-cache ~/cc: .*home.*give a folder without ~"):
        keep_compiled("~/cc")
    OBJECTS["fake://b/ckpt/a.safetensors"] = b"a"
    assert (resolve("fake://b/ckpt") / "a.safetensors").read_bytes() == b"a"
    assert not list(tmp_path.iterdir())


def test_a_folder_of_a_store_is_passed_on_to_jax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert keep_compiled("fake://b/cc") == "fake://b/cc" == jax.config.values["jax_compilation_cache_dir"]
    assert jax.config.values["jax_compilation_cache_max_size"] == -1
    assert keep_compiled() == "fake://b/cc" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="takes the package gcsfs"):
        keep_compiled("gs://bucket/cc")


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew(tmp_path):
    code = """
import json, sys
from hybridvlm.compilation import keep_compiled
keep_compiled(sys.argv[1])
import jax, numpy as np
from hybridvlm.inference.model import load
hits, misses = [], []
jax.monitoring.register_event_listener(
    lambda event, **_: {"/jax/compilation_cache/cache_hits": hits, "/jax/compilation_cache/cache_misses": misses}
    .get(event, []).append(event)
)
model = load("tiny")
frames = np.zeros((4, 128, 128, 3), np.uint8)
answer = model.ask(frames, "red@t01 none what ?", frames=4, max_new=1)
print(json.dumps([len(hits), len(misses), answer.text]))
"""
    env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    found = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=500
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(json.loads(run.stdout.splitlines()[-1]))
    (_, stored, text), (hits, missed, again) = found
    # whatever took long enough to be kept is read, and not compiled again
    assert stored > 0 and (hits, missed) == (stored, 0) and text == again
