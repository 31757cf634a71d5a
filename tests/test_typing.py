"""Signatures of the public ops, held against real arrays."""

import inspect
import typing

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError, jaxtyped

import hybridvlm.typing
from hybridvlm.ops import attention, causal_conv1d, ssd
from hybridvlm.ops.norms import layer_norm, rms_norm

B, L, D, H, K, P, G, N, W = 2, 5, 6, 4, 2, 3, 2, 7, 4


def fits(hint, value) -> bool:
    """Whether an argument is of one of the kinds that its annotation names."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type)]
    return any(isinstance(value, kind) for kind in kinds if kind is not typing.Any)


def check(function, *args, **kwargs):
    """The function's results, after its arguments and they were held against its signature: a letter has one size in all of it."""
    names = vars(hybridvlm.typing) | vars(inspect.getmodule(function))
    hints = typing.get_type_hints(function, names)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    with jaxtyped("context"):
        for name, value in given.items():
            if not fits(hints[name], value):
                raise TypeCheckError(f"{function.__name__}: {name} is {hints[name]}, got {value.shape}")
        out = function(*args, **kwargs)
        returns = hints["return"]
        parts = zip(typing.get_args(returns), out, strict=True) if isinstance(out, tuple) else [(returns, out)]
        for hint, value in parts:
            if not fits(hint, value):
                raise TypeCheckError(f"{function.__name__} returns {hint}, got {value.shape}")
    return out


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def scan_arguments():
    x, dt, a, b, c = arrays((B, L, H, P), (B, L, H), (H,), (B, L, G, N), (B, L, G, N))
    return x, jnp.abs(dt), -jnp.abs(a), b, c


def test_ssd():
    x, *rest = scan_arguments()
    segment = jnp.ones((B, L), jnp.int32)
    check(ssd, x, *rest, segment=segment)
    check(ssd, x.reshape(B, L, H * P), *rest, segment=segment)


def test_attention():
    q, k, v = arrays((B, L, H, P), (B, L, K, P), (B, L, K, P))
    segment = jnp.ones((B, L), jnp.int32)
    check(attention, q, k, v, q_segment=segment, kv_segment=segment)


def test_convolution_and_norms():
    x, weight, bias, state = arrays((B, L, D), (W, D), (D,), (B, W - 1, D))
    check(causal_conv1d, x, weight, bias, segment=jnp.ones((B, L), jnp.int32), initial_state=state)
    check(rms_norm, x, bias)
    check(layer_norm, x, bias, bias)


def test_what_does_not_fit_is_found():
    x, dt, a, b, c = scan_arguments()
    with pytest.raises(TypeCheckError, match=r"ssd: C is .*B L G N"):
        check(ssd, x, dt, a, b, c[:, :, :, 1:])
    with pytest.raises(TypeCheckError, match=r"rms_norm: weight is "):
        check(rms_norm, x, jnp.ones((P,), jnp.int32))
