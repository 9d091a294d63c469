"""Compile a Triton kernel for sm_90 on a machine without a GPU, and read its registers and stack off the cubin."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    shared: int
    ptx: str
    ttgir: str
    """Triton's own code with the layouts of its tensors."""
    cubin: bytes

    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the machine code, by its bare name."""
        return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(\w+)", _cuobjdump("-sass", self.cubin)))


def _cuobjdump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([str(tool), option, str(file)], capture_output=True, text=True, check=True).stdout


def compile_for_hopper(
    kernel: Any, pointers: dict[str, str], scalars: dict[str, str], constants: dict[str, Any], **options: int
) -> Resources:
    """`pointers` name -> element type (taken as 16-byte aligned), `scalars` name -> type, `constants` name -> value."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: f"*{kind}" for name, kind in pointers.items()} | scalars
    signature |= dict.fromkeys(constants, "constexpr")
    order = list(kernel.arg_names)
    signature = {name: signature[name] for name in order}
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    report = _cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    ptx = compiled.asm["ptx"]
    assert atomics(ptx) == [], "what atomics add up has another last bit every time"
    shared, ttgir, cubin = int(compiled.metadata.shared), compiled.asm["ttgir"], compiled.asm["cubin"]
    return Resources(int(found[1]), int(found[2]), shared, ptx, ttgir, cubin)


def atomics(ptx: str) -> list[str]:
    """The atomic instructions; `cp.async.cg.shared.global` is none."""
    return re.findall(r"\b(?:atom|red)\.[\w.:]+", ptx)


def compiler_missing() -> bool:
    """True where Triton cannot compile: it is not installed, or this process interprets."""
    from mhc_compile.compat import triton_version

    return not triton_version() or os.environ.get("TRITON_INTERPRET") == "1"


BF16, FP16, FP32, WIDTH = "bf16", "fp16", "fp32", 4096
TOKENS = {"tokens": "i32"}
