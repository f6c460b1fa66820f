"""LLVM IR compiled for this machine's CPU; the functions are called through ctypes, which releases the GIL.

IR is written as text: a kernel is thousands of straight-line instructions, and building them as llvmlite.ir objects takes
several times as long as having LLVM parse them. LLVM runs no optimisation but code generation, and no operation is fused or
reordered: a kernel's arithmetic is exactly the IR's, on every CPU. Vectors of 16 floats become one AVX-512, two AVX2 or four
NEON registers with the same results.
"""

from __future__ import annotations

import ctypes
import platform
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog

LANES = 16  # floats in a vector, whatever the CPU's registers are
ENTRY = "kernel"  # the name under which a source defines its one function

_KEPT = 256  # compiled functions, 10 to 200 KB each
_log = structlog.get_logger(__name__)


class Function:
    """A compiled function without a result; the machine code lives as long as this object. seconds: what compiling took."""

    def __init__(self, source: str, arguments: Sequence[type]) -> None:
        import llvmlite.binding as llvm

        start = time.perf_counter()
        module = llvm.parse_assembly(source)
        module.verify()
        # The machine belongs to the engine it is given to, hence a fresh one each time.
        self._engine = llvm.create_mcjit_compiler(module, _machine(llvm))
        self._engine.finalize_object()
        self._call = ctypes.CFUNCTYPE(None, *arguments)(self._engine.get_function_address(ENTRY))
        self.seconds = time.perf_counter() - start

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)


class _State:
    def __init__(self) -> None:
        self.refused: str | None = None  # why nothing is compiled, once that is known
        self.functions: OrderedDict[Hashable, Function] = OrderedDict()
        self.lock = threading.RLock()


_state = _State()


def available() -> bool:
    """Whether kernels can be compiled here: llvmlite is installed, and nothing has failed to compile so far."""
    with _state.lock:
        if _state.refused is None and not _state.functions:
            try:
                import llvmlite.binding as llvm

                llvm.initialize_native_target()
                llvm.initialize_native_asmprinter()
            except (ImportError, OSError, RuntimeError) as error:
                _refuse(error)
        return _state.refused is None


def function(key: Hashable, source: Callable[[], str], arguments: Sequence[type]) -> Function | None:
    """The function of that key, compiled from `source()` at its first use; None where `available()` is or becomes False.

    source: IR text that defines `void @kernel(...)`, see `ENTRY`. arguments: its ctypes types. Functions least recently used
    are forgotten, and freed once nobody holds them.
    """
    with _state.lock:
        if not available():
            return None
        found = _state.functions.get(key)
        if found is None:
            try:
                found = Function(source(), arguments)
            except Exception as error:  # of any kind: what is not compiled is computed by its plain definition
                _refuse(error)
                return None
            _state.functions[key] = found
            if len(_state.functions) > _KEPT:
                _state.functions.popitem(last=False)
        _state.functions.move_to_end(key)
        return found


@contextmanager
def refused() -> Iterator[None]:
    """Compile and hand out nothing meanwhile, in the whole process: for tests of the plain definitions."""
    with _state.lock:
        before, _state.refused = _state.refused, "refused by a test"
    try:
        yield
    finally:
        with _state.lock:
            _state.refused = before


def _refuse(error: Exception) -> None:
    _state.refused = f"{type(error).__name__}: {error}"
    _log.warning("no compiled kernels; the plain definitions are used, several times slower", reason=_state.refused)


def _machine(llvm: Any, cpu: str | None = None) -> Any:
    features = ""
    if cpu is None:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        if platform.machine() in ("x86_64", "AMD64"):
            features += ",-prefer-256-bit"  # LLVM avoids the wide registers of some CPUs, for the oldest ones' sake
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)
