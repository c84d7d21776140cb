"""What comes next, made ahead by a thread, so that the loop can look up while it waits for data."""

import queue
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()


class Feed(Generic[T]):
    """One item of an iterator ahead of the loop."""

    def __init__(self, items: Iterator[T]):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._next: Any = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(items,), name="feed", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the next item (or the end, or the iterator's failure) is there within the time."""
        if self._next is None:
            try:
                self._next = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                return False
        return True

    def take(self) -> T | None:
        """What ``wait`` found; None after the last item. Raises what the iterator raised."""
        found, self._next = self._next, None
        if isinstance(found, BaseException):
            raise found
        return None if found is _END else found

    def close(self) -> None:
        """Let the thread go, after the last item."""
        self._closed.set()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._queue.put(item)
            self._queue.put(_END)
        except BaseException as e:  # of a thread: raised where the item would have been taken
            self._queue.put(e)
        self._closed.wait()  # loader workers that this thread started would die with it
