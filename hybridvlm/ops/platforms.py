"""Which platform a program is being traced for, and the refusal of an implementation that cannot run there."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType

import jax
import jax.numpy as jnp

KERNELS_NEED = (
    0,
    10,
)  # the first JAX whose Pallas has what the kernels are written in; XLA's implementations need less
_told: set[str] = set()
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_capability: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("capability", default=None)


def platform() -> str:
    """ "cpu", "tpu" or "gpu": what `compiling_for` says, else that of `jax.default_device`, else JAX's default backend's.

    The default device is part of what JAX keys its traces by, so what is traced for a target that is not there
    (`hybridvlm.aot.compile_for` sets its device) never meets what was traced for the CPU before.
    """
    device = jax.config.values["jax_default_device"]
    here = jax.default_backend() if device is None else getattr(device, "platform", device)
    return _target.get() or ("gpu" if here in ("cuda", "rocm") else here)


def compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU of the program that is traced: (7, 5) is a T4, (8, 0) an A100, (9, 0) Hopper. None: no GPU, or one of another
    maker."""
    if platform() != "gpu":
        return None
    if _target.get() is not None:
        return _capability.get()
    device = jax.config.values["jax_default_device"]
    device = device if hasattr(device, "platform") else jax.local_devices(backend=device)[0]
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


@contextlib.contextmanager
def compiling_for(name: str, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Ops traced inside choose as on this platform ("cpu", "tpu", "gpu", of that compute capability), whatever device is at hand.

    For kernels in an interpreter. What `jax.jit` has traced before stays as it was: trace a function of its own inside.
    """
    if name not in ("cpu", "tpu", "gpu"):
        raise ValueError(f"compiling_for: expected 'cpu', 'tpu' or 'gpu', got {name!r}")
    token, kind = _target.set(name), _capability.set(capability)
    try:
        yield
    finally:
        _target.reset(token)
        _capability.reset(kind)


@contextlib.contextmanager
def tpu_interpreter(**options) -> Iterator[None]:
    """TPU kernels traced inside run on CPU, in Pallas's TPU interpreter; options as of `pltpu.InterpretParams`."""
    from jax.experimental.pallas import tpu as pltpu

    with compiling_for("tpu"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options)):
        yield


def kernels_run() -> bool:
    """Whether the JAX that is installed is new enough for kernels."""
    return jax.__version_info__ >= KERNELS_NEED


def _too_old(op: str, name: str) -> str:
    needed = ".".join(map(str, KERNELS_NEED))
    return (
        f"{op}: implementation {name!r} is a kernel that needs jax {needed} or newer, and this is jax {jax.__version__}"
    )


def gpu_kernels(*dtypes: jax.typing.DTypeLike, lengths: bool) -> tuple[str, ...]:
    """The kernels of attention, in order of preference, for operands of these types on the GPU of the program that is traced.

    "cudnn", from Ampere on, of rows that a length describes (`lengths`); "pallas_gpu", in Mosaic, on Hopper alone, for whose tensor
    cores it is written. A T4 (7.5) has neither, nor has float32.
    """
    capability = compute_capability()
    if capability is None or any(jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) for dtype in dtypes):
        return ()
    cudnn = ("cudnn",) if lengths and capability >= (8, 0) else ()
    return (*cudnn, "pallas_gpu") if capability[0] == 9 else cudnn


def default_kernel(op: str, name: str, instead: str) -> str:
    """`name`, a kernel that is a platform's default, or `instead` under a JAX that is too old for it, which is said once."""
    if kernels_run():
        return name
    if op not in _told:
        _told.add(op)
        warnings.warn(f"{_too_old(op, name)}; {instead!r} runs instead", stacklevel=3)
    return instead


def load_kernel(op: str, name: str, module: str, others: str) -> ModuleType:
    """The module of a kernel that was asked for; NotImplementedError, before it is imported, under a JAX that is too old for it."""
    if not kernels_run():
        raise NotImplementedError(f"{_too_old(op, name)}; upgrade jax, leave implementation=None or take {others}")
    return importlib.import_module(module)


def require_platform(op: str, implementation: str, needed: str, others: str) -> None:
    """NotImplementedError unless the program is for the platform `needed`; `others` names what runs here instead."""
    if platform() != needed:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} runs on {needed}, and this program is for {platform()}; "
            f"leave implementation=None or take {others}"
        )
