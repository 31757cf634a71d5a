"""The public SSD op: checks, segments and padding, choice of implementation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from hybridvlm.ops.platforms import default_kernel, load_kernel, platform
from hybridvlm.ops.segments import segment_runs
from hybridvlm.ops.ssd.reference import ssd_reference
from hybridvlm.ops.ssd.xla import ssd_chunked

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Float, Int


class Choice(NamedTuple):
    """What `ssd` does on a platform where the caller does not say."""

    implementation: str
    # tokens per chunk, for that implementation
    chunk_size: int
    # chunks that "associative" works on at once
    block: int
    # tokens per chunk of the implementations that are not the default
    other_chunk_size: int = 128

    def chunk_for(self, implementation: str) -> int:
        return self.chunk_size if implementation == self.implementation else self.other_chunk_size


# Kernels, imported when they are asked for: name -> module. Its
# ssd(x, dt, A, B, C, *, D, reset_index, token_mask, state, chunk_size) takes what `ssd` below has checked: x [B,L,H*P] flat,
# dt [B,L,H] float32 and 0 at padding, A [H] and D [H] (or None) float32, B and C [B,L,G,N], reset_index and token_mask [B,L]
# (see `segment_runs`; both None without segments), state [B,H,P,N] float32, chunk_size None for its own; it returns y like x
# and the final state. It raises NotImplementedError, with the reason, for what it cannot do.
KERNELS = {"pallas_tpu": "hybridvlm.ops.ssd.pallas_tpu", "pallas_gpu": "hybridvlm.ops.ssd.pallas_gpu"}
IMPLEMENTATIONS = ("reference", "associative", "sequential", *KERNELS)

# Measured with `python -m hybridvlm.bench ssd --chunk-sizes 32 64 128` on each platform named here. On 2 CPU cores
# chunks taken one after the other keep the state in cache; the associative scan sends every chunk's state through
# memory several times. TPU by the compiler's accounting, at the 12B's shape in bfloat16: of the bytes that must move,
# `python -m hybridvlm.bench ssd --aot v5p:2x2x1` has the kernel at 1.2 times, sequential at 7.8 and associative at 34;
# `--aot v5e:2x2 --length 131072` at 1.2, 2.6 and no fit, and only the kernel's gradient fits there.
# GPU: XLA's compiler for it estimates no time and the kernel has not been timed. `--aot H200 --implementations associative
# sequential --chunk-sizes 128 256` at the 12B's shape: sequential at 256 passes 20.6 GB through memory in 1,900 short kernels
# and has 0.8 GB of temporaries, associative 32.4 GB in 360 and 3.3 GB.
DEFAULTS = {
    "cpu": Choice("sequential", 64, 1),
    "tpu": Choice("pallas_tpu", 128, 1),
    "gpu": Choice("sequential", 256, 1),
}
OTHER_PLATFORM = Choice("associative", 128, 16)


def default_choice() -> Choice:
    """The choice for the platform that is computed on, or compiled for."""
    return DEFAULTS.get(platform(), OTHER_PLATFORM)


def ssd(
    x: Float[Array, "B L H P"] | Float[Array, "B L HP"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    *,
    D: Float[Array, " H"] | None = None,
    segment: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B H P N"] | None = None,
    initial_segment: Int[Array, " B"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L ..."], Float[Array, "B H P N"]]:
    """Mamba-2's recurrence: state <- exp(dt A) state + dt x B^T, y = state C + D x, head h reading group h // (H/G).

    Decays and states are float32 whatever the dtype of x; products of x, B and C take operands in x.dtype and accumulate
    in float32. Differentiable in every array but the segments.

    Args:
        x: [B,L,H,P], or flat [B,L,H*P], which the kernels read as it is.
        dt: [B,L,H], after softplus.
        A: [H], negative.
        B: [B,L,G,N].
        C: [B,L,G,N].
        D: [H]; None: no skip.
        segment: [B,L] int32; None: all one segment. 0 is padding, which stands only at the end of a row: nothing there is
            read, and its y is 0. The state is reset between two different nonzero segments.
        initial_state: [B,H,P,N]; None: zeros. It is dropped if the row's first segment is not `initial_segment`.
        initial_segment: [B] int32, the segment of `initial_state`; None: the row's first one.
        chunk_size: tokens per chunk of the chunked implementations (None: the platform's); any L works with any of them.
        implementation: "reference" (token scan), "associative" (chunks combined by `jax.lax.associative_scan`),
            "sequential" (chunks one after the other), "pallas_tpu" or "pallas_gpu" (kernels). One that is named runs or
            raises. None takes the platform's choice in `DEFAULTS`; where that cannot take the arguments, "sequential",
            with a warning.

    Returns:
        y in the shape and dtype of x, and the final state [B,H,P,N] float32, that after the last real token; a row of only
        padding hands its incoming state on.

    Raises:
        ValueError: for shapes that do not fit together, and for an unknown implementation.
        NotImplementedError: with the reason, for a kernel that cannot run on this platform or for these arguments.
    """
    _check(x, dt, A, B, C, D, segment, initial_state, initial_segment)
    default = default_choice()
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"ssd: implementation must be one of {IMPLEMENTATIONS} or None, got {implementation!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1, got {chunk_size}")

    arrays = _masked(x, dt, A, B, C, D, segment, initial_state, initial_segment)
    chosen = implementation or default.implementation
    if implementation is None and chosen in KERNELS:
        chosen = default_kernel("ssd", chosen, "sequential")
    try:
        y, final = _run(chosen, arrays, chunk_size)
    except NotImplementedError as reason:
        if implementation is not None:
            raise
        warnings.warn(f"ssd: 'sequential' instead of the platform's {chosen!r}: {reason}", stacklevel=2)
        y, final = _run("sequential", arrays, chunk_size)
    y = y.reshape(x.shape)
    return (y if segment is None else _where_token(segment > 0, y)), final


class _Arrays(NamedTuple):
    """What implementations take: x as it was given, flat or by heads, decays and the state in float32, nothing at padding."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    reset_index: jax.Array | None
    token_mask: jax.Array | None
    state: jax.Array


def _masked(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    segment: jax.Array | None,
    initial_state: jax.Array | None,
    initial_segment: jax.Array | None,
) -> _Arrays:
    """The arguments of `ssd`, padding zeroed and the incoming state dropped where another segment follows."""
    b, _, h = dt.shape
    dt, A = dt.astype(jnp.float32), A.astype(jnp.float32)
    D = None if D is None else D.astype(jnp.float32)
    p, n = x.shape[2] // h if x.ndim == 3 else x.shape[3], B.shape[3]
    state = jnp.zeros((b, h, p, n), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    if segment is None:
        return _Arrays(x, dt, A, B, C, D, None, None, state)
    token_mask = segment > 0
    reset_index = segment_runs(segment, initial_segment)
    # Padding is zeroed by selecting, not by multiplying: 0 * NaN is NaN, also in the backward pass.
    x, dt, B, C = (_where_token(token_mask, v) for v in (x, dt, B, C))
    # A reset before the first token: the incoming state is of another segment.
    state = jnp.where((reset_index[:, 0] > 0)[:, None, None, None], 0.0, state)
    return _Arrays(x, dt, A, B, C, D, reset_index, token_mask, state)


def _run(implementation: str, arrays: _Arrays, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    """y, flat or by heads, and the final state; NotImplementedError where a kernel cannot take the arrays."""
    b, length, h = arrays.dt.shape
    if implementation in KERNELS:
        kernel = load_kernel("ssd", implementation, KERNELS[implementation], "'associative' or 'sequential'").ssd
        # reshaped here alone: what is flat stays so on its way to a kernel
        x, dt, A, B, C, *_ = arrays._replace(x=arrays.x.reshape(b, length, -1))
        named = {name: getattr(arrays, name) for name in ("D", "reset_index", "token_mask", "state")}
        return kernel(x, dt, A, B, C, **named, chunk_size=chunk_size)
    arrays = arrays._replace(x=arrays.x.reshape(b, length, h, -1))
    if implementation == "reference":
        return ssd_reference(*arrays)
    default = default_choice()
    return ssd_chunked(
        *arrays,
        chunk_size=chunk_size or default.chunk_for(implementation),
        block=default.block,
        associative=implementation == "associative",
    )


def _where_token(token_mask: jax.Array, v: jax.Array) -> jax.Array:
    """v [B,L,...] where `token_mask` [B,L], and 0 at padding."""
    return jnp.where(token_mask.reshape(*token_mask.shape, *(1,) * (v.ndim - 2)), v, 0)


def ssd_step(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: jax.Array, D: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `ssd`, for decoding: x [B,H,P], dt [B,H] (after softplus), A [H], B and C [B,G,N], D [H] or None.

    state [B,H,P,N] float32 -> y [B,H,P] in x.dtype and the next state [B,H,P,N] float32.
    """
    batch, heads, p = x.shape
    groups, n = B.shape[1:]
    if state.shape != (batch, heads, p, n):
        raise ValueError(
            f"ssd_step: state does not fit x [B,H,P] = {x.shape} and B [B,G,N] = {B.shape}, "
            f"expected {(batch, heads, p, n)}, got {state.shape}"
        )
    dt = dt.astype(jnp.float32)
    u = x.astype(jnp.float32)
    decay = jnp.exp(dt * A.astype(jnp.float32)).reshape(batch, groups, -1, 1, 1)
    inflow = (u * dt[..., None]).reshape(batch, groups, -1, p, 1) * B.astype(jnp.float32)[:, :, None, None]
    state = decay * state.astype(jnp.float32).reshape(batch, groups, -1, p, n) + inflow
    # A product and a sum instead of a matmul: exact float32 on every platform, and one pass over the state.
    y = jnp.sum(state * C.astype(jnp.float32)[:, :, None, None], axis=-1).reshape(batch, heads, p)
    if D is not None:
        y = y + D.astype(jnp.float32)[:, None] * u
    return y.astype(x.dtype), state.reshape(batch, heads, p, n)


def _check(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    segment: jax.Array | None,
    initial_state: jax.Array | None,
    initial_segment: jax.Array | None,
) -> None:
    if x.ndim not in (3, 4) or not all(x.shape):
        raise ValueError(f"ssd: x must be [B,L,H,P] or [B,L,H*P] with at least one of each, got {x.shape}")
    if B.ndim != 4 or not all(B.shape):
        raise ValueError(f"ssd: B must be [B,L,G,N] with at least one of each, got {B.shape}")
    b, length = x.shape[:2]
    h = A.size if x.ndim == 3 else x.shape[2]
    if x.ndim == 3 and (h < 1 or x.shape[2] % h):
        raise ValueError(
            f"ssd: len(A), the number of heads, must divide x.shape[2] of x [B,L,H*P] = {x.shape}, got {A.shape}"
        )
    p = x.shape[2] // h if x.ndim == 3 else x.shape[3]
    g, n = B.shape[2:]
    if h % g:
        raise ValueError(f"ssd: the groups of B must divide the heads of x, expected a divisor of {h}, got {g}")
    expected = {
        "dt": (dt, (b, length, h)),
        "A": (A, (h,)),
        "B": (B, (b, length, g, n)),
        "C": (C, (b, length, g, n)),
        "D": (D, (h,)),
        "segment": (segment, (b, length)),
        "initial_state": (initial_state, (b, h, p, n)),
        "initial_segment": (initial_segment, (b,)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"ssd: {name} does not fit x [B,L,H,P] = {x.shape} and B [B,L,G,N] = {B.shape}, "
                f"expected {shape}, got {value.shape}"
            )
    if initial_segment is not None and segment is None:
        raise ValueError("ssd: initial_segment needs segment to be compared with; give segment [B,L] as well")
