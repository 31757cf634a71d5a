"""Videos decoded on threads of their own while the model computes, a batch ahead and no further."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from hybridvlm.eval.tasks import Task
from hybridvlm.models.media import Clip

THREADS = 2  # FFmpeg spreads one video over the cores by itself


ItemT = TypeVar("ItemT")


class Ahead:
    """Clips of a task, decoded before they are asked for.

    Args:
        task: whose clips they are.
        threads: videos at a time.
    """

    def __init__(self, task: Task, threads: int = THREADS):
        self.task, self._threads = task, threads
        self._waiting: dict[str, concurrent.futures.Future[tuple[Clip, Any]]] = {}

    def over(self, items: Sequence[ItemT], videos_of: Callable[[ItemT], Iterable[str]]) -> Iterator[ItemT]:
        """The items one by one, the videos of the next one being decoded while the caller is at work on one.

        Args:
            items: batches, say.
            videos_of: the videos that an item will ask for.
        """
        with concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            try:
                for place, item in enumerate(items):
                    wanted = [video for near in items[place : place + 2] for video in videos_of(near)]
                    for video in set(self._waiting) - set(wanted):
                        self._waiting.pop(video).cancel()
                    for video in dict.fromkeys(wanted):
                        if video not in self._waiting:
                            self._waiting[video] = pool.submit(self.task.clip, video)
                    yield item
            finally:
                for future in self._waiting.values():
                    future.cancel()
                self._waiting.clear()

    def clip(self, video: str) -> tuple[Clip, Any]:
        """As `Task.clip`, waiting for it where it is under way; what it raised there is raised here."""
        future = self._waiting.pop(video, None)
        return self.task.clip(video) if future is None else future.result()
