"""The steps of a training on disk (Orbax), each with checksums of what was saved: damage is noticed, named and passed over."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm import distributed
from hybridvlm.models.weights import flatten
from hybridvlm.ops.mix import mix32

FOLDER, ASIDE = "checkpoints", "checkpoints-damaged"


class Damaged(ValueError):
    """A step on disk is not what was saved."""


def digests(tree: Any) -> dict[str, str]:
    """A checksum of type, shape and bits of every array, by its path; it is the same on every mesh.

    Every word of an array is mixed with its position, and the results are added up: whole numbers, in any order.
    """
    flat = dict(flatten(tree))
    sums = jax.device_get(_sums(flat))
    return {
        path: f"{a.dtype}{list(a.shape)}:" + "".join(f"{int(part):08x}" for part in sums[path])
        for path, a in sorted(flat.items())
    }


@jax.jit
def _sums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _mixed(a) for path, a in flat.items()}


def _mixed(a: jax.Array) -> jax.Array:
    """Two sums of an array's words, [2] uint32."""
    a = jnp.asarray(a)
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[a.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(a, kind).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    sums = [jnp.sum(mix32(words ^ mix32(index + jnp.uint32(salt))), dtype=jnp.uint32) for salt in (1, 0x9E3779B9)]
    return jnp.stack(sums)


def checksum(params: Any) -> str:
    """A short text that changes with any weight, and not with the mesh that they lie on."""
    return _text_digest(digests(params))[:16]


def _text_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Steps:
    """The checkpoints of a run folder, by the number of steps done.

    Attributes:
        folder: the run's folder; the steps lie in `checkpoints`, and what was found damaged in `checkpoints-damaged`.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, keep_every: int = 0, asynchronous: bool = True):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        logging.getLogger("absl").addFilter(_not_told_twice)
        self._ocp, self.folder = ocp, pathlib.Path(folder).absolute()
        self._make = lambda: ocp.CheckpointManager(
            self.folder / FOLDER,
            options=ocp.CheckpointManagerOptions(
                # the caller says when: at its own interval, at the end, and when it is told to stop
                save_decision_policy=policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                enable_async_checkpointing=asynchronous,
                cleanup_tmp_directories=True,  # what a killed run or a full disk left half done
            ),
        )
        self.manager = self._make()

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, one under way included; None if there is none."""
        return self.manager.latest_step()

    def whole(self) -> int | None:
        """Steps done at the newest checkpoint on disk, once what is under way has ended, well or badly."""
        with contextlib.suppress(Exception):
            self.wait()
        self.manager.reload()
        return self.manager.latest_step()

    def save(self, step: int, tree: dict[str, Any], about: Any) -> None:
        """Start to keep arrays (a nested dict) and `about` (JSON) after `step` steps; nothing for a step that is there."""
        if step in self.manager.all_steps():
            return
        # the step too: a folder that was copied or renamed to another number is no step of its own
        note = {"step": step, "about": about, "arrays": digests(tree)}
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(tree),
            about=self._ocp.args.JsonSave(note | {"sha256": _text_digest(note)}),
        )
        self.manager.save(step, args=args)

    def restore(
        self, like: Callable[[int], dict[str, Any]], say: Callable[[str], None] = print
    ) -> tuple[int, dict[str, Any], Any] | None:
        """(steps done, arrays, about) of the newest step that is whole; None where there is none.

        What is damaged is told to `say`, with the reason, and moved to `checkpoints-damaged`, so that nothing is lost.

        Args:
            like: from a number of steps to arrays of the same types and shapes; what is restored goes where they lie, which may be
                another mesh than it came from.
            say: takes one line for people.
        """
        first = jax.process_index() == 0
        steps = json.loads(distributed.gather(json.dumps(sorted(self.manager.all_steps())).encode())[0])
        damaged: list[tuple[int, str]] = []
        found = None
        while steps and found is None:
            step = steps.pop()
            try:
                found = step, *self._read(step, like(step))
            except Damaged as error:
                damaged.append((step, str(error)))
        failure = None
        for step, reason in damaged:
            goes_on = f"going on after step {found[0]}" if found else "no other one is whole: starting anew"
            try:
                aside = self._set_aside(step) if first else None
            except OSError as error:
                failure = OSError(
                    f"the checkpoint of step {step} is damaged ({reason}) and could not be moved to {self.folder / ASIDE} "
                    f"({error.strerror}); move or remove {self.folder / FOLDER / str(step)} and start again"
                )
                break
            if first:
                say(f"the checkpoint of step {step} is damaged ({reason}); it is kept as {aside}; {goes_on}")
        distributed.agree(failure)
        if damaged:
            self.manager.close()
            self.manager = self._make()
        return found

    def _read(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """(arrays, about) of a step; Damaged in every process if any of them finds that they are not what was saved."""
        ocp, at = self._ocp, self.folder / FOLDER / str(step)
        me = jax.process_index()
        # each process reads for itself, so that none waits for another that failed
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"restore-{me}"
        )
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding(a)), like)
        tree, note, problem = None, None, ""
        with _quiet():
            try:
                tree, note = self._read_alone(at, abstract, alone)
            except MemoryError:
                raise
            except Exception as error:  # Orbax and TensorStore raise whatever the damaged position led them to
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                problem = _short(error) or type(error).__name__
        problems = [text.decode() for text in distributed.gather(problem.encode())]
        if any(problems):
            raise Damaged(next(text for text in problems if text))
        assert tree is not None and note is not None  # else there was a problem
        saved, read = note["arrays"], digests(tree)
        other = sorted(path for path in {*saved, *read} if saved.get(path) != read.get(path))
        if other:
            raise Damaged(f"{len(other)} of {len(saved)} arrays are not what was saved, the first: {other[0]}")
        return tree, note["about"]

    def _read_alone(self, at: pathlib.Path, abstract: Any, alone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays, note) of a step, as this process finds them."""
        ocp = self._ocp
        notes, arrays = (
            ocp.Checkpointer(kind(multiprocessing_options=alone), multiprocessing_options=alone)
            for kind in (ocp.JsonCheckpointHandler, ocp.StandardCheckpointHandler)
        )
        note = notes.restore(at / "about")
        if not isinstance(note, dict) or not {"about", "arrays", "sha256"} <= set(note):
            raise Damaged("the data's position and the checksums are missing")
        if note["sha256"] != _text_digest({key: value for key, value in note.items() if key != "sha256"}):
            raise Damaged("the data's position and the checksums are not those that were saved")
        # notes of earlier versions do not name their step
        if note.get("step", int(at.name)) != int(at.name):
            raise Damaged(f"it is what was saved after {note['step']} steps")
        return arrays.restore(at / "state", args=ocp.args.StandardRestore(abstract)), note

    def _set_aside(self, step: int) -> pathlib.Path:
        aside = self.folder / ASIDE
        aside.mkdir(exist_ok=True)
        names = (str(step), *(f"{step}-{number}" for number in range(1, 10_000)))
        target = next(aside / name for name in names if not (aside / name).exists())
        os.replace(self.folder / FOLDER / str(step), target)
        return target

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
        """Wait for what is under way, and let go."""
        self.manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Where a read fails, Orbax leaves others half done, which Python would complain of one by one, with tracebacks."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = before if isinstance(before, _NoLateReads) else _NoLateReads(before)


class _NoLateReads:
    """A `sys.unraisablehook` that shows nothing of reads whose end TensorStore's threads report to an event loop that ended with
    the read that failed. They may do so long after, so that it stays; all else is shown by `before`."""

    def __init__(self, before: Callable[[Any], None]):
        self.before = before

    def __call__(self, said: Any) -> None:
        trace = said.exc_traceback
        # the outermost frame: no code in Python called it
        called = "" if trace is None else trace.tb_frame.f_code.co_name
        late = isinstance(said.exc_value, RuntimeError) and str(said.exc_value) == "Event loop is closed"
        if not (late and called == "call_soon_threadsafe"):
            self.before(said)


def _not_told_twice(record: logging.LogRecord) -> bool:
    """A log filter: what fails in Orbax's threads it logs with a traceback from each of them, and raises; and metadata that it
    does without where they are damaged."""
    if "orbax" not in record.pathname:
        return True
    return not record.exc_info and not _METADATA.match(str(record.msg))


_METADATA = re.compile("Failed to json parse Metadata file|Metadata file does not exist")


def _sharding(a: Any) -> jax.sharding.Sharding:
    return getattr(a, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _short(error: BaseException) -> str:
    """The first line of an error, cut where it grows long."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if len(line) <= 200 else f"{line[:200]} ..."
