"""Whether layers keep what their backward pass needs: a switch of each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Switch(threading.local):
    enabled = True


_switch = _Switch()


def is_grad_enabled() -> bool:
    """Whether a forward pass on this thread can be followed by a backward pass."""
    return _switch.enabled


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Inside this context, or a function decorated with it, layers keep nothing for a backward pass.

    Activations are freed as soon as the next layer has read them. The switch is the calling thread's own.

    Examples
    --------
    >>> with fastcnn.no_grad():
    ...     logits = net(x)
    """
    before = _switch.enabled
    _switch.enabled = False
    try:
        yield
    finally:
        _switch.enabled = before
