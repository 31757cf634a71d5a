"""Run by test_train_mesh.py, in one process or two: a few steps on one device and on meshes, and restored onto another."""

import json
import pathlib
import sys

import jax
from helpers.train_micro import micro, settings

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


def main(folder: pathlib.Path, names: list[str]) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    first = distributed.initialize().first
    path = save_folder(folder / "micro", micro()) if first else folder / "micro"
    distributed.agree(None)
    told: dict[str, list] = {}
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


def run_config(output: pathlib.Path, model: pathlib.Path, mesh: dict, steps: int):
    return settings(
        output, model=str(model), mesh=mesh, steps=steps, remat="layer", data={"batch": 8},
        distill={"scores": 0.5, "teach": 1, "kl": 0.5}, optimizer={"ema": 0.5},
    )  # fmt: skip


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2].split(","))
