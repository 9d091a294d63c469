"""The two ways to run an MLIR module on the CPU: IREE, and LLVM's JIT from the torch-mlir wheel.

Both take the same kind of module, a function ``main`` over the weights and then the inputs, and hand the weights over
where they lie: a parameter that is updated in place is seen by the next call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_compile.errors import LayoutError, MhcError, MissingDependencyError, OptionError

ENGINES = ("auto", "iree", "wheel")
OUTPUT_TYPE = {"iree": "torch", "wheel": "linalg-on-tensors"}
"""What each engine reads."""
PIP = "pip install 'mhc-compile[mlir]'"

WHEEL_PASSES = (
    "func.func(linalg-generalize-named-ops)",
    "func.func(linalg-fuse-elementwise-ops)",
    "convert-shape-to-std",
    "func.func(tm-tensor-bufferize)",
    # copy-before-write: without it an argument, a weight among them, may be chosen as the place of a result.
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries "
    "function-boundary-type-conversion=identity-layout-map}",
    "refback-mlprogram-bufferize",
    # The results of a call belong to the caller, also one that is an argument or a constant: it is copied then.
    "ownership-based-buffer-deallocation",
    "canonicalize",
    "buffer-deallocation-simplification",
    "bufferization-lower-deallocations",
    "inline",
    "func.func(tm-tensor-to-loops)",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
    "func.func(lower-affine)",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm)",
    "func.func(arith-expand)",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "lower-affine",
    "convert-bufferization-to-memref",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-vector-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-complex-to-llvm",
    "reconcile-unrealized-casts",
)
"""From linalg on tensors to LLVM: scalar loops."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """What an argument or result of ``main`` is: a dtype, and sizes with None for those that vary."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, fake: Tensor) -> Slot:
        """The slot of a traced value."""
        return cls(fake.dtype, tuple(size if isinstance(size, int) else None for size in fake.shape))

    def fits(self, value: object) -> bool:
        """True if a tensor may be handed over here."""
        return (
            isinstance(value, Tensor)
            and value.dtype == self.dtype
            and value.device.type == "cpu"
            and value.dim() == len(self.shape)
            and all(have == want for have, want in zip(value.shape, self.shape, strict=True) if want is not None)
        )


class Compiled:
    """A compiled graph: inputs -> tuple of tensors."""

    def __init__(
        self, run: Callable[..., list[Any]], weights: Sequence[Tensor], arguments: Sequence[Slot], engine: str
    ) -> None:
        self.engine = engine
        self._run, self._weights, self._arguments = run, list(weights), list(arguments)

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """Run it. Raises LayoutError for an input that the code was not compiled for."""
        values = [*self._weights, *inputs]
        if len(values) != len(self._arguments):
            raise LayoutError(f"expected {len(self._arguments) - len(self._weights)} inputs, got {len(inputs)}")
        for position, (value, slot) in enumerate(zip(values, self._arguments, strict=True)):
            if not slot.fits(value):
                place = position - len(self._weights)
                what = f"input {place}" if place >= 0 else f"weight {position}"
                have = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
                raise LayoutError(f"{what} is {have}, compiled for {slot.dtype} {slot.shape} on cpu")
        return tuple(self._run(*values))


def choose(engine: str) -> str:
    """``iree`` or ``wheel``. Raises OptionError, or MissingDependencyError where IREE is named and is not there."""
    if engine not in ENGINES:
        raise OptionError(f"engine={engine!r} is not legal", cure=f"one of {', '.join(ENGINES)}")
    if engine == "wheel":
        return engine
    missing = [package for package in ("compiler", "runtime") if not _has_iree(package)]
    if missing and engine == "iree":
        raise MissingDependencyError(
            f"IREE is not installed: {', '.join(f'iree-base-{package}' for package in missing)} missing", cure=PIP
        )
    return "wheel" if missing else "iree"


def _has_iree(package: str) -> bool:
    try:
        return importlib.util.find_spec(f"iree.{package}") is not None
    except ModuleNotFoundError:  # there is no package `iree` at all
        return False


def compile_module(
    engine: str, module: Any, weights: Sequence[Tensor], arguments: Sequence[Slot], results: Sequence[Slot | None]
) -> Compiled:
    """Compile torch-mlir's module, given in the form that the engine reads (it may be changed in place).

    Args:
        engine: ``iree`` or ``wheel``.
        module: its function ``main`` takes ``arguments``, of which the first are the ``weights``.
        weights: live tensors, bound to the first arguments.
        arguments, results: of ``main``; a result that is None is an integer (IREE only).
    """
    run = iree(module) if engine == "iree" else wheel(module, results)
    return Compiled(run, weights, arguments, engine)


# ------------------------------------------------------------------------------------------------ the wheel's JIT
def wheel(module: Any, results: Sequence[Slot | None]) -> Callable[..., list[Tensor]]:
    """LLVM's JIT over linalg on tensors. Seconds to compile and scalar loops to run: for tests."""
    from torch_mlir.execution_engine import ExecutionEngine
    from torch_mlir.ir import UnitAttr
    from torch_mlir.passmanager import PassManager

    slots = [slot for slot in results if slot is not None]
    if len(slots) != len(results):
        raise MhcError("the graph returns a size, which the wheel's engine cannot", cure="engine='iree'")
    with module.context:
        for function in module.body.operations:
            if function.operation.name == "func.func":
                function.attributes["llvm.emit_c_interface"] = UnitAttr.get()
        try:
            PassManager.parse(f"builtin.module({','.join(WHEEL_PASSES)})").run(module.operation)
        except Exception as error:  # MLIR's own error class, by whatever name this wheel has it
            raise MhcError(
                f"the passes of the wheel's engine refuse the graph: {error}", cure="engine='iree'"
            ) from error
        # LLVM's optimiser takes five times as long as the rest together, for code that runs once or twice.
        engine = ExecutionEngine(module, opt_level=0)
        engine.lookup("main")  # compiles now, not at the first call
    return functools.partial(_invoke, engine, slots)


def _invoke(engine: Any, results: Sequence[Slot], *values: Tensor) -> list[Tensor]:
    """Call ``main`` by its C interface: a place for the result descriptors, then a descriptor for each argument."""
    held = [value.detach().contiguous() for value in values]  # alive until the call is over
    descriptors = [_descriptor(value) for value in held]
    place = (ctypes.c_int64 * sum(3 + 2 * len(slot.shape) for slot in results))()
    pointers = [ctypes.pointer(ctypes.cast(item, ctypes.c_void_p)) for item in (place, *descriptors)]
    engine.invoke("main", *pointers)
    found, start = [], 0
    owned = set()  # equal results may have become one buffer
    for slot in results:
        rank = len(slot.shape)
        fields = place[start : start + 3 + 2 * rank]
        start += 3 + 2 * rank
        found.append(_copy_out(fields, rank, slot.dtype))
        owned.add(fields[0])
    for allocated in owned:
        _libc().free(ctypes.c_void_p(allocated))
    return found


def _descriptor(value: Tensor) -> Any:
    """A memref descriptor: allocated, aligned, offset, sizes, strides; eight bytes each."""
    fields = [value.data_ptr(), value.data_ptr(), 0, *value.shape, *value.stride()]
    return (ctypes.c_int64 * len(fields))(*fields)


def _copy_out(fields: Sequence[int], rank: int, dtype: torch.dtype) -> Tensor:
    """The tensor behind a result descriptor, copied; what it lies in belongs to the caller of ``main``."""
    aligned, offset, sizes = fields[1], fields[2], list(fields[3 : 3 + rank])
    size = torch.Size(sizes).numel() * dtype.itemsize
    result = torch.empty(sizes, dtype=dtype)  # identity layout: row-major
    if size:
        ctypes.memmove(result.data_ptr(), aligned + offset * dtype.itemsize, size)
    return result


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)


# ------------------------------------------------------------------------------------------------ IREE
def iree(module: Any) -> Callable[..., list[Any]]:
    """IREE for the host's CPU over the torch dialect."""
    choose("iree")
    from iree.compiler.tools import CompilerToolError, compile_str

    text = module.operation.get_asm(enable_debug_info=False)
    try:
        binary = compile_str(
            text, target_backends=["llvm-cpu"], input_type="torch", extra_args=["--iree-llvmcpu-target-cpu=host"]
        )
    except CompilerToolError as error:
        reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
        raise MhcError(f"IREE refuses the graph: {reason}", cure="engine='wheel' takes small shapes") from error
    return _Iree(binary)


class _Iree:
    """A loaded IREE module. A tensor that is the same object, unwritten, as in the call before is not copied again."""

    def __init__(self, binary: bytes) -> None:
        import iree.runtime as runtime

        config = runtime.Config("local-task")
        context = runtime.SystemContext(config=config)
        context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary))
        self._held: dict[Any, Any] = {"main": context.modules.module["main"], "device": config.device}
        # At exit too: what IREE's bindings find alive then, they report as leaked, in a hundred lines.
        weakref.finalize(self, self._held.clear)

    def __call__(self, *values: Tensor) -> list[Any]:
        """Run ``main``."""
        answer = self._held["main"](*[self._buffer(position, value) for position, value in enumerate(values)])
        return [_to_torch(item) for item in (answer if isinstance(answer, (list, tuple)) else [answer])]

    def _buffer(self, position: int, value: Tensor) -> Any:
        import iree.runtime as runtime

        version = (value.data_ptr(), -1 if value.is_inference() else value._version)
        kept = self._held.get(position)
        if kept is not None and kept[0]() is value and kept[1] == version and version[1] >= 0:
            return kept[2]
        buffer = runtime.asdevicearray(self._held["device"], _to_numpy(value.detach().contiguous()))
        self._held[position] = (weakref.ref(value), version, buffer)
        return buffer


def _to_numpy(value: Tensor) -> Any:
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _to_torch(value: Any) -> Any:
    if not hasattr(value, "to_host"):
        return value
    array = value.to_host()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
