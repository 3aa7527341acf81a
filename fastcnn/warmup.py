"""Compile ahead of time what a network needs, in several processes, with progress.

Numba compiles a kernel when it is first called and keeps the result on disk. A training run would so spend
its first half minute in silence. `warmup` calls every layer of a network, the loss, the optimiser and the
loader's kernels on small arrays in processes of their own, and then one training step of the whole network,
which finds nearly everything compiled. A stamp in the kernel cache lets the next call return at once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import llvmlite.binding as llvm
import numpy as np

from . import _random
from .kernels.jit import cache_directory
from .kernels.threads import get_num_threads, set_num_threads

# Called with the number of finished jobs, the number of all, and what is being compiled.
Progress = Callable[[int, int, str], None]

_WHOLE = "whole network"
# More processes than this gain little: the longest job decides, and each takes some 300 MB.
_MOST_PROCESSES = 4
# Elements of a large input: other kernels may serve it than serve a small one.
_LARGE = 1 << 18
# What a process returns that the system killed, as it does when memory runs out.
_KILLED = -9
# The units whose passes are compiled in two jobs.
_CONVOLUTIONS = ("ConvPool", "Conv2d")
# Images in a step of the whole network: a full batch, and last ones of an epoch, for which other kernels
# may serve.
_BATCH = 64
_BATCHES = (_BATCH, 36, 12, 2)


class WarmupError(RuntimeError):
    """Compiling failed, or a process that compiles came to an unexpected end."""


@dataclass(frozen=True)
class WarmupResult:
    """What `warmup` did.

    Attributes
    ----------
    compiled : int
        Number of kernels that were added to the cache.
    seconds : float
    cached : bool
        Whether a stamp told that there was nothing to do.
    """

    compiled: int
    seconds: float
    cached: bool


@dataclass(frozen=True)
class _Plan:
    """What to compile for: everything that decides which kernels are called with which types."""

    model: Any
    input_shape: tuple[int, ...]
    num_classes: int
    dtype: str
    optimizer: str | None
    augment: bool
    image_dtype: str | None
    training: bool
    threads: int

    def for_running(self) -> _Plan:
        """The part of this plan that a trained network takes; the same for all ways to train it."""
        return replace(self, optimizer=None, augment=False, image_dtype="uint8", training=False)

    def stamp(self) -> Path:
        """The file that tells that this plan has been carried out on this machine with these sources."""
        # repr(model) has every layer's kind and sizes, and none of its numbers.
        text = repr([getattr(self, field.name) for field in fields(self)]) + _machine() + _sources()
        return cache_directory() / f"warm-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def warmup(
    model: Any = "emotion",
    input_shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    *,
    dtype: str = "float32",
    optimizer: str | None = "Adam",
    augment: bool = True,
    image_dtype: str | None = "uint8",
    training: bool = True,
    processes: int | None = None,
    progress: Progress | None = None,
) -> WarmupResult:
    """Compile all kernels that training and running a network takes, unless they are in the cache.

    Parameters
    ----------
    model : str or Module
        A name from ``fastcnn.models.names()``, or a network.
    input_shape : (C, H, W)
    num_classes : int
        Number of outputs.
    dtype : {"float32", "float64"}
    optimizer : str or None
        Class in ``fastcnn.optim``; None if gradients will only be computed.
    augment : bool
        Whether the loader changes images.
    image_dtype : {"uint8", "float32"} or None
        How the data set stores its images; None if no loader is used.
    training : bool
        Whether the network will be trained, or else only run: then optimiser and augmentation don't
        matter.
    processes : int, optional
        By default one for each CPU, at most 4. Zero compiles in this process.
    progress : callable, optional
        Called with (done, total, what is being compiled).

    Returns
    -------
    WarmupResult

    Raises
    ------
    WarmupError
        If a job fails or its process ends; the message says which and why.
    ValueError
        If an argument is none of these, or the input does not fit the network.
    """
    started = time.perf_counter()
    if isinstance(model, str):
        from . import models

        model = models.create(model, input_shape=tuple(input_shape), num_classes=num_classes, seed=0)
    else:
        model = copy.deepcopy(model)
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype: {dtype!r} is neither 'float32' nor 'float64'")
    if optimizer is not None:
        _check_optimizer(optimizer)
    model = model.double() if dtype == "float64" else model.float()
    work = (dtype, optimizer, augment, image_dtype, training, get_num_threads())
    plan = _Plan(model, tuple(input_shape), num_classes, *work)
    if not training:
        plan = plan.for_running()
    if plan.stamp().exists():
        return WarmupResult(0, time.perf_counter() - started, cached=True)
    before = _cached_kernels()
    jobs = list(_jobs(plan))
    if processes is None:
        processes = min(_cpus(), _MOST_PROCESSES)
    report = progress or (lambda done, total, what: None)
    handed = _handed_over(plan) if processes > 0 else None
    if handed is None:
        _run_here(plan, jobs, report)
    else:
        _run_in_workers(handed, jobs, processes, report)
    report(len(jobs) + 1, len(jobs) + 1, "")
    _leave(plan.stamp())
    _leave(plan.for_running().stamp())
    return WarmupResult(len(_cached_kernels() - before), time.perf_counter() - started, cached=False)


def _check_optimizer(name: str) -> None:
    from . import optim

    kinds = [kind for kind in optim.__all__ if kind[0].isupper() and kind != "Optimizer"]
    if name not in kinds:
        raise ValueError(f"optimizer: {name!r} is none of {', '.join(kinds)}")


def _machine() -> str:
    features = llvm.get_host_cpu_features()
    return llvm.get_host_cpu_name() + (features.flatten() if features else "")


def _sources() -> str:
    """Hash of the package without the kernels, whose hash is in the cache directory's name."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cached_kernels() -> set[str]:
    return {path.name for path in cache_directory().glob("*.nbc")}


def _handed_over(plan: _Plan) -> bytes | None:
    """`plan` for other processes; None if they can't take it, or can't hand their kernels back."""
    # A class from a script can't be imported by another process.
    if any(type(module).__module__ == "__main__" for module in plan.model.modules()):
        return None
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_directory()):
            return pickle.dumps(plan)
    except (OSError, pickle.PicklingError, AttributeError, TypeError):
        return None


def _leave(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        # The cache can't be written: the next process has to compile again, stamp or no stamp.
        return


# The jobs. Each is a name; the process that carries it out looks up what to call.


def _jobs(plan: _Plan) -> Iterator[str]:
    """Names of the jobs that can run side by side, the longest first. The whole network comes after them."""
    kinds = {type(unit).__name__: None for unit in _units(plan.model) if _example(unit, 1) is not None}
    for kind in _CONVOLUTIONS:
        if kind in kinds:
            yield f"{kind} forward"
            if plan.training:
                yield f"{kind} gradients"
    if plan.image_dtype is not None:
        yield "batches"
    yield from (kind for kind in kinds if kind not in _CONVOLUTIONS)
    yield "CrossEntropyLoss"
    if plan.optimizer is not None:
        yield plan.optimizer


def _units(model: Any) -> Iterator[Any]:
    """Layers, and the runs of layers that are computed in one pass, which stand for their layers."""
    from . import nn
    from .nn import fusion

    in_runs: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Sequential) and fusion.get_fusion():
            layers = list(module)
            for first, last, run in fusion.fuse(layers, lambda layer: False):
                if isinstance(run, fusion.Later):
                    yield from (run.run, run.activation)
                elif isinstance(run, fusion.ConvNorm):
                    yield from (run.conv, run.norm)
                elif run is not None:
                    yield run
                if run is not None:
                    in_runs.update(id(layer) for layer in layers[first:last])
        elif id(module) not in in_runs:
            yield module


def _carry_out(plan: _Plan, job: str) -> None:
    """Call everything that a job is about, for one thread and for several."""
    if job == _WHOLE:
        _whole(plan)
    elif job == "batches":
        _batches(plan)
    elif job == "CrossEntropyLoss":
        _loss(plan)
    elif job == plan.optimizer:
        _step(plan)
    else:
        kind, _, part = job.partition(" ")
        plan.model.train(plan.training)
        for unit in _units(plan.model):
            if type(unit).__name__ == kind:
                for elements in (1, _LARGE):
                    _unit(unit, part, elements, plan.training)


def _example(unit: Any, elements: int) -> np.ndarray | None:
    """An input of about `elements` numbers for a unit; None for containers and layers of unknown kinds."""
    from . import nn
    from .nn import fusion

    dtype: Any = np.float32
    if isinstance(unit, (nn.Linear, nn.BatchNorm1d)):
        features = unit.in_features if isinstance(unit, nn.Linear) else unit.num_features
        shape: tuple[int, ...] = (max(2, elements // features), features)
    else:
        pool = 1
        layer = unit
        if isinstance(unit, (fusion.ConvPool, fusion.NormPool)):
            pool = max(unit.pool_size)
            layer = unit.conv if isinstance(unit, fusion.ConvPool) else unit.norm
        if isinstance(layer, nn.Conv2d):
            channels = layer.in_channels
            reach = max(k * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
            side = max(8, 2 * reach) + max(layer.stride) * (pool - 1)
        elif isinstance(layer, nn.BatchNorm2d):
            channels, side = layer.num_features, max(8, pool)
        elif isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            channels, side = 8, 16
        elif isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout)):
            channels, side = 8, 8
        else:
            return None
        if isinstance(layer, nn.PReLU):
            channels = max(channels, layer.num_parameters)
        unit = layer
        shape = (max(2, elements // (channels * side**2)), channels, side, side)
    for parameter in unit.parameters():
        dtype = parameter.dtype
    return np.ones(shape, dtype)


def _unit(unit: Any, part: str, elements: int, training: bool) -> None:
    from .nn import fusion

    x = _example(unit, elements)
    assert x is not None
    if part and training:
        _convolution(unit, part, x)
    elif isinstance(unit, (fusion.ConvPool, fusion.NormPool)):
        y, saved = unit.forward(x)
        if training:
            unit.backward(np.ones_like(y), [saved], True)
    else:
        y = unit(x)
        if training:
            unit.backward(np.ones_like(y))


def _convolution(unit: Any, part: str, x: np.ndarray) -> None:
    """One half of a convolution's passes, which take longest to compile.

    Forward and towards the input share kernels, and the gradient of the weights has others, so that two
    processes can do them.
    """
    from .kernels import cpu
    from .nn import fusion

    fused = isinstance(unit, fusion.ConvPool)
    conv = unit.conv if fused else unit
    images = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    weight, bias = conv.weight, conv.bias
    geometry = (conv.stride, conv._pads, conv.dilation, conv.groups)
    if fused:
        forward = (None if bias is None else bias.memory, unit.pool_size, unit.relu, *geometry)
        backward = (unit.pool_size, *geometry)
        filters, height, width = fusion.pooled(conv.output_shape(x.shape[1:]), unit.pool)
        dout = np.ones((len(x), height, width, filters), x.dtype)
        argmax = np.zeros(dout.shape, np.uint8)
        if part == "forward":
            cpu.conv2d_pool_forward(images, weight.memory, *forward)
            cpu.conv2d_pool_backward_input(dout, argmax, weight.memory, images.shape, *backward)
        else:
            cpu.conv2d_pool_backward_weight(dout, argmax, images, conv.kernel_size, *backward)
        return
    filters, height, width = conv.output_shape(x.shape[1:])
    dout = np.ones((len(x), height, width, filters), x.dtype)
    if part == "forward":
        conv(x)
        cpu.conv2d_backward_input(dout, weight.memory, images.shape, *geometry)
    else:
        cpu.conv2d_backward_weight(
            dout, images, conv.kernel_size, *geometry, out=weight.grad_memory, accumulate=True
        )
        if bias is not None:
            cpu.conv2d_backward_bias(dout, out=bias.grad_memory, accumulate=True)


def _loss(plan: _Plan) -> None:
    from . import nn

    for rows in (2, max(2, _LARGE // plan.num_classes)):
        loss_fn = nn.CrossEntropyLoss()
        loss_fn(np.zeros((rows, plan.num_classes), plan.dtype), np.zeros(rows, np.int64))
        if plan.training:
            loss_fn.backward()


def _step(plan: _Plan) -> None:
    from . import nn

    for size in (2, _LARGE):
        _optimizer(plan, nn.Linear(size, 1, dtype=plan.dtype).parameters()).step()


def _batches(plan: _Plan) -> None:
    from . import data

    channels, height, width = plan.input_shape
    names = tuple(map(str, range(plan.num_classes)))
    for count in (2, max(2, _LARGE // (channels * height * width))):
        images = np.zeros((count, height, width, channels), plan.image_dtype)
        dataset = data.Dataset(images, np.zeros(count, np.int64), names)
        for augment in (None, "light") if plan.augment else (None,):
            for _ in data.Loader(dataset, batch_size=count, augment=augment):
                pass


def _whole(plan: _Plan) -> None:
    """Steps as the network is trained, and forward passes as it is run, of a batch and of few images."""
    from . import nn, no_grad

    model = plan.model
    loss_fn = nn.CrossEntropyLoss()
    for count in _BATCHES if plan.training else ():
        x = np.zeros((count, *plan.input_shape), plan.dtype)
        model.train()
        logits = model(x)
        loss_fn(logits, np.zeros(count, np.int64))
        model.backward(loss_fn.backward(), input_grad=False)
    model.eval()
    with no_grad():
        # The second pass of one image is recorded, and its kernels are called in another way.
        for count in (_BATCH, 1, 1):
            model(np.zeros((count, *plan.input_shape), plan.dtype))
    if plan.optimizer is not None:
        _optimizer(plan, model.parameters()).step()


def _optimizer(plan: _Plan, parameters: Any) -> Any:
    from . import optim

    momentum = {"momentum": 0.9} if plan.optimizer == "SGD" else {}
    return getattr(optim, str(plan.optimizer))(parameters, lr=0.0, **momentum)


# Carrying them out.


def _run_here(plan: _Plan, jobs: Sequence[str], report: Progress) -> None:
    with _random.using(np.random.default_rng(0)):
        for done, job in enumerate((*jobs, _WHOLE)):
            report(done, len(jobs) + 1, job)
            _carry_out(plan, job)


def _run_in_workers(handed: bytes, jobs: Sequence[str], processes: int, report: Progress) -> None:
    """Share the jobs out among processes, then let one of them do the whole network."""
    total = len(jobs) + 1
    with _Crew(handed, min(processes, len(jobs))) as crew:
        for done, running in crew.run(jobs):
            if running:
                report(done, total, ", ".join(running))
        for _, running in crew.run([_WHOLE]):
            if running:
                report(done, total, _WHOLE)


class _Crew:
    """Worker processes, each driven by a thread that hands it one job after another."""

    def __init__(self, handed: bytes, size: int):
        self._workers = [_Worker(handed) for _ in range(size)]

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *exception: Any) -> None:
        for worker in self._workers:
            worker.close()

    def run(self, jobs: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Run `jobs`; whenever one begins or ends, give how many have ended and which are under way."""
        waiting = list(reversed(list(jobs)))
        total = len(waiting)
        events: queue.SimpleQueue[tuple[_Worker, str, str | None]] = queue.SimpleQueue()
        idle, running, done = list(self._workers), [], 0
        while done < total:
            while idle and waiting:
                job = waiting.pop()
                running.append(job)
                idle.pop(0).start(job, events)
            yield done, list(running)
            worker, job, error = events.get()
            if error is not None:
                raise WarmupError(f"compiling {job!r} failed: {error}")
            running.remove(job)
            idle.append(worker)
            done += 1
        yield done, []


class _Worker:
    """A process that carries out jobs: it reads the plan, then names of jobs, and answers each with a
    line."""

    def __init__(self, plan: bytes):
        # A parent that found fastcnn through its own sys.path must not have to set it up anew.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastcnn.warmup"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        self._plan: bytes | None = plan

    def start(self, job: str, events: queue.SimpleQueue) -> None:
        """Begin a job; (this worker, job, error or None) goes to `events` when it has ended."""
        threading.Thread(target=self._run, args=(job, events), daemon=True).start()

    def _run(self, job: str, events: queue.SimpleQueue) -> None:
        try:
            events.put((self, job, self._ask(job)))
        except BaseException as error:
            events.put((self, job, repr(error)))

    def _ask(self, job: str) -> str | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if self._plan is not None:
                stdin.write(self._plan)
                self._plan = None
            stdin.write(pickle.dumps(job))
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            return self._epitaph()
        return json.loads(answer)["error"]

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        last = ([line.strip() for line in self._errors if line.strip()] or [""])[-1]
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        hint = " (short of memory? try fewer processes)" if code == _KILLED else ""
        return f"its process was ended {how}{hint}" + (f": {last}" if last else "")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                continue


def _work(source: IO[bytes], answers: IO[bytes]) -> None:
    """The life of a worker: jobs in, answers out, until there are no more."""
    plan: _Plan | None = None
    while True:
        try:
            received = pickle.load(source)
        except EOFError:
            return
        if plan is None:
            plan = received
            set_num_threads(plan.threads)
            continue
        error = None
        try:
            _carry_out(plan, received)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        answers.write(json.dumps({"error": error}).encode() + b"\n")
        answers.flush()


def main() -> None:
    """What ``python -m fastcnn.warmup`` does: work for another process."""
    # Ctrl-C is the parent's to deal with; its end closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever is printed meanwhile must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # The plan was pickled by the module under its import name, not as __main__.
    from fastcnn import warmup as module

    module._work(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
