"""The attention that models call: one signature, several implementations."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.attention.xla import FEW_ROWS
from hybridvlm.ops.platforms import default_kernel, gpu_kernels, load_kernel, platform

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Float, Int

# name -> module, imported when it is asked for. Its attention(q, k, v, *, q_segment, kv_segment, q_index, kv_index, causal,
# scale) takes what `attention` below has checked, None for what was not given, and raises NotImplementedError, with
# the reason, for what it cannot do. tokamax (0.0.12) has no entry: its public dot_product_attention returns no log-sum-exp and takes
# segments as a whole mask [T,L] alone, so that an adapter could do nothing but raise.
IMPLEMENTATIONS = {
    "reference": "hybridvlm.ops.attention.reference",
    "xla": "hybridvlm.ops.attention.xla",
    "pallas_tpu": "hybridvlm.ops.attention.pallas_tpu",
    "pallas_gpu": "hybridvlm.ops.attention.pallas_gpu",
    "splash": "hybridvlm.ops.attention.splash",
    "cudnn": "hybridvlm.ops.attention.cudnn",
}

KERNELS = ("pallas_tpu", "pallas_gpu", "splash", "cudnn")

# By `python -m hybridvlm.bench attention --aot v5e:2x2` (v5p:2x2x1, v6e:2x2): what the compilers for TPU count. Of GPUs `gpu_kernels`
# tells: XLA's compiler for them estimates no time, and by its accounting (hybridvlm/ops/README.md) its own tiles take five orders
# of magnitude more kernels than cuDNN. On CPU a kernel cannot run.
DEFAULTS = {"tpu": "pallas_tpu"}


def attention(
    q: Float[Array, "B T H P"],
    k: Float[Array, "B L K P"],
    v: Float[Array, "B L K Q"],
    *,
    q_segment: Int[Array, "B T"] | None = None,
    kv_segment: Int[Array, "B L"] | None = None,
    q_index: Int[Array, "B T"] | None = None,
    kv_index: Int[Array, "B L"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    one_segment: bool = False,
    return_lse: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Q"], Float[Array, "B H T"] | Any]:
    """Grouped-query softmax attention.

    Query head h reads kv head h // (H // K), and nothing is repeated in memory. A query sees a key if both are of the same
    nonzero segment and, when `causal`, kv_index <= q_index. Nothing at padding (segment 0) is read, NaN and infinities
    included. There is no mask, bias, window or soft cap.

    | implementation | platform | memory | limits |
    |---|---|---|---|
    | "xla" | any | a few tiles and their float32 accumulators | no forward-mode derivative for more than 8 rows |
    | "reference" | any | the whole matrix | |
    | "pallas_tpu", "pallas_gpu" | TPU, NVIDIA | O(T + L) | no forward-mode derivative |
    | "splash" | TPU | O(T + L) | no indices, no gradient of lse |
    | "cudnn" | NVIDIA, Ampere or later | O(T + L) | 16 bit, lse too; `one_segment` alone, no indices, no gradient of lse |

    Args:
        q: [B,T,H,P].
        k: [B,L,K,P].
        v: [B,L,K,Q]; Q may differ from P.
        q_segment: [B,T] int32; None: all one segment.
        kv_segment: [B,L] int32; None: all one segment.
        q_index: [B,T] int32; None: 0, 1, ...
        kv_index: [B,L] int32; None: 0, 1, ...
        causal: whether a query sees only keys up to its own index.
        scale: multiplies q·k (None: P ** -0.5).
        one_segment: a promise about the segments: of each row there is one, from its first token on, the same for queries and
            keys, and all after it is padding. Not checked.
        return_lse: whether lse is needed.
        implementation: one of the table; it runs or raises. None takes the platform's; "xla" for mixed or other dtypes than
            float32 and bfloat16 and for up to 8 rows; and "xla", with a warning, where the platform's kernel cannot take the
            arguments. On a TPU that is "pallas_tpu"; on NVIDIA GPUs since Ampere "cudnn" where `one_segment` holds (or there
            are no segments), no index is given and lse is not needed; on Hopper else "pallas_gpu".

    Returns:
        out [B,T,H,Q] in q.dtype, and lse [B,H,T] float32, the log-sum-exp of the scaled scores (None where it is not needed);
        both differentiable. A row that sees nothing (padding) has out 0 and lse -1e30. Two results over disjoint keys merge by
        lse = logaddexp(lse1, lse2), out = out1 * exp(lse1 - lse) + out2 * exp(lse2 - lse).

    Raises:
        ValueError: for shapes or segments that do not fit together, or an unknown implementation.
        NotImplementedError: with the reason, for a named implementation that cannot run on this platform or for these
            arguments.
    """
    check_shapes(q, k, v, q_segment, kv_segment, q_index, kv_index)
    run = functools.partial(
        attend_unmasked,
        q_segment=q_segment,
        kv_segment=kv_segment,
        q_index=q_index,
        kv_index=kv_index,
        causal=causal,
        scale=scale,
        one_segment=one_segment,
        return_lse=return_lse,
        implementation=implementation,
    )
    if q_segment is None or kv_segment is None:
        return run(q, k, v)
    # Padding is zeroed by selecting, not by multiplying: 0 * NaN is NaN, also in the backward pass.
    real, kv_real = q_segment > 0, kv_segment > 0
    q, k, v = (jnp.where(mask[..., None, None], x, 0) for x, mask in ((q, real), (k, kv_real), (v, kv_real)))
    out, lse = run(q, k, v)
    return jnp.where(real[..., None, None], out, 0), None if lse is None else jnp.where(real[:, None], lse, EMPTY_LSE)


def attend_unmasked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment: jax.Array | None = None,
    kv_segment: jax.Array | None = None,
    q_index: jax.Array | None = None,
    kv_index: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    one_segment: bool = False,
    return_lse: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, Any]:
    """Like `attention`, of arrays that are finite at padding too, as caches are: the pass that zeroes padding is left out."""
    options: dict[str, Any] = {
        "q_segment": q_segment,
        "kv_segment": kv_segment,
        "q_index": q_index,
        "kv_index": kv_index,
        "causal": causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
    }
    by_length = (one_segment or q_segment is None) and q_index is None and kv_index is None

    def run(name: str) -> tuple[jax.Array, Any]:
        given = dict(options)
        if name == "cudnn" and by_length and q_segment is not None and kv_segment is not None:
            pairs = (("q", q_segment), ("kv", kv_segment))
            given |= {f"{side}_segment": None for side, _ in pairs}
            given |= {f"{side}_length": jnp.sum(ids > 0, axis=1, dtype=jnp.int32) for side, ids in pairs}
        out, lse = load(IMPLEMENTATIONS, name).attention(q, k, v, **given)
        return out, lse if return_lse else None

    if implementation is not None:
        return run(implementation)
    # cuDNN's log-sum-exp comes rounded to the type of its operands
    return first_that_runs(
        "attention", default_implementations(DEFAULTS, q, k, v, lengths=by_length and not return_lse), run
    )


ResultT = TypeVar("ResultT")


def first_that_runs(op: str, names: Sequence[str], run: Callable[[str], ResultT]) -> ResultT:
    """run(name) of the first of several implementations that takes the arguments; a warning says why others did not."""
    for name in names[:-1]:
        try:
            return run(name)
        except NotImplementedError as reason:
            warnings.warn(f"{op}: not the platform's {name!r}: {reason}", stacklevel=4)
    return run(names[-1])


def default_implementations(defaults: dict[str, str], *operands: Any, lengths: bool = False) -> tuple[str, ...]:
    """The implementations to try for operands (operands[0] are the queries) on the platform of the program that is traced, "xla" last.

    The platform's kernels; none for operands of types that no kernel takes, and for a few rows, which are bound by reading the
    keys where they lie. lengths: whether a length describes each row.
    """
    dtypes = {x.dtype for x in operands}
    takes_dtype = len(dtypes) == 1 and dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    if not takes_dtype or operands[0].shape[1] <= FEW_ROWS:
        return ("xla",)
    here = platform()
    names = gpu_kernels(*dtypes, lengths=lengths) if here == "gpu" else (defaults.get(here, "xla"),)
    names = tuple(default_kernel("attention", name, "xla") if name in KERNELS else name for name in names)
    return tuple(dict.fromkeys((*names, "xla")))


def load(implementations: dict[str, str], name: str) -> ModuleType:
    """The module of an implementation; ValueError if there is none of the name."""
    if name not in implementations:
        raise ValueError(f"implementation: expected one of {sorted(implementations)}, got {name!r}")
    if name in KERNELS:
        return load_kernel("attention", name, implementations[name], "'xla'")
    return importlib.import_module(implementations[name])


def check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    q_segment: jax.Array | None,
    kv_segment: jax.Array | None,
    q_index: jax.Array | None,
    kv_index: jax.Array | None,
) -> None:
    """ValueError, with what was expected and what came, unless the arguments of an attention fit together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q, k: expected q [B,T,H,P] and k [B,L,K,P], got {q.shape} and {k.shape}")
    b, t, heads, width = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    if not all((b, heads, width, *k.shape)):
        raise ValueError(
            f"q, k: expected at least one example, head, key and head width, got q [B,T,H,P] = {q.shape} and k [B,L,K,P] = {k.shape}; "
            "leave the call out where there is nothing to attend to"
        )
    if k.shape[0] != b or k.shape[3] != width:
        raise ValueError(f"k: expected [{b},L,K,{width}] to match q {q.shape}, got {k.shape}")
    if heads % kv_heads:
        raise ValueError(f"q: expected a number of heads that is a multiple of k's {kv_heads}, got {heads}")
    if v is not None and (v.ndim != 4 or v.shape[:3] != k.shape[:3]):
        raise ValueError(f"v: expected {k.shape[:3]} and a head width, to match k, got {v.shape}")
    if (q_segment is None) != (kv_segment is None):
        raise ValueError(
            "q_segment, kv_segment: expected both or neither, got one; pass ones for a row without padding"
        )
    for name, array, shape in (
        ("q_segment", q_segment, (b, t)),
        ("q_index", q_index, (b, t)),
        ("kv_segment", kv_segment, (b, length)),
        ("kv_index", kv_index, (b, length)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
