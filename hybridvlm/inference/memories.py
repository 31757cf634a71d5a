"""What questions about a video share, held for those to come: on the devices as far as these have room, then in the host's memory."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any

import jax

from hybridvlm.hardware import memory_limit

DEVICE_SHARE = 8  # a memory may take one part in so many of a device's memory while it waits
HOST = "pinned_host"


class VideoMemories:
    """Video memories (`ModelPrograms.build_video_memory`) by key, those used last first.

    Args:
        count: how many are held at most; the one that was not asked for longest goes.
        device_bytes: bytes of them that may lie on each device between questions (default: an eighth of its memory, and all
            where that is not known, as on CPU). What is over moves to the host, and back when it is asked for.
    """

    def __init__(self, count: int = 1, device_bytes: int | None = None):
        limit = memory_limit(jax.local_devices()[0]) if device_bytes is None else None
        self.count = count
        self.device_bytes = device_bytes if limit is None else limit // DEVICE_SHARE
        self._held: collections.OrderedDict[Hashable, tuple[Any, Any]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Any]) -> tuple[Any, bool]:
        """(the memory of a key, on its devices, and whether it was there already); made, and others let go, where it was not."""
        found = key in self._held
        if found:
            held, where = self._held.pop(key)
            memory = jax.device_put(held, where)
        else:
            while len(self._held) >= self.count:
                self._held.popitem(last=False)
            memory = make()
            where = jax.tree.map(lambda a: a.sharding, memory)
        self._held[key] = memory, where
        return memory, found

    def spill(self) -> None:
        """Move to the host what the devices should not keep until the next question; called once a memory has been read."""
        if self.device_bytes is None:
            return
        room = self.device_bytes
        for key in reversed(self._held):
            memory, where = self._held[key]
            room -= on_device(memory)
            if room < 0:
                to = jax.tree.map(lambda s: s.with_memory_kind(HOST), where)
                self._held[key] = jax.device_put(memory, to), where

    def clear(self) -> None:
        self._held.clear()


def on_device(memory: Any) -> int:
    """Bytes of a tree of arrays that the fullest device holds."""
    sizes: collections.Counter[Any] = collections.Counter()
    for array in jax.tree.leaves(memory):
        if array.sharding.memory_kind != HOST:
            for shard in array.addressable_shards:
                sizes[shard.device] += shard.data.nbytes
    return max(sizes.values(), default=0)
