"""The only compiler options of the kernels, their cache on disk, and how they start threads.

``kernel`` compiles a serial function; ``parallel`` compiles a driver whose loop runs over threads. Both cache
under a key that holds a hash of every source file of this package, because Numba alone does not notice that
a function called from another module has changed, and leaves compiler options out of its key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.extending import intrinsic
from numba.misc.appdirs import AppDirs
from numba.np.ufunc import parallel as _numba_threads

# Neither nnan nor ninf: with them LLVM deletes the tests for NaN, and NaN must propagate.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": FASTMATH}

_UNUSED_DAYS = 30


def _version_key() -> str:
    """Hash of all that decides what a kernel compiles to and that Numba's own key leaves out."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    versions = (sys.version, np.__version__, numba.__version__, llvmlite.__version__)
    switches = (numba.config.BOUNDSCHECK, os.environ.get("FASTCNN_VECTOR_BITS", ""))
    digest.update(repr((versions, switches)).encode())
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$FASTCNN_CACHE_DIR``, else the user's cache directory."""
    root = os.environ.get("FASTCNN_CACHE_DIR") or AppDirs("fastcnn", appauthor=False).user_cache_dir
    return Path(root) / "kernels" / _VERSION


_VERSION = _version_key()


def _prune(directory: Path) -> None:
    """Remove the kernels of versions that nobody has used for a month."""
    horizon = time.time() - _UNUSED_DAYS * 86400
    for sibling in directory.parent.iterdir():
        if sibling != directory and sibling.stat().st_mtime < horizon:
            shutil.rmtree(sibling, ignore_errors=True)


class _Locator(_CacheLocator):
    """Tells Numba that every function can be cached; `KernelCache` itself knows where."""

    def get_cache_path(self) -> str:
        return str(cache_directory())

    def get_source_stamp(self) -> str:
        return _VERSION

    def get_disambiguator(self) -> str:
        return _VERSION

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> _Locator:
        return cls()


class _Impl(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012 (Numba's own class attribute)


class KernelCache(FunctionCache):
    """One file for each function, signature and machine, so that processes never share an index to race on.

    A directory that can't be written (a read-only home, a full disk) costs the speed of the next start and
    nothing else.
    """

    _impl_class = _Impl

    def __init__(self, py_func: Callable, options: dict[str, Any]):
        super().__init__(py_func)
        self._options = {name: sorted(v) if isinstance(v, set) else v for name, v in options.items()}

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = (self._index_key(signature, codegen), self._options, self._py_func.__qualname__)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return cache_directory() / f"{self._py_func.__module__}.{self._py_func.__name__}-{digest}.nbc"

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        path = self._path(sig, target_context.codegen())
        try:
            data = pickle.loads(path.read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        return self._impl.rebuild(target_context, data)

    def _save_overload(self, sig: Any, data: Any) -> None:
        if not self._impl.check_cachable(data):
            return
        path = self._path(sig, data.codegen)
        with contextlib.suppress(OSError):
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
                _prune(path.parent)
            _write_atomically(path, self._cache_file._dump(self._impl.reduce(data)))


def _write_atomically(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _compile(func: Callable, **options: Any) -> Any:
    options = OPTIONS | options
    dispatcher = numba.njit(**options)(func)
    dispatcher._cache = KernelCache(func, options)
    return dispatcher


def kernel(func: Callable) -> Any:
    """Compile a serial function, callable from Python and from other kernels."""
    return _compile(func)


@intrinsic
def keep_out_of_line(typing_context):
    """Forbid LLVM to inline the function that says this.

    A part of the work that two drivers run must be one piece of machine code: inlined twice, its sums could
    be reordered in two ways, and the result would depend on the number of threads.
    """

    def codegen(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


class _Threads:
    """How many threads kernels use, and whether they may start any."""

    def __init__(self) -> None:
        self.count = numba.config.NUMBA_NUM_THREADS
        self.forked = False
        # Numba's workqueue layer aborts the process when two Python threads enter it.
        self.lock = threading.Lock()

    def after_fork_in_child(self) -> None:
        # GNU OpenMP ends a forked child that starts threads after its parent did; such a child stays serial.
        self.forked = self.forked or _numba_threads._is_initialized
        self.lock = threading.Lock()


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.after_fork_in_child)


def get_num_threads() -> int:
    """Number of threads that kernels use."""
    return _threads.count


def set_num_threads(threads: int) -> None:
    """Use `threads` threads in every kernel from now on. Results don't depend on it, bit for bit.

    Raises
    ------
    ValueError
        If `threads` is below 1 or above the number with which Numba started (``NUMBA_NUM_THREADS``).
    """
    most = numba.config.NUMBA_NUM_THREADS
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads: expected an int, got {threads!r}")
    if not 1 <= threads <= most:
        raise ValueError(
            f"threads: {threads} is not between 1 and {most} (set NUMBA_NUM_THREADS to raise it)"
        )
    _threads.count = int(threads)


class Parallel:
    """A driver ``func(threads, ...)`` with one ``prange(threads)`` loop, and its serial twin.

    The loop's body calls a serial kernel that does the share of one thread, so that the driver compiles
    quickly and both twins run the same machine code. `threads` is passed by the caller: see `thread_count`.
    """

    def __init__(self, func: Callable):
        self.__doc__ = func.__doc__
        self.__name__ = func.__name__
        self._parallel = _compile(func, parallel=True)
        self._serial = _compile(func)

    def __call__(self, threads: int, *args: Any) -> None:
        if threads == 1 or _threads.forked:
            self._serial(threads, *args)
        else:
            with _threads.lock:
                self._parallel(threads, *args)


def parallel(func: Callable) -> Parallel:
    """Compile a driver; see `Parallel`."""
    return Parallel(func)


def thread_count(tasks: int, work: float = np.inf) -> int:
    """Number of threads for `tasks` independent tasks of `work` operations or bytes in all.

    Starting threads costs some microseconds, so that little work is done by one.
    """
    if work < 50_000:
        return 1
    return max(1, min(_threads.count, tasks))


@kernel
def share(thread, threads, tasks):
    """First and last + 1 of the `tasks` that `thread` of `threads` does."""
    return thread * tasks // threads, (thread + 1) * tasks // threads
