"""Compiling for TPUs and GPUs that are not there: does it compile, does it fit, what does the compiler say it costs.

`compile_for(target("v5p:2x2x1"), f, x, y)` runs the real compiler of the target on this machine. It proves no numbers and no
speed: FLOPs, bytes and seconds are those of the compiler's cost model, which does not look inside Pallas calls beyond
their `cost_estimate`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from hybridvlm.hardware import CHIPS, Chip

# What XLA has to know of a Hopper card (GpuTargetConfigProto); bandwidth, memory and name differ between H100 and H200.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: {l2}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_L2 = {"H100": 50 << 20, "H200": 60 << 20}


def memory_analysis(executable: jax.stages.Compiled) -> Any:
    """What a compiled program takes of memory, as its compiler counts. RuntimeError from a compiler that does not tell."""
    found = executable.memory_analysis()
    if found is None:
        raise RuntimeError("the compiler does not tell what memory its program takes")
    return found


def hlo_text(executable: jax.stages.Compiled) -> str:
    """A compiled program as HLO. RuntimeError from a compiler that does not show it."""
    text = executable.as_text()
    if text is None:
        raise RuntimeError("the compiler does not show its program")
    return text


def memory_refused(error: Exception) -> int | None:
    """The bytes that a program would have taken on a device, where a compiler refused it for want of memory; else None."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
    return None if found is None else int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. platform: "tpu" or "gpu"."""

    name: str
    platform: str
    chip: Chip
    devices: tuple[Any, ...]

    def mesh(self, **axes: int) -> Mesh:
        """A mesh of named axes over the first devices: `target.mesh(data=1, tensor=4)`."""
        count = int(np.prod(list(axes.values())))
        if count > len(self.devices):
            raise ValueError(f"mesh {axes} takes {count} devices, {self.name} has {len(self.devices)}")
        return Mesh(np.array(self.devices[:count]).reshape(tuple(axes.values())), tuple(axes))

    @property
    def one(self) -> SingleDeviceSharding:
        """The first device by itself."""
        return SingleDeviceSharding(self.devices[0])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a target, and what its compiler says: bytes, FLOPs and seconds are those of one device.

    arguments, outputs, temporaries, aliased: bytes of HBM (aliased outputs live in their arguments). flops,
    bytes_accessed, seconds: `cost_analysis()`, in which the body of a loop counts once (hybridvlm/bench/hlo.py counts loops as
    often as they run); None where the compiler has none (GPU). compile_seconds is by the clock, compile_cpu_seconds the
    processor's time in it; tracing and lowering are apart.
    """

    executable: jax.stages.Compiled
    target: Target
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    flops: float | None
    bytes_accessed: float | None
    seconds: float | None
    trace_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float

    @property
    def peak_bytes(self) -> int:
        """HBM that the program needs at once on a device, its arguments and outputs included."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.target.chip.hbm_bytes


def target(name: str) -> Target:
    """What to compile for: "v5e:4x4", "v5p:2x2x1", "v6e:2x2" (any slice that exists), "H100", "H200", "H200:8" (cards of a host).

    Raises ValueError for a name of no such device, ImportError where the compiler for it is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise ValueError(f"target: expected one of {sorted(CHIPS)} with a slice, like v5e:2x2, got {name!r}")
    if generation.startswith("v"):
        if not shape:
            raise ValueError(f"target: {name!r} needs the shape of its slice, like v5e:2x2 or v5p:2x2x1")
        return Target(name, "tpu", CHIPS[generation], _tpu_devices(name))
    if shape and not (shape.isdigit() and int(shape) > 0):
        raise ValueError(f"target: {generation} takes a number of cards, like {generation}:8, got {name!r}")
    return Target(name, "gpu", CHIPS[generation], _gpu_devices(generation, int(shape or 1)))


def missing(platform: str) -> str | None:
    """Why nothing can be compiled for `platform` ("tpu" or "gpu") here, or None: the compiler is there."""
    needed = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")}
    if platform not in needed:
        raise ValueError(f"platform: expected one of {sorted(needed)}, got {platform!r}")
    absent = [module for module in needed[platform] if not _installed(module)]
    if not absent:
        return None
    return (
        f"the compiler for {platform} is not installed (no module {', '.join(absent)}); pip install "
        f"'hybridvlm[aot-{platform}]' brings it, and no hardware is needed"
    )


def _installed(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    if parent and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(module) is not None


def _require(platform: str) -> None:
    reason = missing(platform)
    if reason is not None:
        raise ImportError(reason)


@functools.cache
def _tpu_devices(name: str) -> tuple[Any, ...]:
    _require("tpu")
    if jax.default_backend() != "tpu":
        # libtpu asks the cloud's metadata server and the worker list what slice it is on, and locks the machine's chips;
        # without a chip there is nothing to ask or lock. On a TPU it has already started, with its own answers.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"target: no TPU slice {name!r}: {error}") from error


@functools.cache
def _gpu_devices(generation: str, count: int) -> tuple[Any, ...]:
    _require("gpu")
    chip = CHIPS[generation]
    text = _HOPPER.format(
        l2=_L2[generation], bandwidth=int(chip.bandwidth), memory=chip.hbm_bytes, name=chip.kind.removesuffix(" SXM")
    )
    describe = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        topology_name=generation,
        topology=f"1x1x{count}",
        target_config=text,
    )
    try:
        description = describe()
    except NotImplementedError:
        # JAX leaves its plugin out where it finds no cuDNN or the like, which running takes and compiling does not.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        importlib.import_module("jax_plugins.xla_cuda13").initialize()
        description = describe()
    return tuple(description.devices)


def compile_for(
    where: Target,
    fn: Callable,
    *args: Any,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnames: tuple[str, ...] = (),
    donate_argnums: tuple[int, ...] = (),
    compiler_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Compiled:
    """Compile fn(*args, **kwargs) for a target that need not be there.

    args, kwargs: arrays or `jax.ShapeDtypeStruct`s, of which only shape, dtype and a struct's format matter (static_argnames:
    kwargs passed as they are). in_shardings: a tree like args, or a prefix of one, of shardings over `where.mesh(...)`; a
    leaf without any goes to the first device. out_shardings: as for `jax.jit`. While fn is traced, `jax.default_device`
    is the target's, and with it every default by platform.

    Raises what the compiler raises: a program that does not fit in HBM is a jax.errors.JaxRuntimeError (RESOURCE_EXHAUSTED).
    """
    traced = {name: value for name, value in kwargs.items() if name not in static_argnames}
    static = {name: value for name, value in kwargs.items() if name in static_argnames}
    if in_shardings is not None:
        args = _with_shardings(args, in_shardings)
    args, traced = jax.tree.map(lambda leaf: _struct(leaf, where.one), (args, traced))
    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    function = jax.jit(
        fn, static_argnames=static_argnames or None, donate_argnums=donate_argnums, keep_unused=True, **options
    )
    start = time.perf_counter()
    with jax.default_device(where.devices[0]):
        lowered = function.lower(*args, **traced, **static)
        trace_seconds = time.perf_counter() - start
        start, cpu = time.perf_counter(), _cpu_seconds()
        executable = lowered.compile(compiler_options=compiler_options)
    compile_seconds, compile_cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu
    memory, cost = memory_analysis(executable), executable.cost_analysis() or {}
    seconds = cost.get("optimal_seconds", 0.0)
    return Compiled(
        executable=executable,
        target=where,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        seconds=seconds if seconds > 0 else None,  # negative or absent: the compiler has no estimate
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        compile_cpu_seconds=compile_cpu_seconds,
    )


def _with_shardings(args: tuple[Any, ...], shardings: Any) -> tuple[Any, ...]:
    def with_sharding(sharding: Sharding | None, part: Any) -> Any:
        return jax.tree.map(lambda leaf: _struct(leaf, sharding), part)

    return jax.tree.map(with_sharding, shardings, args, is_leaf=lambda s: s is None or isinstance(s, Sharding))


def _struct(leaf: Any, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    own: Any = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    if own is not None and leaf.format.layout is not None:
        own = leaf.format  # which of the axes is innermost in memory, too
    shape, dtype = (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else (np.shape(leaf), np.result_type(leaf))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=own or sharding)


def _cpu_seconds() -> float:
    """Processor time of this process so far, all threads, in user mode."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
