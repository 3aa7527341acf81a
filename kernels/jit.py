"""The only compiler options of the kernels, and their cache on disk.

The cache's key holds a hash of every source file that CPU kernels are made of, because Numba alone does not
notice that a function called from another module has changed.
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
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering
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
    for path in sorted((*root.glob("*.py"), *root.glob("cpu/*.py"))):
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


class _Library(JITCodeLibrary):
    """Numba's library of a function's code, optimised as a whole once.

    Numba's own does so twice, for the sake of counts of references, which kernels don't have.
    """

    def _optimize_final_module(self) -> None:
        manager, builder = self._codegen._module_pass_manager()
        manager.run(self._final_module, builder)


class _LinkedLibrary(JITCodeLibrary):
    """The code of a kernel that only kernels call: LLVM's IR, which the caller optimises with its own."""

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LinkedLowering(NativeLowering):
    """Numba's lowering without its last steps: neither optimised nor turned into machine code here."""

    _name = "fastcnn_linked_lowering"

    def run_pass(self, state: Any) -> bool:
        # Kernels own no arrays, so that counting references to them would be work for nothing.
        state.targetctx = state.targetctx.subtarget(enable_nrt=False)
        library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library = library
        state.flags.no_compile = True
        changed = super().run_pass(state)
        result = state["cr"]
        if state.pipeline.out_of_line:
            library.get_function(result.fndesc.llvm_func_name).add_function_attribute("noinline")
        # Callers find the code by this object, where other kernels have their entry from Python.
        entry = object()
        state.targetctx.insert_user_function(entry, result.fndesc, [library])
        state["cr"] = result._replace(cfunc=entry)
        return changed


@register_pass(mutates_CFG=True, analysis_only=False)
class _EntryLowering(NativeLowering):
    """Numba's lowering into a `_Library`."""

    _name = "fastcnn_entry_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().run_pass(state)


class _EntryCompiler(CompilerBase):
    """Numba's compiler with another lowering."""

    lowering: type = _EntryLowering

    def define_pipelines(self) -> list[Any]:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (self.lowering if step is NativeLowering else step, text) for step, text in manager.passes
        ]
        manager.finalize()
        return [manager]


class _LinkedCompiler(_EntryCompiler):
    lowering = _LinkedLowering
    out_of_line = False


class _OutOfLineCompiler(_LinkedCompiler):
    out_of_line = True


def kernel(func: Callable, out_of_line: bool = False) -> Any:
    """Compile a function for other kernels to call; Python can't.

    It is optimised and turned into machine code once, as a part of each `entry` that it belongs to, and not
    once more by itself: that halves the time of a cold start. With `out_of_line` it is never inlined.
    """
    options: dict[str, Any] = {
        "pipeline_class": _OutOfLineCompiler if out_of_line else _LinkedCompiler,
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
        # Only for type inference, which else forbids to return a view; see `_LinkedLowering`.
        "_nrt": True,
    }
    dispatcher = numba.njit(**OPTIONS, **options)(func)

    def add_overload(result: Any) -> None:
        dispatcher.overloads[tuple(result.signature.args)] = result

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"{func.__module__}.{func.__qualname__} is called by kernels only: @entry lets Python"
        )

    dispatcher.add_overload = add_overload
    dispatcher._compile_for_args = refuse
    return dispatcher


def entry(func: Callable, name: str = "") -> Any:
    """Compile a function that Python calls, or kernels.

    It is cached as `name`, its own by default, which must be its own among all entries.
    """
    options: dict[str, Any] = {"pipeline_class": _EntryCompiler, "no_cfunc_wrapper": True}
    dispatcher = numba.njit(_nrt=False, **OPTIONS, **options)(func)
    dispatcher._cache = KernelCache(func, name or f"{func.__module__}.{func.__qualname__}")
    return dispatcher


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
