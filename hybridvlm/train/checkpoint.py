"""Checkpoints of a running training (Orbax): weights, optimizer, average, the data's position, and what makes a run that run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm import distributed
from hybridvlm.models.names import flatten, unflatten
from hybridvlm.train.config import FREE, Checkpointing, TrainConfig
from hybridvlm.train.step import State

NOTE, FOLDER = "run.json", "checkpoints"


class OtherRun(ValueError):
    """The run folder belongs to a run of another config or other start weights."""


def claim(folder: pathlib.Path, config: TrainConfig, start: dict[str, str]) -> None:
    """Make `folder` that of this run, or see that it is; OtherRun names the first field that differs.

    start: what the run began with and the config does not say, checksums of weights and samples.
    """
    from hybridvlm.config import to_dict

    own = {name: value for name, value in to_dict(config).items() if name not in FREE} | start
    own = json.loads(json.dumps(own))
    note = folder / NOTE
    if note.is_file():
        try:
            held = json.loads(note.read_text())
        except ValueError as error:
            raise OtherRun(f"{note} cannot be read ({error}); remove the folder or choose another output") from None
        different = _paths(own, held)
        if different:
            path, mine, theirs = different[0]
            raise OtherRun(
                f"{folder} holds a run with {path} = {theirs!r}, this config says {mine!r} "
                f"({len(different)} fields differ); remove the folder or choose another output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{NOTE}.part"
    part.write_text(json.dumps(own, indent=1) + "\n")
    part.replace(note)


def _paths(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found for key in sorted({*a, *b}) for found in _paths(a.get(key), b.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if a == b else [(at, a, b)]


def checksum(params: Any) -> str:
    """A short text that changes with any weight, and not with the mesh that they lie on: of sums of their bits, whole numbers."""

    def bits(a: jax.Array) -> jax.Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(a, kind), dtype=jnp.uint32)

    sums = jax.device_get(jax.jit(lambda flat: {path: bits(a) for path, a in flat.items()})(dict(flatten(params))))
    told = {path: int(value) for path, value in sorted(sums.items())}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _tree(state: State) -> dict[str, Any]:
    """The state as Orbax keeps it: parameters by their paths, the optimizer's arrays by number."""
    leaves = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    tree = {"train": unflatten(state.train), "optimizer": leaves}
    return tree | ({"ema": unflatten(state.ema)} if state.ema else {})


class Checkpoints:
    """The checkpoints of a run folder, each whole or not there, by the number of steps done."""

    def __init__(self, folder: pathlib.Path, options: Checkpointing):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        kept = [policies.LatestN(options.keep)]
        if options.keep_every:
            kept.append(policies.EveryNSteps(options.keep_every))
        self._ocp = ocp
        self.manager = ocp.CheckpointManager(
            (folder / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                # the loop says when: at its own interval, at the end, and when it is told to stop
                save_decision_policy=policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                enable_async_checkpointing=options.asynchronous,
                cleanup_tmp_directories=True,  # what a killed run or a full disk left half done
            ),
        )

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, one under way included; None if there is none."""
        return self.manager.latest_step()

    def whole(self) -> int | None:
        """Steps done at the newest checkpoint on disk, once what is under way has ended, well or badly."""
        with contextlib.suppress(Exception):
            self.wait()
        self.manager.reload()
        return self.manager.latest_step()

    def save(self, step: int, state: State, about: dict[str, Any]) -> None:
        """Start to keep the state after `step` steps with `about` (JSON; of this process)."""
        if step in self.manager.all_steps():
            return
        processes = [json.loads(text) for text in distributed.gather(json.dumps(about).encode())]
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(_tree(state)),
            about=self._ocp.args.JsonSave({"processes": processes}),
        )
        self.manager.save(step, args=args)

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """(state, about) after `step` steps; arrays go where those of `like` lie, which may be another mesh than they came from."""

        def target(a: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)

        abstract = jax.tree.map(target, _tree(like))
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(abstract), about=self._ocp.args.JsonRestore()
        )
        held = self.manager.restore(step, args=args)
        tree, processes = held["state"], held["about"]["processes"]
        if len(processes) != jax.process_count():
            raise ValueError(
                f"the checkpoint of step {step} holds the data's position of {len(processes)} processes, and this run has "
                f"{jax.process_count()}: start it with as many"
            )
        leaves = [tree["optimizer"][key] for key in sorted(tree["optimizer"])]
        inner = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
        ema = dict(flatten(tree["ema"])) if like.ema else {}
        return State(dict(flatten(tree["train"])), inner, ema), processes[jax.process_index()]

    def wait(self) -> None:
        """Until everything is on disk; raises what went wrong there."""
        self.manager.wait_until_finished()

    def check(self) -> None:
        """Raise what went wrong with a save that has ended; one that is under way is left alone."""
        if not self.manager.is_saving_in_progress():
            self.manager.wait_until_finished()  # at once; `check_for_errors` does not hear of a save that failed at the end

    def preempted(self, step: int) -> bool:
        """Whether any process was told to stop (of several processes, which must agree on the step)."""
        return jax.process_count() > 1 and self.manager.reached_preemption(step)

    def close(self) -> None:
        self.manager.close()
