"""Small calls of attention by name."""

import numpy as np


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def places(b: int, length: int, start: int = 0) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (b, length))


def packed(rng: np.random.Generator, b: int, length: int, padding: int) -> np.ndarray:
    """Segments 1..3 one after the other, `padding` places free at the end."""
    segment = np.sort(rng.integers(1, 4, (b, length)), axis=1).astype(np.int32)
    segment[:, length - padding :] = 0
    return segment


def case(name: str) -> tuple[tuple[np.ndarray, ...], dict]:
    """(q, k, v), the keyword arguments of attention. Small ones are for the loop, `long` ones reach several tiles."""
    rng = np.random.default_rng(sum(map(ord, name)))

    def qkv(b, t, length, heads, kv_heads, width):
        return (
            normal(rng, b, t, heads, width),
            normal(rng, b, length, kv_heads, width),
            normal(rng, b, length, kv_heads, width),
        )

    if name == "plain":
        return qkv(1, 13, 13, 4, 4, 8), {}
    if name == "grouped":
        return qkv(2, 13, 13, 6, 2, 8), {}
    if name == "padded and packed":
        segment = packed(rng, 2, 21, 4)
        return qkv(2, 21, 21, 4, 2, 8), {"q_segment": segment, "kv_segment": segment}
    if name == "only padding":
        zero = np.zeros((1, 12), np.int32)
        return qkv(1, 12, 12, 2, 1, 8), {"q_segment": zero, "kv_segment": zero}
    if name == "few rows, long cache":
        segment = packed(rng, 2, 40, 5)
        own = np.array([[2, 2, 3], [1, 0, 0]], np.int32)
        index = np.array([[30, 31, 35], [9, 0, 0]], np.int32)
        return qkv(2, 3, 40, 4, 2, 8), {
            "q_segment": own,
            "kv_segment": segment,
            "q_index": index,
            "kv_index": places(2, 40),
        }
    if name == "one row, not causal":
        segment = (places(2, 30) < [[30], [17]]).astype(np.int32)
        return qkv(2, 1, 30, 4, 2, 8), {"q_segment": np.ones((2, 1), np.int32), "kv_segment": segment, "causal": False}
    if name == "scattered indices":
        segment = packed(rng, 1, 24, 3)
        index = np.sort(rng.choice(100, (1, 24), replace=False)).astype(np.int32)
        return qkv(1, 24, 24, 4, 1, 8), {
            "q_segment": segment,
            "kv_segment": segment,
            "q_index": index,
            "kv_index": index - 2,
        }
    if name == "long":
        return qkv(1, 700, 700, 2, 1, 8), {}
    if name == "long, packed":
        segment = packed(rng, 2, 800, 150)
        segment[1, 20:] = 0  # tiles that nobody sees
        return qkv(2, 800, 800, 4, 2, 8), {"q_segment": segment, "kv_segment": segment}
    if name == "long, more keys than queries":
        ones = np.ones((1, 300), np.int32), np.ones((1, 900), np.int32)
        return qkv(1, 300, 900, 4, 2, 8), {
            "q_segment": ones[0],
            "kv_segment": ones[1],
            "q_index": places(1, 300, 500),
            "kv_index": places(1, 900),
        }
    if name == "long, more queries than keys":
        return qkv(1, 600, 300, 2, 2, 8), {}
    if name == "long, not causal":
        segment = packed(rng, 1, 600, 10)
        return qkv(1, 600, 600, 5, 1, 8), {"q_segment": segment, "kv_segment": segment, "causal": False}
    if name == "long, order reversed":
        index = np.ascontiguousarray(places(1, 520)[:, ::-1])
        return qkv(1, 520, 520, 2, 1, 8), {"q_index": index, "kv_index": index}
    raise KeyError(name)
