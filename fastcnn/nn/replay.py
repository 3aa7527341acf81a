"""Passes through a network, recorded once and then played again.

What a small network computes takes little more time, or for one image less, than Python takes to call its
kernels: checks, output shapes, the choice of a way, Numba's look at every argument. All of that follows from
the layers' settings and the input's shape. So the second pass of a shape is recorded (see
`kernels.threads.Recording`), and those after it copy the input in, do the recorded jobs, and copy the result
out. The jobs are the same, hence also the bits of the result.

Two kinds of passes are recorded: forward passes of one image without gradients, as one call into compiled
code; and those of batches, forward and in training backward, whose jobs alternate with what NumPy does to a
layer's few biases or statistics.

Nothing is recorded but what can be trusted. Layers are of classes known to leave all work to kernels. Weights
are read where they lie, whenever the jobs are done, so that they may change. In the pass of one image what
NumPy prepares (biases, slopes, statistics) is compared with what it was, and recorded anew when it differs.
What layers keep between forward and backward is put back as the recorded pass left it, so that a backward
pass that is not recorded finds everything, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _buffers
from .._grad_mode import is_grad_enabled
from ..kernels.cpu import transpose
from ..kernels.cpu.winograd import get_winograd
from ..kernels.threads import NotRecordedError, Recording, get_num_threads, is_recording
from . import activation, batchnorm, conv, dropout, linear, pooling
from ._arrays import inverse, memory_order
from .fusion import get_fusion
from .module import structure_version
from .parameter import FLOATS, layout_version

if TYPE_CHECKING:
    from .container import Residual, Sequential
    from .module import Module

# Elements of an input, of one image and of a batch: larger ones keep their kernels busy for much longer than
# Python takes.
_LARGEST_IMAGE = 1 << 16
_LARGEST_BATCH = 1 << 23
# Elements that are copied before a better way to do it is found: if they change places, and if they don't.
_FEW = 1 << 12
_MANY = 1 << 17
# Bytes that the recordings of batches of one network hold, together, when one more is made.
_MOST_BYTES = 1 << 30
# Elements that are copied for each layer, in a forward pass alone and in one that backward follows: to copy
# more takes longer than what Python does for a layer.
_MOST_COPIED = 1 << 17, 1 << 18
# Recordings of a network, each with memory for all of its activations: for training and evaluation, of whole
# batches and of an epoch's last, twice.
_MOST = 8

_NORMS = batchnorm.BatchNorm1d, batchnorm.BatchNorm2d
_LAYERS = (
    *_NORMS,
    activation.Identity,
    activation.LeakyReLU,
    activation.LogSoftmax,
    activation.PReLU,
    activation.ReLU,
    activation.Softmax,
    conv.Conv2d,
    dropout.Dropout,
    linear.Flatten,
    linear.Linear,
    linear.Unflatten,
    pooling.AdaptiveAvgPool2d,
    pooling.AvgPool2d,
    pooling.MaxPool2d,
)


def _is_playable(module: Module, batches: bool) -> bool:
    """Whether all that a layer does now in a pass, of one image or of batches, is known to a recording."""
    if type(module) not in _LAYERS or {"forward", "backward"} & vars(module).keys():
        return False
    # What would be run by others.
    if list(module.children()):
        return False
    if isinstance(module, conv.Conv2d):
        return module.padding_mode == "zeros"
    if isinstance(module, _NORMS):
        # Without a momentum each batch counts less than the one before it.
        if batches:
            return module.momentum is not None
        return not module.training and module._has_statistics
    if isinstance(module, dropout.Dropout):
        return batches or not module.training or module.p == 0
    return not (isinstance(module, pooling.MaxPool2d) and module.return_indices)


class _JobsOnly(Recording):
    """A recording without what NumPy prepares: not from weights, which nobody compares."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self._weights = weights

    def note_call(self, function: Callable, args: tuple) -> None:
        arrays = [array for array in args if isinstance(array, np.ndarray)]
        if any(np.may_share_memory(array, weight) for array in arrays for weight in self._weights):
            raise NotRecordedError("a recording does not see what NumPy prepares from weights")


class _InOwnPool(Recording):
    """A recording whose results lie in buffers of a pool of its own.

    They are used again within the recording as soon as no layer holds them, as when nothing is recorded: jobs
    are always done in the same order. While a backward pass is recorded, so is what the layers kept for it:
    the next forward pass writes it anew. Between the two passes nobody gets it.
    """

    def __init__(self, pool: _buffers.OwnPool) -> None:
        super().__init__(calls=True)
        self._pool = pool
        self._taking = _buffers.taking_from(pool)

    def __enter__(self) -> Recording:
        super().__enter__()
        self._taking.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._taking.__exit__(*exception)
        super().__exit__(*exception)

    def keep(self, args: tuple) -> None:
        for item in args:
            if isinstance(item, tuple):
                self.keep(item)
            elif isinstance(item, np.ndarray) and not self._pool.owns(item):
                super().keep((item,))


class _Input:
    """Memory that lies still, into which an input or a gradient is copied."""

    def __init__(self, array: np.ndarray) -> None:
        self._order = memory_order(array)
        self._memory = _buffers.empty(array.transpose(self._order).shape, array.dtype)
        self.array = self._memory.transpose(inverse(self._order))
        self.set(array)

    def set(self, array: np.ndarray) -> None:
        array = array.transpose(self._order)
        if _is_copied_at_once(array):
            np.copyto(self._memory, array)
        else:
            transpose.copy(array, self._memory)


def _is_copied_at_once(array: np.ndarray) -> bool:
    return array.size <= (_MANY if array.flags.c_contiguous else _FEW)


def _copied(array: np.ndarray) -> np.ndarray:
    """A result as the caller gets it: in memory of its own."""
    return array.copy("K") if array.size <= _FEW else _Input(array).array


class _Backward:
    """One recorded backward pass, done for the first time."""

    def __init__(self, net: Sequential, dout: np.ndarray, input_grad: bool, pool: _buffers.OwnPool) -> None:
        self._dout = _Input(dout)
        for attributes in (*_below(net), vars(net)):
            # A layer lets go of it when it is done, and then it becomes a gradient's memory.
            attributes["_saved"] = pool.held(attributes["_saved"])
        with _InOwnPool(pool) as self.jobs:
            self._grad = net._run_backward(self._dout.array, input_grad)

    def result(self) -> np.ndarray | None:
        return None if self._grad is None else _copied(self._grad)

    def play(self, dout: np.ndarray) -> np.ndarray | None:
        self._dout.set(dout)
        self.jobs.play()
        return self.result()


class _Pass:
    """One recorded forward pass, done for the first time, and the backward passes that follow it."""

    def __init__(
        self,
        net: Sequential,
        input: np.ndarray,
        small: list[np.ndarray],
        jobs: Recording,
        pool: _buffers.OwnPool,
    ) -> None:
        self.lock = threading.Lock()
        self.jobs = jobs
        self.pool = pool
        self._small = small
        self._values = [array.tobytes() for array in small]
        self._input = _Input(input)
        with jobs:
            output = net._run(self._input.array)
        self._output = pool.released(output)
        self._kept = [(attributes, pool.released(attributes["_saved"])) for attributes in _below(net)]
        self.net_kept = pool.released(vars(net)["_saved"])
        self._give_back(net)
        self.backward: dict[Any, _Backward] = {}

    def holds(self) -> bool:
        """Whether the same jobs, on what NumPy prepared, would be done now."""
        return [array.tobytes() for array in self._small] == self._values and self.jobs.holds()

    def result(self) -> np.ndarray:
        return _copied(self._output)

    def play(self, net: Sequential, input: np.ndarray) -> np.ndarray | None:
        """The result for another input; None while another thread is at it."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            # What is interrupted on the way must not be followed by a backward pass.
            net._forget()
            self._input.set(input)
            self.jobs.play()
            self._give_back(net)
            return self.result()
        finally:
            self.lock.release()

    def _give_back(self, net: Sequential) -> None:
        """Let all modules remember this pass."""
        for attributes, kept in self._kept:
            attributes["_saved"] = kept
        vars(net)["_saved"] = self.net_kept


def _below(net: Sequential) -> list[dict[str, Any]]:
    """The attributes of all modules below `net`. Its own would hold what holds them, and free nothing."""
    return [vars(module) for module in net.modules() if module is not net]


def _state() -> tuple:
    """All that a recording depends on beside a network and its input."""
    return structure_version(), layout_version(), get_num_threads(), get_fusion(), get_winograd()


class _Run(threading.local):
    depth = 0


_run = _Run()


def layer_by_layer(net: Sequential | Residual, input: Any) -> Any:
    """The result of a network whose pass is not played.

    Networks inside of it are not recorded on their own: their results, of all sizes, would be copied.
    """
    _run.depth += 1
    try:
        return net._run(input)
    finally:
        _run.depth -= 1


class _Known:
    """What was found out about a network in one state of all that recordings depend on.

    One object, so that a thread that is on its way while another changes something leaves nothing behind.
    """

    def __init__(self, state: tuple) -> None:
        self.state = state
        self.is_complete = False
        self.layers: list[Module] = []
        self.attributes: list[dict[str, Any]] = []
        self.small: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        # For an input that was seen once, whether its pass is to be recorded.
        self.passes: dict[Any, _Pass | bool] = {}
        # The pass whose backward pass may come next.
        self.latest: _Pass | None = None

    def complete(self, net: Sequential, containers: tuple[type[Module], ...]) -> None:
        """Gather what a recording depends on; not before a state is seen again: some change all the time."""
        modules = list(net.modules())
        self.attributes = _below(net)
        layers = [module for module in modules if module is not net and not _contains(module, containers)]
        memories = [parameter.memory for _, parameter in net.named_parameters()]
        on_cpu = all(isinstance(memory, np.ndarray) for memory in memories)
        self.weights = [memory for memory in memories if memory.ndim > 1]
        self.small = [memory for memory in memories if memory.ndim < 2]
        self.small += [buffer for _, buffer in net.named_buffers()]
        self.layers = layers if on_cpu else []
        self.is_complete = True


def _contains(module: Any, containers: tuple[type[Module], ...]) -> bool:
    """Whether a module does nothing but to run all below it, and to add up what they return."""
    if type(module) not in containers or {"forward", "backward"} & vars(module).keys():
        return False
    return set(module.children()) == set(module._order())


class Replay:
    """The recorded passes of one Sequential, forgotten when any module anywhere has changed.

    The first pass after a change is neither recorded nor counted.
    """

    def __init__(self, containers: tuple[type[Module], ...]) -> None:
        self._containers = containers
        self._known = _Known(())

    def forward(self, net: Sequential, input: Any) -> np.ndarray | None:
        """`net`'s result; None where its layers are to be run one after the other."""
        if type(input) is not np.ndarray or not 0 < input.size <= _LARGEST_BATCH or is_recording():
            return None
        batches = is_grad_enabled() or input.size > _LARGEST_IMAGE or (input.ndim == 4 and len(input) > 1)
        if batches and _run.depth:
            return None
        known, state = self._known, _state()
        if state != known.state:
            self._known = _Known(state)
            return None
        if not known.is_complete:
            known.complete(net, self._containers)
        if not known.layers:
            return None
        modes = tuple([attributes["training"] for attributes in known.attributes])
        # Passes of batches use the scratch memory of their thread.
        place = (is_grad_enabled(), threading.get_ident()) if batches else ()
        key = (input.shape, input.strides, input.dtype, modes, *place)
        recorded = known.passes.get(key)
        if not isinstance(recorded, _Pass) or not recorded.holds():
            return _record(known, net, input, key, batches)
        known.latest = recorded
        return recorded.play(net, input)

    def backward(self, net: Sequential, dout: Any, input_grad: bool) -> tuple[np.ndarray | None] | None:
        """What `net`'s backward pass returns; None where its layers are to be run one after the other."""
        known = self._known
        latest = known.latest
        if latest is None or vars(net)["_saved"] is not latest.net_kept or latest.net_kept is None:
            return None
        if type(dout) is not np.ndarray or not dout.size or dout.dtype not in FLOATS or is_recording():
            return None
        if known.state != _state() or not dout.dtype.isnative:
            return None
        key = (dout.shape, dout.strides, dout.dtype, bool(input_grad), threading.get_ident())
        recorded = latest.backward.get(key)
        if recorded is None and len(latest.backward) >= _MOST:
            return None
        if not latest.lock.acquire(blocking=False):
            return None
        try:
            if recorded is None or not recorded.jobs.holds():
                recorded = latest.backward[key] = _Backward(net, dout, input_grad, latest.pool)
                return (recorded.result(),)
            # Before: no gradient may be added twice, not after an interruption either.
            net._forget()
            grad = recorded.play(dout)
        finally:
            latest.lock.release()
        for attributes in known.attributes:
            attributes["_saved"] = None
        return (grad,)


def _record(known: _Known, net: Sequential, input: np.ndarray, key: Any, batches: bool) -> np.ndarray | None:
    """Note an input that is seen for the first time; record the pass of one that was seen before."""
    if input.dtype not in FLOATS or not input.dtype.isnative:
        return None
    if not all(_is_playable(layer, batches) for layer in known.layers):
        return None
    passes = known.passes
    seen = passes.pop(key, None)
    if seen is None or isinstance(seen, _Pass):
        while len(passes) >= _MOST:
            _drop_one(passes)
        output = layer_by_layer(net, input)
        # A gradient of the output is copied, too.
        copied = input.size + output.size * (1 + is_grad_enabled())
        passes[key] = copied <= len(known.layers) * _MOST_COPIED[is_grad_enabled()]
        return output
    passes[key] = False
    if not seen:
        return None
    pool = _buffers.OwnPool()
    try:
        jobs = _InOwnPool(pool) if batches else _JobsOnly(known.weights)
        done = _Pass(net, input, [] if batches else known.small, jobs, pool)
    except NotRecordedError:
        return None
    if pool.bytes() <= _MOST_BYTES:
        while passes and _bytes(passes) + pool.bytes() > _MOST_BYTES:
            _drop_one(passes)
        passes[key] = known.latest = done
    return done.result()


def _bytes(passes: dict[Any, _Pass | bool]) -> int:
    """Memory of the recordings of batches."""
    return sum(one.pool.bytes() for one in list(passes.values()) if isinstance(one, _Pass))


def _drop_one(passes: dict[Any, _Pass | bool]) -> None:
    """Forget the input that was seen first; another thread may be at it."""
    passes.pop(next(iter(passes), None), None)
