"""Visual tokens of training rows: made by the tower in every step, or cached where the tower is frozen."""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.inference.model import Model
from hybridvlm.models.weights import flatten, unflatten
from hybridvlm.vision import encode_frames


def visual(params: dict[str, Any], model: Model, given: Mapping[str, jax.Array], table: Any = None) -> jax.Array | None:
    """Visual tokens [B,F,m,D] of a batch's `visual` arrays; None where there are none.

    "pixels" [B,F,h,w,3] uint8 go through the tower; "features" [B,F,m,D] are what it gave; "cells" [B,F,16] are positions in the bank
    `table` [16,n,D] of the embedded benchmark, with "time" [B,F], the frame's number in its own video.
    """
    dtype = params["embed"].dtype
    if "features" in given:
        return given["features"].astype(dtype)
    if "pixels" in given:
        return model.family.encode(params, model.config, given["pixels"])
    if "cells" in given:
        x = table.reshape(-1, table.shape[-1])[given["cells"]]
        projector = params["projector"]
        return (x + projector["cell"] + projector["time"][given["time"]][:, :, None]).astype(dtype)
    return None


class CacheFailed(RuntimeError):
    """Features could not be kept."""


class FeatureCache:
    """What the frozen tower gives for a video, kept as one .npy file per video and choice of frames; made on first sight.

    A file is written whole or not at all, so that several processes may share the folder.
    """

    def __init__(self, folder: str | pathlib.Path, model: Model):
        self.folder, self.made = pathlib.Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {name: np.asarray(jax.device_get(a)) for name, a in flatten(model.params).items() if _of_tower(name)}
        digest = hashlib.sha256(repr((model.config.vision, str(model.params["embed"].dtype))).encode())
        for name, array in sorted(own.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).view(np.uint8).tobytes())
        self._weights, self._lock = digest.hexdigest(), threading.Lock()
        device = jax.local_devices()[0]
        # a copy on this process's own device: the run's parameters may lie on a mesh of many processes
        held = unflatten(jax.device_put(own, device))
        vision, dtype = model.config.tower, model.params["embed"].dtype
        self._encode = jax.jit(
            lambda pixels: encode_frames(
                held, vision, pixels.astype(jnp.float32) / 255, jnp.arange(len(pixels)), dtype=dtype
            )
        )

    def __call__(self, identity: str, pixels: Callable[[], np.ndarray]) -> np.ndarray:
        """Visual tokens [F,m,D] of the video called `identity`; pixels() gives its frames [F,h,w,3] where they are needed."""
        name = hashlib.sha256(f"{self._weights}:{identity}".encode()).hexdigest()[:40]
        file = self.folder / f"{name}.npy"
        try:
            return np.load(file)
        except (FileNotFoundError, ValueError, EOFError):  # not there, or cut off by a disk that failed: made again
            pass
        frames = pixels()
        with self._lock:
            made = np.asarray(self._encode(frames).astype(jnp.float32))
            self.made += 1
        made = made.astype(np.float16) if np.isfinite(made.astype(np.float16)).all() else made
        try:
            self._write(file, made)
        except OSError as error:  # no fault of the video's: it must not be passed over for it
            raise CacheFailed(f"Data.cache {self.folder} could not be written: {error}") from error
        return made

    def _write(self, file: pathlib.Path, made: np.ndarray) -> None:
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as out:
            try:
                np.save(out, made)
                out.close()
                os.replace(out.name, file)
            except BaseException:
                pathlib.Path(out.name).unlink(missing_ok=True)
                raise


def _of_tower(name: str) -> bool:
    return name.split("/")[0] in ("vision", "projector")
