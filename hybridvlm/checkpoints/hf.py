"""Published checkpoints in and out: config.json and safetensors shards <-> a family's config and parameters.

Weights stream: a tensor is read a few rows at a time and put straight where it lives on the devices, so that in addition to the
finished model the host holds a few pieces and no tensor twice. Everything is checked by name and shape before the first
byte of data is read.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.checkpoints.atomic import whole_folder
from hybridvlm.checkpoints.tensors import INDEX, TensorFolder, write_tensors
from hybridvlm.errors import CheckpointError
from hybridvlm.files import read_object
from hybridvlm.models.weights import FLOAT32, Shape, StackedSpec, Transform, WeightMap, unflatten

CONFIG = "config.json"
MOST_FAULTS = 200  # that a message lists
# what some releases save next to the parameters: tables that follow from the config, and the heads that predict further tokens
CONSTANT = re.compile(
    r"(?:^|\.)(?:\w*inv_freq|rotary\w*\.\w+_cached|position_ids|num_batches_tracked|mtp(?:_\w+)?\..*)$"
)
PIECE_BYTES = 64 << 20  # that are read at once; a smaller array is put together on the host
SHARD_BYTES = 4 << 30  # of a written file
# (flat name, shape) of an array -> where it lives
ShardingFor = Callable[[str, Shape], jax.sharding.Sharding]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds one table; CheckpointError if it does not, or has a key twice."""
    return read_object(path, CheckpointError)


# -- which tensor goes where ------------------------------------------------------------------------------------------


_EXPONENT: dict[int, np.unsignedinteger] = {
    2: np.uint16(0x7C00),
    4: np.uint32(0x7F800000),
    8: np.uint64(0x7FF0000000000000),
}
_BLOCK = 1 << 20  # values that are looked at at once, so that it costs no memory


def check_finite(values: np.ndarray, name: str, kind: Any = None) -> None:
    """CheckpointError, by name, for NaN and infinities in a stored tensor, and for values that `kind` has no room for."""
    kind = np.dtype(np.float32 if kind is None else kind)
    narrow = values.dtype == np.float64 != kind or (kind == np.float16 and values.dtype != np.float16)
    flat = np.ascontiguousarray(values).reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        part = flat[at : at + _BLOCK]
        exponent: np.unsignedinteger = _EXPONENT[part.dtype.itemsize]
        if part.dtype == jnp.bfloat16:
            exponent = np.uint16(0x7F80)
        odd = (part.view(exponent.dtype) & exponent) == exponent
        if odd.any():
            raise CheckpointError(f"{name} holds values that are not finite (NaN or infinity); take another copy of it")
        if narrow and np.abs(part.astype(np.float64)).max() > float(jnp.finfo(kind).max):
            raise CheckpointError(
                f"{name} holds values that {kind} has no room for; take dtype 'bfloat16' or 'float32'"
            )


def own_head(table: WeightMap, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether `table` makes head and embedding one where the checkpoint holds two different ones.

    transformers then takes both as they are, whatever the config says, and so must a table without the tie.
    """
    return _Sources(table, tensors).own_head()


class _Sources:
    """A checkpoint's tensors under the names of a table, checked for one: every fault is collected, by name.

    kind: what they are to be cast to (default: as stored), which must have room for their values.
    """

    def __init__(self, table: WeightMap, tensors: Mapping[str, np.ndarray], kind: Any = None):
        self.table, self.tensors = table, tensors
        self.kind = None if kind is None else np.dtype(kind)
        if isinstance(tensors, TensorFolder):
            self.shapes, self.dtypes = tensors.shapes(), tensors.dtypes()
        else:
            self.shapes = {name: np.shape(x) for name, x in tensors.items()}
            self.dtypes = {name: np.asarray(x).dtype for name, x in tensors.items()}
        # the table's name -> name in the checkpoint, part, parts
        self.found: dict[str, tuple[str, int, int]] = {}
        self.faults: dict[str, None] = {}  # in order, each once
        for stored in self.shapes:
            names = table.canonical(stored)
            if CONSTANT.search(stored) or all(map(table.ignored, names)):
                # nobody's parameter, however often it is there
                continue
            for part, name in enumerate(names):
                if name in self.found:
                    self.faults[f"twice: {name}, as {self.found[name][0]} and as {stored}"] = None
                self.found[name] = (stored, part, len(names))
        if table.tied and table.tied[0] not in self.found and table.tied[1] in self.found:
            # saved under the head's name alone: one matrix serves as both, whatever it is called
            self.found[table.tied[0]] = self.found.pop(table.tied[1])

    def own_head(self) -> bool:
        """Whether the table ties the head to the embedding and the checkpoint holds a head with other values."""
        if not self.table.tied or any(name not in self.found for name in self.table.tied):
            return False
        embed, head = (self.found[name][0] for name in self.table.tied)
        shape = self.shapes[embed]
        if shape != self.shapes[head] or not shape:
            return True
        step = max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * self.dtypes[embed].itemsize))
        for at in range(0, shape[0], step):
            rows = [np.asarray(self._read(name, at, min(at + step, shape[0]))) for name in (embed, head)]
            if not np.array_equal(rows[0], rows[1]):
                return True
        return False

    def check(self, compared: bool = False) -> None:
        """ValueError with every tensor that is missing, has another shape than the config says, or belongs to no parameter.

        compared: a head that the table ties is known to hold the embedding's values.
        """
        used: set[str] = set()
        for job in self.table.jobs:
            if len(self.faults) > MOST_FAULTS:  # of another model altogether
                break
            shape = job[1].shape(job[0])
            if stacked := self._stacked(job):
                for name, expected in stacked:
                    used.add(self._check_one(name, expected))
                continue
            for _, name, scale in self.table.pieces(job):
                used.add(self._check_one(name, shape))
                if scale in self.found:
                    used.add(self._check_one(scale, shape[:1]))
                if len(self.faults) > MOST_FAULTS:
                    break
        if self.table.tied and self.table.tied[1] in self.found:
            used.add(self.found[self.table.tied[1]][0])
            if not (self.faults or compared) and self.own_head():
                head, embed = (self.found[name][0] for name in reversed(self.table.tied))
                self.faults[f"tied: {head} has other values than {embed}, and the config makes them one"] = None
        for stored, _, _ in self.found.values():
            if len(self.faults) <= MOST_FAULTS and stored not in used:
                self.faults[f"no parameter for: {stored}"] = None
        if self.faults:
            lines = [*self.faults][:MOST_FAULTS] + ["and more"] * (len(self.faults) > MOST_FAULTS)
            raise CheckpointError("\n  ".join([f"the checkpoint does not fit {self.table.who}:", *lines]))

    def _stacked(self, job: StackedSpec) -> list[tuple[str, Shape]]:
        """(name, shape) of the tensors that hold all experts of a layer, where the checkpoint has those."""
        c, row, layers = job
        if not row.stacked or row.experts is None or layers is None:
            return []
        names = [row.stacked.format(i=layer) for layer in layers]
        return [(name, (row.experts(c), *row.shape(c))) for name in names] if names[0] in self.found else []

    def _check_one(self, name: str, shape: Shape) -> str:
        if name not in self.found:
            self.faults[f"missing: {name} {shape}"] = None
            return ""
        stored, _, parts = self.found[name]
        whole = (shape[0] * parts, *shape[1:])
        if self.shapes[stored] != whole:
            self.faults[f"wrong shape: {stored} should be {whole}, is {self.shapes[stored]}"] = None
        if not jnp.issubdtype(self.dtypes[stored], jnp.floating):
            self.faults[f"no floating-point numbers: {stored} is stored as {self.dtypes[stored]}"] = None
        return stored

    def pieces(self, job: StackedSpec) -> Iterator[tuple[Shape, Callable[[int, int], np.ndarray]]]:
        """Of one job: (position in the stack, rows(start, stop) of the tensor that belongs there, its scale applied)."""
        c, row, _ = job
        height = row.shape(c)[0]
        stacked = self._stacked(job)
        kind = None if row.target.rsplit("/", 1)[-1] in FLOAT32 else self.kind
        for stack_index, name, scale in self.table.pieces(job):
            if stacked:
                layer, expert = stack_index
                yield stack_index, functools.partial(self._expert_rows, stacked[layer][0], expert, kind)
            else:
                yield (
                    stack_index,
                    functools.partial(self._rows, name, scale if scale in self.found else "", height, kind),
                )

    def _rows(self, name: str, scale: str, height: int, kind: Any, start: int, stop: int) -> np.ndarray:
        stored, part, _ = self.found[name]
        rows = self._read(stored, part * height + start, part * height + stop)
        if scale:
            by = self.found[scale][0]
            factor = self._read(by, start, stop)
            for values, name in ((rows, stored), (factor, by)):
                check_finite(values, name, values.dtype)
            with np.errstate(over="ignore"):  # told below, by name
                rows = rows * factor.reshape(-1, *(1,) * (rows.ndim - 1))
            stored = f"{stored} times {by}"
        check_finite(rows, stored, kind)
        return rows

    def _expert_rows(self, name: str, expert: int, kind: Any, start: int, stop: int) -> np.ndarray:
        stored = self.found[name][0]
        rows = self._read(stored, expert, expert + 1)[0, start:stop]
        check_finite(rows, stored, kind)
        return rows

    def _read(self, stored: str, start: int, stop: int) -> np.ndarray:
        if isinstance(self.tensors, TensorFolder):
            return self.tensors.rows(stored, start, stop)
        return np.asarray(self.tensors[stored])[start:stop]

    def dtype(self, job: StackedSpec) -> np.dtype:
        """As what the tensors of a job are stored; of several dtypes one that holds them all, float32 at most."""
        names = [name for name, _ in self._stacked(job)] or [name for _, name, _ in self.table.pieces(job)]
        kinds = {np.dtype(self.dtypes[self.found[name][0]]) for name in names}
        return np.dtype(jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, kinds)))


# -- in -----------------------------------------------------------------------------------------------------------------


def params_from_tensors(table: WeightMap, tensors: Mapping[str, np.ndarray], *, dtype: Any = None) -> dict[str, Any]:
    """Our parameters as NumPy arrays from a checkpoint's tensors, under any of their known names.

    dtype: cast to it (default: as stored). CheckpointError lists every tensor that is missing, misshapen or belongs to no parameter.
    """
    sources = _Sources(table, tensors, dtype)
    sources.check()
    return unflatten(
        {job[1].target: _on_host(sources, job, np.dtype(dtype or sources.dtype(job))) for job in table.jobs}
    )


def read_params(
    table: WeightMap,
    tensors: TensorFolder,
    *,
    dtype: Any = None,
    sharding_for: ShardingFor | None = None,
    progress: Callable[[str], None] = lambda name: None,
    compared: bool = False,
) -> dict[str, Any]:
    """Our parameters on the devices, streamed. dtype: of all but the leaves in `names.FLOAT32` (default: as stored).

    sharding_for: where each array lives (default: the default device). progress: called with each array's name before it is read.
    compared: `own_head` was asked already, so that head and embedding need not be read for it once more.
    """
    sources = _Sources(table, tensors, dtype)
    sources.check(compared)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat: dict[str, jax.Array] = {}
    for job in table.jobs:
        target = job[1].target
        keep = target.rsplit("/", 1)[-1] in FLOAT32
        kind = jnp.dtype(jnp.float32 if keep else dtype or sources.dtype(job))
        shape = table.target_shape(job)
        sharding = here if sharding_for is None else sharding_for(target, shape)
        progress(target)
        if math.prod(shape) * kind.itemsize <= PIECE_BYTES:
            array = _on_host(sources, job, kind)
            flat[target] = jax.make_array_from_callback(shape, sharding, array.__getitem__)
        else:
            flat[target] = _streamed(sources, job, shape, kind, sharding)
    return unflatten(flat)


def _on_host(sources: _Sources, job: StackedSpec, dtype: np.dtype) -> np.ndarray:
    c, row, _ = job
    out = np.empty(sources.table.target_shape(job), dtype)
    for stack_index, rows in sources.pieces(job):
        out[stack_index] = row.turn.into(rows(0, row.shape(c)[0]), c)
    return out


@functools.partial(jax.jit, static_argnames=("turn", "c", "sizes"), donate_argnums=0)
def _put(buffer: jax.Array, rows: jax.Array, begin: jax.Array, to: jax.Array, *, turn: Transform, c: Any, sizes: Shape):
    """The box of `sizes` at `begin` of the turned rows, written to `to` of the buffer, in its own memory."""
    turned = turn.into(rows, c)
    box = jax.lax.dynamic_slice(turned, begin, sizes).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, box.reshape((1,) * (buffer.ndim - box.ndim) + box.shape), to)


def _streamed(
    sources: _Sources, job: StackedSpec, shape: Shape, dtype: Any, sharding: jax.sharding.Sharding
) -> jax.Array:
    """One array, put together on the devices that hold parts of it."""
    c, row, layers = job
    stored = row.shape(c)
    parts = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # every array has a position on each of its devices
        low = [s.start or 0 for s in index]
        high = [n if s.stop is None else s.stop for s, n in zip(index, shape, strict=True)]
        sizes = tuple(b - a for a, b in zip(low, high, strict=True))
        buffer = jax.jit(lambda sizes=sizes: jnp.zeros(sizes, dtype), out_shardings=_only(device))()
        parts[device] = [low, high, buffer]
    row_bytes = max(1, math.prod(stored[1:]) * sources.dtype(job).itemsize)
    step = stored[0] if row.turn.axis is None else max(1, PIECE_BYTES // row_bytes)
    lead = (layers is not None) + (row.experts is not None)
    for stack_index, rows in sources.pieces(job):
        for start in range(0, stored[0], step):
            stop = min(start + step, stored[0])
            begin, end = [*stack_index, *(0 for _ in shape[lead:])], [*(p + 1 for p in stack_index), *shape[lead:]]
            if row.turn.axis is not None:
                begin[lead + row.turn.axis], end[lead + row.turn.axis] = start, stop
            boxes = {}
            for device, (low, high, _) in parts.items():
                box = [(max(a, b), min(x, y)) for a, b, x, y in zip(begin, low, end, high, strict=True)]
                if all(a < b for a, b in box):
                    boxes[device] = box
            if not boxes:
                continue  # no device of this host holds any of it
            piece = rows(start, stop)
            for device, box in boxes.items():
                low, _, buffer = parts[device]
                parts[device][2] = _put(
                    buffer,
                    jax.device_put(piece, _only(device)),
                    np.asarray([a - b for (a, _), b in zip(box[lead:], begin[lead:], strict=True)], np.int32),
                    np.asarray([a - b for (a, _), b in zip(box, low, strict=True)], np.int32),
                    turn=row.turn,
                    c=c,
                    sizes=tuple(b - a for a, b in box[lead:]),
                )
            # a piece is let go before the next is read: what is asked of a device runs on unseen by the host
            jax.block_until_ready([part[2] for part in parts.values()])
    return jax.make_array_from_single_device_arrays(shape, sharding, [part[2] for part in parts.values()])


def _only(device: jax.Device) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(device)


# -- out ----------------------------------------------------------------------------------------------------------------


def save_published(
    path: str | pathlib.Path,
    params: Mapping[str, Any],
    table: WeightMap,
    raw: Mapping[str, Any],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    extra: Callable[[pathlib.Path], None] = lambda folder: None,
) -> pathlib.Path:
    """Write parameters in the published layout, whole or not at all: config.json (`raw`), shards and their index.

    dtype: as what (default: each as it is). shard_bytes: most that one file holds. extra(folder) may add files (tokenizer).
    A tensor that a LayerScale was folded into is written without one.
    """
    path = pathlib.Path(path)
    leaves: dict[str, tuple[Any, Shape, StackedSpec]] = {}
    for job in table.jobs:
        leaf: Any = params
        for key in job[1].target.split("/"):
            leaf = leaf[key]
        if tuple(leaf.shape) != table.target_shape(job):
            raise ValueError(f"{job[1].target} should be {table.target_shape(job)}, is {tuple(leaf.shape)}")
        for stack_index, source, _ in table.pieces(job):
            leaves[source] = (leaf, stack_index, job)
    whole: dict[str, list[str]] = {}  # published name -> the table's names, in order
    for source in leaves:
        joined = next(((fused, fused.join(source)) for fused in table.fused if fused.join(source)), None)
        name = table.published(source if joined is None else joined[1])
        whole[name] = [source] if joined is None else list(joined[0].split(joined[1]))
    shapes = table.shapes()
    kinds = {name: np.dtype(dtype or leaves[parts[0]][0].dtype) for name, parts in whole.items()}

    def pieces(name: str) -> Iterator[np.ndarray]:
        for source in whole[name]:
            leaf, stack_index, (c, row, _) = leaves[source]
            yield row.turn.back(np.asarray(jax.device_get(leaf[stack_index] if stack_index else leaf)), c)

    shards: list[dict[str, tuple[np.dtype, Shape]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kinds[name].itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = (kinds[name], shape)
        held += size
    with whole_folder(path, lambda old: (old / CONFIG).is_file()) as new:
        (new / CONFIG).write_text(json.dumps(raw, indent=1) + "\n")
        if len(shards) == 1:
            write_tensors(new / "model.safetensors", shards[0], pieces)
        else:
            home: dict[str, str] = {}
            for number, shard in enumerate(shards):
                file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
                write_tensors(new / file, shard, pieces)
                home |= dict.fromkeys(shard, file)
            total = sum(math.prod(shape) * kinds[name].itemsize for name, shape in shapes.items())
            index = {"metadata": {"total_size": total}, "weight_map": home}
            (new / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        extra(new)
    return path
