"""Compiles every kernel for a GPU that is not there, and prints what the assembler says: one JSON object a launch.

    python tests/support/compile_kernels.py [CAPABILITY | KERNEL ...]

Launches are intercepted and compiled with the arguments they came with, so what is compiled is what would run. Triton
brings its own assembler; no driver is needed. Instructions are counted of the kernels that are named, for the last
capability: that takes longer than to compile. Run by test_kernels_compile.py in a process of its own, since Triton's
interpreter, in which the other tests run kernels, replaces the compiler for good.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fdistill.kernels.triton import denoising, ema, implicit, matching, ratio, renoise, scale_rows, to_x0

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


def source(kernel: JITFunction, arguments: tuple[Any, ...], settings: dict[str, Any]) -> ASTSource:
    """The kernel specialised as the launcher would: ones become constants, multiples of 16 are known as such."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | settings
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            divisible = type(value) is int and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def describe(kernel: JITFunction, assembled: Mapping[str, Any]) -> dict[str, Any]:
    """Spilled registers are on the stack; loads and stores are the widths, in bytes, of those that can be wide."""
    usage, assembly = dump(assembled["cubin"], "--dump-resource-usage"), assembled["ptx"]

    def widths(access: str) -> list[int]:
        found = re.findall(rf"\b{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", assembly)
        return sorted({int(count or 1) * int(bits) // 8 for count, bits in found})

    return {
        "kernel": kernel.fn.__name__.strip("_"),
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "loads": widths("ld"),
        "stores": widths("st"),
    }


def count_instructions(cubin: bytes) -> int:
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
    return len([name for name in re.findall(pattern, dump(cubin, "--dump-sass"), re.M) if name != "NOP"])


def launches() -> Iterator[str]:
    """Every kernel in the forms that matter: latents, an image batch, odd sizes, both precisions, every branch.
    Yields the name of what was just launched.
    """

    def samples(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    ones = torch.ones(2)
    forms = [((2, 4, 64, 64), torch.float32), ((2, 4, 64, 64), torch.bfloat16), ((2, 3, 512, 512), torch.bfloat16)]
    for shape, dtype in [*forms, ((2, 3, 7, 5), torch.bfloat16)]:
        x0, x_t, raw = samples(*shape), samples(*shape), samples(*shape, dtype=dtype)
        four = (ones, ones, ones, ones)
        matching.matching(x0, x_t, raw, raw, raw, *four, ones, 1e-6, 7.5)
        matching.matching(x0, x_t, raw, None, raw, *four, ones, 1e-6, 1.0)
        matching.matching(x0, None, raw, None, raw, None, None, None, None, ones, None, 1.0)
        denoising.denoising(raw, x_t, x0, ones, ones, ones)
        denoising.denoising(raw, None, x0, None, None, ones)
        implicit.implicit(x0, x_t, raw, raw, *four)
        implicit.implicit_backward(torch.ones(3, 2), x0, x_t, raw, raw, *four)
        implicit.implicit_backward(torch.ones(3, 2), x0, None, raw, raw, None, None, None, None)
        scale_rows.scale_rows(raw, ones, ones, dtype)
        scale_rows.scale_rows(x0, ones, None, dtype)
        to_x0.to_x0(raw, x_t, ones, ones)
        for last in (False, True):
            renoise.renoise(x0, x0, ones, ones, ones, dtype, last)
            renoise.renoise_seeded(x0, torch.tensor(5), 0, ones, ones, ones, dtype, last)
        renoise.renoise_backward(x0, raw, ones, ones, torch.float32)
        yield "x".join(map(str, shape[1:]))
    logits, level, bins = samples(64, 3), torch.rand(64), torch.ones(10)
    bounds = (0.1, 20.0, 0.002, 80.0, True)
    ratio.ratio(logits, level, bins, *bounds, 0.0, 1.0, 1.0, -1.0)
    ratio.ratio_samples(logits, level, 0.1, 20.0, 10, 0.002, 80.0, True)
    ratio.ratio_weights(samples(64, 3), bins, 0.5, 1.0, 0.3, 0.0)
    weights = [torch.zeros(4096), torch.zeros(100)]
    shadows = [torch.zeros_like(weight) for _ in range(2) for weight in weights]
    ema.ema(shadows, weights, [0.9, 0.99])
    ema.ema(shadows[:2], [weight.bfloat16() for weight in weights], [0.9])
    yield "batch and weights"


def main(capabilities: list[int], counted: list[str]) -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "nothing is compiled in the interpreter"
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []

    def compile_instead(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        options = {"num_warps": settings.pop("num_warps")}
        made = source(kernel, arguments, settings)
        for capability in capabilities:
            key = f"{made.hash()} {options} {capability}"
            if key not in seen:
                seen.add(key)
                compiled = triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options)
                constants = {kernel.arg_names[k[0]]: v for k, v in made.constants.items()}
                row = {"capability": capability, **describe(kernel, compiled.asm), **options, "constants": constants}
                if row["kernel"] in counted and capability == capabilities[-1]:
                    row["instructions"] = count_instructions(compiled.asm["cubin"])
                rows.append(row)

    JITFunction.run = compile_instead
    for sample in launches():
        for row in rows:
            print(json.dumps({"sample": sample, **row}, default=str), flush=True)
        rows.clear()


if __name__ == "__main__":
    numbers, names = ([text for text in sys.argv[1:] if text.isdecimal() == number] for number in (True, False))
    main([int(number) for number in numbers] or [80, 90], names)
