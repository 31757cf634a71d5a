"""Videos decoded on threads of their own while the model computes: a batch ahead, and no more of it than memory is given for."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from hybridvlm.eval.tasks import Task
from hybridvlm.models.media import Clip

THREADS = 2  # FFmpeg spreads one video over the cores by itself
MOST_BYTES = 2 << 30  # of frames that are decoded and not asked for yet

ItemT = TypeVar("ItemT")


class Ahead:
    """Clips of a task, decoded before they are asked for.

    Args:
        task: whose clips they are.
        bytes_of: size of a video's decoded frames.
        threads: videos at a time.
        most: bytes of frames that lie here; one video is decoded however large it is.

    Attributes:
        waited: seconds that the caller has waited for clips so far.
    """

    def __init__(self, task: Task, bytes_of: Callable[[str], int], *, threads: int = THREADS, most: int = MOST_BYTES):
        self.task, self._bytes_of, self._threads, self._most = task, bytes_of, threads, most
        self.waited = 0.0
        self._waiting: dict[str, concurrent.futures.Future[tuple[Clip, Any]]] = {}
        self._next: collections.deque[str] = collections.deque()  # for which there is no room yet
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def over(self, items: Sequence[ItemT], videos_of: Callable[[ItemT], Iterable[str]]) -> Iterator[ItemT]:
        """The items one by one, the videos of the next one being decoded while the caller is at work on one.

        Args:
            items: batches, say.
            videos_of: the videos that an item will ask for, in that order.
        """
        with concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            self._pool = pool
            try:
                for place, item in enumerate(items):
                    wanted = dict.fromkeys(video for near in items[place : place + 2] for video in videos_of(near))
                    for video in set(self._waiting) - set(wanted):
                        self._waiting.pop(video).cancel()
                    self._next = collections.deque(video for video in wanted if video not in self._waiting)
                    self._fill()
                    yield item
            finally:
                for future in self._waiting.values():
                    future.cancel()
                self._waiting.clear()
                self._next.clear()
                self._pool = None

    def _fill(self) -> None:
        """Begin with the next videos, as many as there is room for."""
        held = sum(map(self._bytes_of, self._waiting))
        while self._pool is not None and self._next:
            held += self._bytes_of(self._next[0])
            if self._waiting and held > self._most:
                return
            video = self._next.popleft()
            self._waiting[video] = self._pool.submit(self.task.clip, video)

    def clip(self, video: str) -> tuple[Clip, Any]:
        """As `Task.clip`, waiting for it where it is under way; what it raised there is raised here."""
        began = time.perf_counter()
        try:
            if video in self._next:
                self._next.remove(video)
            future = self._waiting.pop(video, None)
            return self.task.clip(video) if future is None else future.result()
        finally:
            self.waited += time.perf_counter() - began
            self._fill()
