"""Run by test_train_mesh.py, in one process or two: a few steps on one device and on meshes, and restored onto another."""

import dataclasses
import json
import pathlib
import sys

import jax
from helpers.train_micro import VAMBA_REDUCTION, micro, micro_vamba, settings

from hybridvlm import distributed
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.inference.model import load
from hybridvlm.train import loop

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    },  # longer than the model has groups and kv heads: columns in two copies
    "sequence": {"data": 4, "sequence": 2},
}


def main(folder: pathlib.Path, names: list[str], kind: str = "micro") -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    first = distributed.initialize().first
    path = save_folder(folder / "micro", micro() if kind == "micro" else micro_vamba()) if first else folder / "micro"
    distributed.agree(None)
    told: dict[str, list] = {}
    run_config = vamba_config if kind == "vamba" else hybrid_config
    for name in names:
        config = run_config(folder / name, path, MESHES[name], steps=4)
        run = loop.Run(config, say=lambda text: None)
        if name == "fsdp":  # stops in the middle, and goes on below on another mesh
            held, calls = run.batch, []

            def second(arrays, shared, run=run, held=held, calls=calls):
                calls.append(1)
                if len(calls) == 2:
                    run.told_to_stop.set()
                return held(arrays, shared)

            run.batch = second
            try:
                run.run()
            except loop.Stopped:
                run = loop.Run(run_config(folder / name, path, MESHES["data"], steps=4), say=lambda text: None)
        exported = load(run.run())
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        told[name] = [[r["loss"], r["grad_norm"]] for r in map(json.loads, lines)]
        total = float(sum(abs(a).sum() for a in jax.tree.leaves(exported.params["decoder"])))
        told[name].append([total, 0.0])
    if first:
        (folder / f"told-{names[0]}.json").write_text(json.dumps(told))


def vamba_config(output: pathlib.Path, model: pathlib.Path, mesh: dict, steps: int):
    """Packed rows whose samples share their videos, under a plan."""
    return settings(
        output, model=str(model), mesh=mesh, steps=steps, remat="layer", optimizer={"ema": 0.5},
        data={"batch": 8, "segments": 2, "questions": 2, "text": 32, "frames": 4, "sample_frames": 2},
        reduction={"reduction": dataclasses.asdict(VAMBA_REDUCTION)},
    )  # fmt: skip


def hybrid_config(output: pathlib.Path, model: pathlib.Path, mesh: dict, steps: int):
    return settings(
        output, model=str(model), mesh=mesh, steps=steps, remat="layer", data={"batch": 8},
        distill={"scores": 0.5, "teach": 1, "kl": 0.5}, optimizer={"ema": 0.5},
    )  # fmt: skip


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2].split(","), *sys.argv[3:])
