"""Checkpoints of a running training: parameters, optimizer state and position, kept by Orbax."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.checkpoints.steps import Steps
from hybridvlm.config import Buckets, ModelConfig, Reduction
from hybridvlm.inference.model import Model
from hybridvlm.tiny import vocabulary
from hybridvlm.tokenizers.word_level import WordLevel


class Saved:
    """A training run's folder of checkpoints, by global step: the newest two, each written whole or not at all.

    recipe: everything that the run's numbers depend on, in words. ValueError if the folder holds a run of another recipe.
    """

    def __init__(self, folder: str | pathlib.Path, recipe: str, every: int = 100):
        folder = pathlib.Path(folder)
        note = folder / "recipe.txt"
        if note.is_file() and note.read_text() != recipe:
            raise ValueError(
                f"{folder} holds a run of another seed, recipe or start ({note}); remove it or choose another --work"
            )
        if not note.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(recipe)
        self.every, self._steps = every, Steps(folder)

    def save(self, step: int, params: Any, state: Any, *, now: bool = False) -> None:
        """Keep params and optimizer state after `step` global steps, every `every` steps or when told `now`."""
        if now or step % self.every == 0:
            self._steps.save(step, _numbered((params, state)), {})

    def restore(self, params: Any, make_state: Callable[[Any, int], Any]) -> tuple[int | None, Any, Any]:
        """(global step, params, optimizer state) of the newest checkpoint that is whole; (None, params, None) if there is none.

        make_state(params, step) builds an optimizer state of the right structure for that step.
        """
        found = self._steps.restore(lambda step: _numbered((params, make_state(params, step))))
        if found is None:
            return None, params, None
        step, leaves, _ = found
        structure = jax.tree.structure((params, make_state(params, step)))
        params, state = jax.tree.unflatten(structure, [leaves[name] for name in sorted(leaves)])
        return step, params, state

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._steps.wait()


def _numbered(tree: Any) -> dict[str, Any]:
    return {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def write_checkpoint(
    path: pathlib.Path, config: ModelConfig, params: dict, name: str, reduction: Reduction | None = None
) -> None:
    """Write a finished training as a checkpoint folder, half precision, and say where."""
    buckets = Buckets(frames=(8, 16, 32, 64), text=(8,), max_new=4)
    model = Model(config, params, WordLevel.from_file(vocabulary.PATH), buckets=buckets, reduction=reduction, name=name)
    print(f"wrote {save_folder(path, model, storage='float16')}")
