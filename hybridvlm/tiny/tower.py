"""First stage of the embedded model: the convolutional stem learns to name what a cell shows.

The stem and the connector's projection are trained together on single cells of training images, so that a visual token is the
sum of the directions (`codes`) of its class, border colour and tags. Both stay as they are afterwards.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from hybridvlm.config import ModelConfig
from hybridvlm.tiny import assets, codes, tiles
from hybridvlm.vision import Connector, StemTower, stem_tower

SHOWN = ("class", "colour", "tag1", "tag2")
SHARPNESS = 8.0  # turns the products with unit directions into logits


def features(params: dict, config: ModelConfig, cells: jax.Array) -> jax.Array:
    """Cells uint8 [n,32,32,3] -> visual tokens [n,D] without position and time."""
    x = stem_tower(params["vision"], config.tower, cells.astype(jnp.float32) / 255)[:, 0, 0]
    return x @ params["projector"]["proj"] + params["projector"]["proj_bias"]


def random_cells(
    bank: assets.Bank, n: int, rng: np.random.Generator, mirror: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """n cells of uniform class, colour and tags: uint8 [n,32,32,3] and the label arrays by attribute. mirror: items left to right."""
    label = rng.integers(tiles.CLASSES, size=n)
    image = bank.images[rng.integers(bank.start[label], bank.start[label + 1])]
    image = image[:, :, ::-1] if mirror else image
    shown = {
        "class": label,
        "colour": rng.integers(16, size=n),
        "tag1": rng.integers(8, size=n),
        "tag2": rng.integers(8, size=n),
    }
    return tiles.render(image, shown["colour"], shown["tag1"], shown["tag2"]), shown


def _loss(params, config, cells, shown):
    x = features(params, config, cells)
    directions = codes.codes(config.width)
    target: jax.Array | float = 0.0
    loss = 0.0
    for name in SHOWN:
        logits = SHARPNESS * x @ directions[name].T
        loss += optax.softmax_cross_entropy_with_integer_labels(logits, shown[name]).mean()
        target = target + jnp.asarray(directions[name])[shown[name]]
    return loss + jnp.square(x - target).sum(-1).mean()


def accuracy(params: dict, config: ModelConfig, split: str, n: int = 6000, seed: int = 1) -> dict[str, float]:
    """How often the nearest direction is right, by attribute, on cells of `split`: what a reader of the tokens can know."""
    cells, shown = random_cells(assets.load_bank(split), n, np.random.default_rng(seed))
    x = jax.jit(functools.partial(features, config=config))(params, cells=cells)
    directions = codes.codes(config.width)
    return {name: float(np.mean(np.argmax(x @ directions[name].T, -1) == shown[name])) for name in SHOWN}


def initial_tower(config: ModelConfig, seed: int = 0) -> dict:
    """Stem and connector before training: {"vision": ..., "projector": ...}; cell and time embeddings are their directions."""
    key = jax.random.key(seed)
    pixels = jnp.zeros((1, *config.tower.image_size, 3))
    tower, connector = StemTower(config.tower), Connector(config.tower, config.width)
    vision = tower.init(key, pixels)["params"]
    found = tower.apply({"params": vision}, pixels)
    projector = connector.init(key, found, jnp.zeros((1,), jnp.int32))["params"]
    directions = {"cell": codes.codes(config.width)["cell"], "time": codes.time_code(config.width)}
    return {"vision": vision, "projector": projector | jax.tree.map(jnp.asarray, directions)}


def train_tower(config: ModelConfig, seed: int = 0, steps: int = 2400, batch: int = 256) -> dict:
    """Train stem and projection on cells of training images; the cell and time embeddings stay."""
    params = initial_tower(config, seed)
    schedule = optax.cosine_onecycle_schedule(steps, 3e-3, 0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))
    state = optimizer.init(params)
    bank = assets.load_bank("train")

    @jax.jit
    def update(params, state, cells, shown):
        loss, grads = jax.value_and_grad(_loss)(params, config, cells, shown)
        updates, state = optimizer.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        new["projector"] = new["projector"] | {k: params["projector"][k] for k in ("cell", "time")}
        return new, state, loss

    rng = np.random.default_rng([seed, 7])
    progress = tqdm(range(steps), desc="tower", unit="step", mininterval=2.0)
    for step in progress:
        cells, shown = random_cells(bank, batch, rng, mirror=rng.random() < 0.5)
        params, state, loss = update(params, state, cells, shown)
        if step % 100 == 0:
            progress.set_postfix(loss=f"{float(loss):.3f}")
    return params
