"""Preparing batches in a thread while the last one is in use."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_STOP = object()
# Seconds that the end of the interpreter waits for a batch being made.
_PATIENCE = 5.0


class _Lane:
    """What the thread and the iterator share. The iterator is not in it, so that it can be collected."""

    def __init__(self, depth: int):
        # SimpleQueue.put may be called from a finalizer; a Semaphore or Condition could deadlock there.
        self.tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopped = False
        self.owner = os.getpid()
        for _ in range(depth):
            self.tokens.put(None)

    def run(self, make: Callable[[int], Any], count: int) -> None:
        """The thread: make one item for each token."""
        try:
            for index in range(count):
                if self.tokens.get() is _STOP or self.stopped:
                    break
                self.ready.put((make(index), None))
            self.ready.put((None, StopIteration()))
        except BaseException as error:
            self.ready.put((None, error))

    def stop(self) -> None:
        if self.owner == os.getpid():
            self.stopped = True
            self.tokens.put(_STOP)


class Prefetched:
    """An iterator over ``make(0)``, ..., ``make(count - 1)``, made up to `depth` ahead by a thread.

    An exception in `make` is raised where the item would have come. The thread ends with the last item, with
    `close`, and when the iterator is collected. A forked child, which has no such thread, goes on by itself.
    """

    def __init__(self, make: Callable[[int], Any], count: int, depth: int = 2):
        self._make, self._count, self._next = make, count, 0
        self._lane = _Lane(depth)
        self._thread = threading.Thread(
            target=self._lane.run, args=(make, count), name="fastcnn-prefetch", daemon=True
        )
        # A finalizer may run in any thread and at any point, so it waits for nothing.
        weakref.finalize(self, self._lane.stop).atexit = False
        _running.add(self)
        self._thread.start()

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> Any:
        if self._next >= self._count:
            self.close()
            raise StopIteration
        if self._lane.owner != os.getpid():
            item = self._make(self._next)
            self._next += 1
            return item
        item, error = self._lane.ready.get()
        if error is not None:
            self.close()
            raise error
        self._lane.tokens.put(None)
        self._next += 1
        return item

    def close(self, timeout: float | None = None) -> None:
        """End the thread; the iterator is at its end then."""
        self._next = self._count
        self._lane.stop()
        if self._lane.owner == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(timeout)


_running: weakref.WeakSet[Prefetched] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """No thread may be in compiled code when the interpreter goes."""
    for iterator in list(_running):
        iterator.close(_PATIENCE)
