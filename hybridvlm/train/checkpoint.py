"""Checkpoints of a running training (Orbax): weights, optimizer, average, the data's position, and what makes a run that run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from hybridvlm import distributed
from hybridvlm.checkpoints.steps import FOLDER, Steps
from hybridvlm.files import parse_json
from hybridvlm.models.weights import flatten, unflatten
from hybridvlm.train.config import FREE, Checkpointing, TrainConfig
from hybridvlm.train.step import State

NOTE = "run.json"


class OtherRun(ValueError):
    """The run folder belongs to a run of another config or other start weights."""


def check_run_dir(folder: pathlib.Path, config: TrainConfig, start: dict[str, str], *, write: bool = True) -> None:
    """Make `folder` that of this run, or see that it is.

    Args:
        folder: the run's folder.
        config: what the run is told.
        start: what the run began with and the config does not say, checksums of weights and samples.
        write: whether to leave a note there; else the folder is only looked at.

    Raises:
        OtherRun: it holds another run; the message names the first field that differs.
    """
    from hybridvlm.config import to_dict

    own = {name: value for name, value in to_dict(config).items() if name not in FREE} | start
    own = json.loads(json.dumps(own))
    note = folder / NOTE
    held = None
    if note.is_file():
        try:
            held = parse_json(note.read_bytes())
        except ValueError as error:
            raise OtherRun(f"{note} cannot be read ({error}); remove the folder or choose another output") from None
        different = _paths(own, held)
        if [path for path, *_ in different] == ["steps"]:
            if steps_matter(config, held["steps"]):
                raise OtherRun(_other_steps(folder, config.steps, held["steps"]))
        elif different:
            path, mine, theirs = different[0]
            raise OtherRun(
                f"{folder} holds a run with {path} = {theirs!r}, this config says {mine!r} "
                f"({len(different)} fields differ); remove the folder or choose another output"
            )
    elif any((folder / FOLDER).glob("[0-9]*")):
        raise OtherRun(f"{folder} holds checkpoints but no {NOTE} that says of which run; choose another output")
    if write and own != held:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{NOTE}.part"
        part.write_text(json.dumps(own, indent=1) + "\n")
        part.replace(note)


def steps_matter(config: TrainConfig, other: int) -> bool:
    """Whether a run of `other` steps differs from this config's in the steps that both have."""
    o = config.optimizer
    warmups = {min(o.warmup, steps - 1) for steps in (config.steps, other)}
    return o.end != 1 or config.reduction.mode == "curriculum" or len(warmups) > 1


def _other_steps(folder: pathlib.Path, now: int, held: int) -> str:
    return (
        f"{folder} holds a run with steps = {held}, this config says {now}: the rate (or a curriculum) is laid out over all steps, "
        f"so that this would be another run. To train on, begin a new one from its result (--set model={folder / 'export'} "
        "output=ANOTHER); only a run with optimizer.end=1, whose rate stays, goes on when steps is raised"
    )


def _paths(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found for key in sorted({*a, *b}) for found in _paths(a.get(key), b.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if a == b else [(at, a, b)]


def _tree(state: State) -> dict[str, Any]:
    """The state as Orbax keeps it: parameters by their paths, the optimizer's arrays by number."""
    leaves = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    tree = {"train": unflatten(state.train), "optimizer": leaves}
    return tree | ({"ema": unflatten(state.ema)} if state.ema else {})


class Checkpoints(Steps):
    """The checkpoints of a run folder, each whole or not there, by the number of steps done."""

    def __init__(self, folder: pathlib.Path, options: Checkpointing):
        super().__init__(folder, keep=options.keep, keep_every=options.keep_every, asynchronous=options.asynchronous)

    def save_state(self, step: int, state: State, about: dict[str, Any]) -> None:
        """Start to keep the state after `step` steps with `about` (JSON; of this process)."""
        if step not in self.manager.all_steps():
            processes = [json.loads(text) for text in distributed.gather(json.dumps(about).encode())]
            self.save(step, _tree(state), {"processes": processes})

    def restore_state(self, like: State, say: Callable[[str], None]) -> tuple[int, State, dict[str, Any]] | None:
        """(steps done, state, about) of the newest step that is whole; arrays go where those of `like` lie.

        None where there is none; what was damaged is told to `say`. ValueError for another number of processes.
        """
        found = self.restore(lambda step: _tree(like), say)
        if found is None:
            return None
        step, tree, about = found
        processes = about["processes"]
        if len(processes) != jax.process_count():
            raise ValueError(
                f"the checkpoint of step {step} holds the data's position of {len(processes)} processes, and this run has "
                f"{jax.process_count()}: start it with as many"
            )
        leaves = [tree["optimizer"][key] for key in sorted(tree["optimizer"])]
        inner = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
        ema = dict(flatten(tree["ema"])) if like.ema else {}
        return step, State(dict(flatten(tree["train"])), inner, ema), processes[jax.process_index()]
