"""The only compiler options of the kernels, and their cache on disk.

The cache's key holds a hash of every source file of this package, because Numba alone does not notice that a
function called from another module has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
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

    def __init__(self, py_func: Callable, name: str):
        super().__init__(py_func)
        self._kernel = name

    def _path(self, signature: Any, codegen: Any) -> Path:
        # Not the function's closure, which Numba would add: a name here stands for the same kernels.
        key = (signature, codegen.magic_tuple(), self._kernel)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return cache_directory() / f"{self._kernel}-{digest}.nbc"

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


def njit_cached(func: Callable, name: str) -> Any:
    """Compile `func`, and cache it as `name`, which must be its own among all kernels."""
    dispatcher = numba.njit(**OPTIONS)(func)
    dispatcher._cache = KernelCache(func, name)
    return dispatcher


def kernel(func: Callable) -> Any:
    """Compile a serial function, callable from Python and from other kernels."""
    return njit_cached(func, f"{func.__module__}.{func.__qualname__}")


@intrinsic
def keep_out_of_line(typing_context):
    """Forbid LLVM to inline the function that says this.

    What is called from several places must be one piece of machine code: inlined twice, its sums could be
    reordered in two ways, and the result would depend on the number of threads.
    """

    def codegen(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
