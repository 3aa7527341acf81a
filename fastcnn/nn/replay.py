"""Forward passes of one image, recorded once and then played again.

What a small network computes on one image takes less time than Python takes to call its kernels: checks,
output shapes, the choice of a way, Numba's look at every argument. All of that follows from the layers'
settings and the input's shape. So the second forward pass of a shape without gradients is recorded (see
`kernels.threads.Recording`), and those after it copy the image in, do the recorded jobs, and copy the result
out. The jobs are the same, hence also the bits of the result.

Nothing is recorded but what the jobs can be trusted with. Layers are of classes known to leave all work on
images to kernels. Weights are read where they lie, whenever the jobs are done, so that they may change. What
NumPy prepares (biases, slopes, statistics) is compared with what it was, and recorded anew when it differs.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _buffers
from ..kernels.cpu.winograd import get_winograd
from ..kernels.threads import NotRecordedError, Recording, get_num_threads, is_recording
from . import activation, batchnorm, conv, dropout, linear, pooling
from ._arrays import inverse, memory_order
from .fusion import get_fusion
from .module import structure_version
from .parameter import FLOATS, layout_version

if TYPE_CHECKING:
    from .container import Sequential
    from .module import Module

# Elements of an input: larger ones keep their kernels busy for much longer than Python takes.
_LARGEST = 1 << 16
# Recordings of a network, each with memory for all of its activations.
_MOST = 4

_LAYERS = (
    activation.Identity,
    activation.LeakyReLU,
    activation.PReLU,
    activation.ReLU,
    batchnorm.BatchNorm2d,
    conv.Conv2d,
    dropout.Dropout,
    linear.Flatten,
    linear.Linear,
    pooling.AvgPool2d,
    pooling.MaxPool2d,
)


def _is_playable(module: Module) -> bool:
    """Whether all that a layer does to one image in a forward pass is done by kernels."""
    if type(module) not in _LAYERS or {"forward", "backward"} & vars(module).keys():
        return False
    if isinstance(module, conv.Conv2d):
        return module.padding_mode == "zeros" and module.groups == 1
    if isinstance(module, batchnorm.BatchNorm2d):
        return not module.training and module.track_running_stats
    if isinstance(module, dropout.Dropout):
        return not module.training or module.p == 0
    return not (isinstance(module, pooling.MaxPool2d) and module.return_indices)


class _Pass:
    """One recorded forward pass."""

    def __init__(self, net: Sequential, input: np.ndarray, small: list[np.ndarray]):
        self._lock = threading.Lock()
        self._small = small
        self._values = [array.tobytes() for array in small]
        order = memory_order(input)
        memory = _buffers.empty(input.transpose(order).shape, input.dtype)
        self._input = memory.transpose(inverse(order))
        np.copyto(self._input, input)
        with Recording() as self._jobs:
            self._output = net._run(self._input)

    def holds(self) -> bool:
        """Whether what NumPy prepared would be the same now."""
        return [array.tobytes() for array in self._small] == self._values

    def play(self, input: np.ndarray) -> np.ndarray | None:
        """The result for another input; None while another thread is at it."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            np.copyto(self._input, input)
            self._jobs.play()
            return self._output.copy("K")
        finally:
            self._lock.release()


class Replay:
    """The recorded passes of one Sequential, forgotten when any module anywhere has changed."""

    def __init__(self, container: type[Sequential]) -> None:
        self._container = container
        self._state: tuple = ()
        self._attributes: list[dict[str, Any]] = []
        self._playable = False
        self._small: list[np.ndarray] = []
        # None for an input that was seen once.
        self._passes: dict[Any, _Pass | None] = {}

    def forward(self, net: Sequential, input: Any) -> np.ndarray | None:
        """`net`'s result without gradients; None where its layers are to be run one after the other."""
        if type(input) is not np.ndarray or not 0 < input.size <= _LARGEST or is_recording():
            return None
        state = (structure_version(), layout_version(), get_num_threads(), get_fusion(), get_winograd())
        if state != self._state:
            self._begin(net, state)
        if not self._playable or (input.ndim == 4 and len(input) > 1):
            return None
        key = (input.shape, input.strides, input.dtype)
        known = self._passes.get(key)
        if known is None or not known.holds():
            return self._record(net, input, key)
        # As every forward pass without gradients does.
        for attributes in self._attributes:
            attributes["_saved"] = None
        return known.play(input)

    def _begin(self, net: Sequential, state: tuple) -> None:
        self._state = state
        self._passes = {}
        modules = list(net.modules())
        self._attributes = [vars(module) for module in modules]
        self._playable = all(
            module is net or type(module) is self._container or _is_playable(module) for module in modules
        )
        memories = [parameter.memory for _, parameter in net.named_parameters()]
        self._playable &= all(isinstance(memory, np.ndarray) for memory in memories)
        self._small = [memory for memory in memories if memory.ndim < 2]
        self._small += [buffer for _, buffer in net.named_buffers()]

    def _record(self, net: Sequential, input: np.ndarray, key: Any) -> np.ndarray | None:
        """Note an input that is seen for the first time; record the pass of one that was seen before."""
        if input.dtype not in FLOATS or not input.dtype.isnative:
            return None
        if key not in self._passes or self._passes[key] is not None:
            while len(self._passes) >= _MOST:
                del self._passes[next(iter(self._passes))]
            self._passes[key] = None
            return None
        try:
            done = _Pass(net, input, self._small)
        except NotRecordedError:
            self._playable = False
            return None
        self._passes[key] = done
        return done.play(input)
