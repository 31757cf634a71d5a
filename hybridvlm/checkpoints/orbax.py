"""Orbax folders: a model converted once, restored onto any mesh.

`model.json` says what it is (family, config, sections, what it was made from), `params` is Orbax's own, and the tokenizer's
files lie next to them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.checkpoints.atomic import whole_folder
from hybridvlm.checkpoints.hf import ShardingFor, read_json
from hybridvlm.errors import CheckpointError
from hybridvlm.models.weights import FLOAT32, flatten, unflatten
from hybridvlm.plain import shown

ABOUT, PARAMS, FORMAT, VERSION = "model.json", "params", "hybridvlm-orbax", 1


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder was written by `save_orbax`."""
    return (path / ABOUT).is_file()


def save_orbax(
    path: str | pathlib.Path, params: dict[str, Any], about: dict[str, Any], tokenizer: Any = None
) -> pathlib.Path:
    """Write parameters, as they are sharded, with `about` (JSON) and the tokenizer; whole or not at all."""
    import orbax.checkpoint as ocp

    path = pathlib.Path(path).absolute()
    if jax.process_count() > 1:
        raise ValueError("save_orbax writes from one process; on several hosts convert on one and restore on all")
    with whole_folder(path, is_orbax) as new:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(new / PARAMS, params)
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer.json")
        (new / ABOUT).write_text(json.dumps({"format": FORMAT, "version": VERSION, **about}, indent=1) + "\n")
    return path


def read_about(path: pathlib.Path) -> dict[str, Any]:
    """What a folder says of itself; CheckpointError if it is not of this form."""
    about = read_json(path / ABOUT)
    version = about.get("version")
    if about.get("format") != FORMAT or type(version) is not int or version != VERSION:
        found = f"format {shown(about.get('format'))} version {shown(version)}"
        raise CheckpointError(f"{path / ABOUT} has {found}; this library reads {FORMAT!r} version {VERSION}")
    return about


def held_arrays(path: pathlib.Path) -> dict[str, Any]:
    """Shape and dtype of every array of a folder, by flat name, without reading them; {} where its arrays are not there."""
    import orbax.checkpoint as ocp

    path = path.absolute()
    if not (path / PARAMS).is_dir():
        return {}
    with ocp.StandardCheckpointer() as checkpointer:
        return flatten(dict(checkpointer.metadata(path / PARAMS).item_metadata))


def restore_orbax(
    path: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    *,
    dtype: Any = None,
    sharding_for: ShardingFor | None = None,
) -> dict[str, Any]:
    """Parameters of a folder, straight to where `position` puts them (default: the default device).

    shapes: of every array, by flat name, as the config has them. dtype: of all but the leaves in `names.FLOAT32`
    (default: as saved). CheckpointError lists what does not fit.
    """
    import orbax.checkpoint as ocp

    path = path.absolute()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    held = held_arrays(path)
    with ocp.StandardCheckpointer() as checkpointer:
        wrong = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in held]
        wrong += [f"no parameter for: {name}" for name in held if name not in shapes]
        wrong += [
            f"wrong shape: {name} should be {shape}, is {tuple(held[name].shape)}"
            for name, shape in shapes.items()
            if name in held and tuple(held[name].shape) != shape
        ]
        if wrong:
            lines = "\n  ".join(wrong)
            raise CheckpointError(f"{path} does not fit its config:\n  {lines}")

        def target(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            keep = name.rsplit("/", 1)[-1] in FLOAT32
            kind = held[name].dtype if keep or dtype is None else jnp.dtype(dtype)
            return jax.ShapeDtypeStruct(
                shape, kind, sharding=here if sharding_for is None else sharding_for(name, shape)
            )

        params = checkpointer.restore(path / PARAMS, unflatten({n: target(n, s) for n, s in shapes.items()}))
    for name, leaf in flatten(params).items():
        if not bool(_finite(leaf)):
            raise CheckpointError(
                f"{path}: {name} holds values that are not finite (NaN or infinity)"
                + ("" if dtype is None else f", or that {jnp.dtype(dtype)} has no room for")
            )
    return params


_finite = jax.jit(lambda x: jnp.isfinite(x).all())
