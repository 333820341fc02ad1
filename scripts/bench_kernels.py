"""Time the operators of a step against eager torch and torch.compile, beside the bytes they move.

    python scripts/bench_kernels.py [--output FILE.json] [--only matching,tail] [--quick]
    python scripts/bench_kernels.py --traffic         counts bytes and launches of eager torch; needs no GPU

Every figure is GPU time: calls are captured in a CUDA graph over at most 64 input sets, which exceed the cache four
times but for the smallest operations, and the median of its replays is taken. Shares are of the bandwidth of a large
copy measured in the same run, counting bytes read and written. On a machine without a GPU the operators are compared
with torch in Triton's interpreter, nothing is timed, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdistill.base.files import atomic_file
from fdistill.kernels import denoising, ema, implicit, matching, ratio, renoise, scale_rows, to_x0
from fdistill.kernels.reference import denoising as plain_denoising
from fdistill.kernels.reference import ema as plain_ema
from fdistill.kernels.reference import implicit as plain_implicit
from fdistill.kernels.reference import matching as plain_matching
from fdistill.kernels.reference import ratio as plain_ratio
from fdistill.kernels.reference import renoise as plain_renoise
from fdistill.kernels.reference import scale_rows as plain_scale_rows
from fdistill.kernels.reference import to_x0 as plain_to_x0

BF16, F32 = torch.bfloat16, torch.float32
# The largest first: a run that is cut off has what the bandwidth is judged by.
SIZES = [(32, 3, 512, 512), (64, 16, 128, 128), (64, 4, 128, 128), (64, 4, 64, 64), (256, 3, 32, 32)]
COUNTED = "2x4x96x96"
LARGE = 256e6  # bytes from which the bandwidth has to be reached
BOUNDS = (0.1, 20.0, 0.002, 80.0, True)
WEIGHTING = (0.0, 1.0, 1.0, -1.0)  # momentum 0, Jensen-Shannon


Make = Callable[[int], tuple[Any, ...]]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operator at one size: `make(number)` gives random arguments, `moved` is the least bytes read and written."""

    name: str
    size: str
    make: Make
    fused: Call
    eager: Call
    moved: float
    compiles: bool = True
    exact: bool = True  #: whether fused and eager compute the same numbers: not where either draws its own noise


def eager_seeded(x0: Tensor, seed: Tensor, first: int, *rest: Any) -> Any:
    return plain_renoise.renoise(x0, torch.randn_like(x0), *rest)


def fused_tail(x0: Tensor, seed: Tensor, raw: Tensor, logits: Tensor, level: Tensor, bins: Tensor, c: Tensor) -> Any:
    """What a generator update does apart from its networks: noise, weight, loss, and the gradient of its mean."""
    x_t, fed = renoise._renoise_seeded(x0, seed, 0, c, c, c, BF16, False, "triton")
    weight, *_ = ratio.ratio(logits, level, bins, *BOUNDS, *WEIGHTING, "triton")
    loss, direction, scale = matching._matching(
        x0, x_t, raw, None, raw, c, c, c, c, weight.float(), 1e-6, 1.0, "triton"
    )
    upstream = torch.ones((), device=x0.device).expand(len(x0))
    return fed, loss, scale_rows.scale_rows(direction, scale, upstream, F32, "triton")


def eager_tail(x0: Tensor, seed: Tensor, raw: Tensor, logits: Tensor, level: Tensor, bins: Tensor, c: Tensor) -> Any:
    x_t, fed = plain_renoise.renoise(x0, torch.randn_like(x0), c, c, c, BF16, False)
    weight, *_ = plain_ratio.ratio(logits, level, bins, *BOUNDS, *WEIGHTING)
    loss, direction, scale = plain_matching.matching(x0, x_t, raw, None, raw, c, c, c, c, weight.float(), 1e-6, 1.0)
    upstream = torch.ones((), device=x0.device).expand(len(x0))
    return fed, loss, plain_scale_rows.scale_rows(direction, scale, upstream, F32)


class Draws:
    """Random tensors by number: the same number gives the same tensor."""

    def __init__(self, device: torch.device):
        self.device = device

    def normal(self, number: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(number)
        return torch.randn(shape, device=self.device, generator=generator).to(dtype)

    def coefficients(self, number: int, count: int, batch: int) -> list[Tensor]:
        return [self.normal(number + k, batch).abs() + 0.3 for k in range(count)]


def of_samples(shape: tuple[int, ...], draws: Draws) -> list[Case]:
    n, batch, size = torch.Size(shape).numel(), shape[0], "x".join(map(str, shape))

    def x(k: int, dtype: torch.dtype = F32) -> Tensor:
        return draws.normal(k, *shape, dtype=dtype)

    def c(k: int, count: int) -> list[Tensor]:
        return draws.coefficients(k, count, batch)

    def seed(k: int) -> Tensor:
        return torch.tensor(k, device=draws.device)

    def ones() -> Tensor:
        return torch.ones(10, device=draws.device)

    def case(
        name: str, make: Make, fused: Call, eager: Call, element_bytes: int, *, triton: bool = True, exact: bool = True
    ) -> Case:
        call = (lambda *a: fused(*a, "triton")) if triton else fused
        return Case(name, size, make, call, eager, n * element_bytes, exact=exact)

    def noised(k: int, channels_last: bool) -> tuple[Any, ...]:
        return (x(k), x(k + 1), *c(k, 3), BF16, channels_last)

    def matched(k: int, guided: bool) -> tuple[Any, ...]:
        unconditional = x(k + 3, BF16) if guided else None
        return (x(k), x(k + 1), x(k + 2, BF16), unconditional, x(k + 4, BF16), *c(k, 5), 1e-6, 4.5 if guided else 1.0)

    def pair(k: int) -> tuple[Any, ...]:
        return (x(k), x(k + 1), x(k + 2, BF16), x(k + 3, BF16), *c(k, 4))

    return [
        case("to_x0", lambda k: (x(k, BF16), x(k + 1), *c(k, 2)), to_x0.to_x0, plain_to_x0.to_x0, 2 + 4 + 4),
        case(
            "renoise, seeded",
            lambda k: (x(k), seed(k), 0, *c(k, 3), BF16, False),
            renoise._renoise_seeded,
            eager_seeded,
            4 + 4 + 2,
            exact=False,
        ),
        case("renoise", lambda k: noised(k, False), renoise._renoise, plain_renoise.renoise, 4 + 4 + 4 + 2),
        case("renoise, channels last", lambda k: noised(k, True), renoise._renoise, plain_renoise.renoise, 14),
        case(
            "renoise, backward",
            lambda k: (None, x(k, BF16), *c(k, 2), F32),
            renoise._renoise_backward,
            plain_renoise.renoise_backward,
            2 + 4,
        ),
        case(
            "matching",
            lambda k: matched(k, False),
            matching._matching,
            plain_matching.matching,
            4 + 4 + 2 + 2 + 4,
        ),
        case("matching, guided", lambda k: matched(k, True), matching._matching, plain_matching.matching, 18),
        case(
            "scale_rows",
            lambda k: (x(k), *c(k, 2), F32),
            scale_rows.scale_rows,
            plain_scale_rows.scale_rows,
            4 + 4,
        ),
        case(
            "denoising",
            lambda k: (x(k, BF16), x(k + 1), x(k + 2), *c(k, 3)),
            denoising._denoising,
            plain_denoising.denoising,
            2 + 4 + 4 + 2,
        ),
        case("implicit", pair, implicit._implicit, plain_implicit.implicit, 4 + 4 + 2 + 2),
        case(
            "implicit, backward",
            lambda k: (draws.normal(k, 3, batch), *pair(k)),
            implicit.implicit_backward,
            plain_implicit.implicit_backward,
            2 * (4 + 4 + 2 + 2),
        ),
        case(
            "tail",
            lambda k: (x(k), seed(k), x(k + 1, BF16), draws.normal(k, batch, 2), *c(k, 1), ones(), *c(k + 1, 1)),
            fused_tail,
            eager_tail,
            (4 + 4 + 2) + (4 + 4 + 2 + 4) + (4 + 4),  # one output stands for the teacher's and the fake score's
            triton=False,
            exact=False,
        ),
    ]


def of_batches(batch: int, heads: int, draws: Draws) -> Case:
    def make(k: int) -> tuple[Any, ...]:
        logits, level = draws.normal(k, batch, heads) * 3, (draws.normal(k + 1, batch) * 2).exp()
        return (logits, level, torch.ones(10, device=draws.device), *BOUNDS, *WEIGHTING)

    def fused(*arguments: Any) -> Any:
        return ratio.ratio(*arguments, "triton")

    return Case("ratio", f"{batch}x{heads}", make, fused, plain_ratio.ratio, batch * (4 * heads + 16))


def of_weights(sizes: list[int], dtype: torch.dtype, decays: tuple[float, ...], draws: Draws) -> Case:
    def make(k: int) -> tuple[Any, ...]:
        shadows = [draws.normal(k + d, size) for d in range(len(decays)) for size in sizes]
        return shadows, [draws.normal(k, size, dtype=dtype) for size in sizes], decays

    def fused(*arguments: Any) -> Any:
        return ema.ema(*arguments, "triton")

    name = f"{sum(sizes) / 1e6:.0f} M {str(dtype)[6:]}, {len(decays)} decays"
    moved = sum(sizes) * (dtype.itemsize + 8 * len(decays))
    return Case("ema", name, make, fused, plain_ema.ema, moved, compiles=False)


def cases(device: torch.device, *, small: bool) -> Iterator[Case]:
    draws = Draws(device)
    for shape in [(3, 3, 9, 5), (2, 4, 96, 96)] if small else SIZES:
        yield from of_samples(shape, draws)
    for batch, heads in [(5, 3)] if small else [(64, 1), (2048, 4)]:
        yield of_batches(batch, heads, draws)
    large = [320, 320 * 320 * 9, 640 * 640 * 9, 1280 * 1280 * 9, 1280 * 320, 1280] * 8
    for dtype, decays in ((F32, (0.999,)), (BF16, (0.999,)), (BF16, (0.99, 0.999, 0.9999))):
        yield of_weights([7, 5000] if small else large, dtype, decays, draws)


def compare(case: Case) -> float:
    """The largest relative difference, in the norm, between what the fused and the plain version return or change."""
    ours, theirs = case.make(1), case.make(1)
    results = [value for value in tree_leaves(case.fused(*ours)) if isinstance(value, Tensor)]
    expected = [value for value in tree_leaves(case.eager(*theirs)) if isinstance(value, Tensor)]
    if case.name == "ema":
        results, expected = ours[0], theirs[0]
    worst = 0.0
    for got, right in zip(results, expected, strict=True):
        if right.numel():
            difference = (got.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30)
            worst = max(worst, difference.item() if bool(torch.isfinite(difference)) else float("inf"))
    return worst


def milliseconds(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """Median GPU time of one call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in sets[:2]:
            function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(*arguments)
    times: list[float] = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    return median(times[5:])


def launches(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None where the profiler sees nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if str(event.device_type) == "DeviceType.CUDA"]
    return len(events) or None


def extra_bytes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Most memory a call has in use beyond its arguments and results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = function(*arguments)
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del results
    return peak - max(after, before)


def copy_bandwidth() -> float:
    """GB/s of a copy of 2 GB, bytes read and written."""
    source = torch.randn(2**29, device="cuda")
    sets = [(torch.empty_like(source), source)]
    return 2 * source.nbytes / milliseconds(lambda to, value: to.copy_(value), sets) / 1e6


def measure(case: Case, copy: float, cache: int) -> dict[str, Any]:
    count = max(2, min(64, -(-4 * cache // int(case.moved))))
    row: dict[str, Any] = {"op": case.name, "size": case.size, "megabytes": case.moved / 1e6, "input_sets": count}
    row["difference"] = None
    try:
        row["difference"] = compare(case) if case.exact else None
        sets = [case.make(10 * k) for k in range(count)]
    except Exception as error:  # one kernel that does not compile must not cost the others' figures
        return {**row, "fused_us": None, "fused_error": f"{type(error).__name__}: {error}"[:500]}
    contestants: dict[str, Callable[..., Any]] = {"fused": case.fused, "eager": case.eager}
    if case.compiles:
        torch._dynamo.reset()
        contestants["compiled"] = torch.compile(case.eager, dynamic=False)
    for name, function in contestants.items():
        try:
            row[f"{name}_us"] = 1e3 * milliseconds(function, sets)
            row[f"{name}_launches"] = launches(function, sets[0])
            row[f"{name}_extra_megabytes"] = extra_bytes(function, sets[0]) / 1e6
        except Exception as error:  # nor one contestant
            row[f"{name}_us"] = row[f"{name}_launches"] = row[f"{name}_extra_megabytes"] = None
            row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:500]
    if row["fused_us"]:
        row["gigabytes_per_second"] = case.moved / row["fused_us"] / 1e3
        row["share_of_copy"] = row["gigabytes_per_second"] / copy
    return row


def wrong(row: dict[str, Any]) -> list[str]:
    """What makes the benchmark fail: a kernel that did not run, or computed something else."""
    if not row.get("fused_us"):
        return [f"{row['op']} {row['size']}: did not run ({row.get('fused_error')})"]
    if row["difference"] is not None and not row["difference"] < 5e-3:
        return [f"{row['op']} {row['size']}: differs from torch by {row['difference']:.1e}"]
    return []


def misses(row: dict[str, Any]) -> list[str]:
    """Targets of docs/kernels.md that a row does not reach."""
    if not row.get("fused_us"):
        return []
    name, found = f"{row['op']} {row['size']}", []
    if row["megabytes"] * 1e6 >= LARGE and row["share_of_copy"] < 0.85:
        found.append(f"{name}: {row['share_of_copy']:.0%} of the copy bandwidth, wanted 85%")
    if row.get("eager_us") and row["eager_us"] < 3 * row["fused_us"]:
        found.append(f"{name}: {row['eager_us'] / row['fused_us']:.2f} times eager, wanted 3")
    if row.get("compiled_us") and row["compiled_us"] < 0.97 * row["fused_us"]:
        found.append(f"{name}: {row['compiled_us'] / row['fused_us']:.2f} times torch.compile, wanted 1")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def times(row: dict[str, Any], other: str) -> str:
        return number(row[f"{other}_us"] / row["fused_us"], ".1f") if row.get(f"{other}_us") else "-"

    lines = [
        "| operation | size | MB | us | GB/s | of copy | eager, times | compiled, times | launches: fused, eager, "
        "compiled | extra MB: fused, eager, compiled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.get("fused_us"):
            lines.append(f"| {row['op']} | {row['size']} | {row['megabytes']:.1f} | failed | | | | | | |")
            continue
        counts = ", ".join(number(row.get(f"{name}_launches"), "d") for name in ("fused", "eager", "compiled"))
        extra = ", ".join(number(row.get(f"{n}_extra_megabytes"), ".0f") for n in ("fused", "eager", "compiled"))
        lines.append(
            f"| {row['op']} | {row['size']} | {row['megabytes']:.1f} | {row['fused_us']:.1f} | "
            f"{row['gigabytes_per_second']:.0f} | {row['share_of_copy']:.0%} | {times(row, 'eager')} | "
            f"{times(row, 'compiled')} | {counts} | {extra} |"
        )
    return "\n".join(lines)


class Traffic(TorchDispatchMode):
    """Launches of eager torch, and the bytes they read and write: every operator that is no view reads its arguments
    and writes its results, an expanded tensor counting as what it holds.
    """

    VIEWS = frozenset({"view", "expand", "detach", "slice", "select", "unbind", "_unsafe_view", "t", "alias"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS and "empty" not in name:
            self.launches += 1
            touched = [leaf for leaf in tree_leaves((args, results)) if isinstance(leaf, Tensor)]
            self.bytes += sum(
                math.prod(n for n, s in zip(v.shape, v.stride(), strict=True) if s) * v.itemsize for v in touched
            )
        return results


def print_traffic() -> None:
    """What docs/kernels.md counts, for one size of sample."""
    lines = ["| operation | bytes an element: fused | eager | launches of eager torch |", "|---|---|---|---|"]
    for case in cases(torch.device("cpu"), small=True):
        if case.size != COUNTED or case.name == "renoise, channels last":
            continue
        arguments = case.make(1)
        with Traffic() as traffic:
            case.eager(*arguments)
        elements = torch.Size(map(int, case.size.split("x"))).numel()
        fused = f"{case.moved / elements:.0f}"
        lines.append(f"| {case.name} | {fused} | {traffic.bytes / elements:.0f} | {traffic.launches} |")
    print("\n".join(lines))


def check_in_interpreter() -> None:
    checked = set()
    for case in cases(torch.device("cpu"), small=True):
        # bfloat16 results round differently in the interpreter, which cuts them off.
        if case.exact:
            difference = compare(case)
            if not difference < 2e-2:
                raise SystemExit(f"{case.name} {case.size}: differs from torch by {difference:.1e}")
        else:
            case.fused(*case.make(1))
        checked.add(case.name)
    print(f"no CUDA GPU here: {len(checked)} operations agree with torch in Triton's interpreter; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON of everything measured")
    parser.add_argument("--only", default="", help="operations, by the beginning of their names")
    parser.add_argument("--traffic", action="store_true", help="count bytes and launches of eager torch; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="the smallest and the largest samples alone")
    options = parser.parse_args()
    if options.traffic:
        print_traffic()
        return
    if not torch.cuda.is_available():
        check_in_interpreter()
        return
    import triton

    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": properties.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "copy_gigabytes_per_second": copy_bandwidth(),
        "rows": [],
    }
    print(f"{report['gpu']}, torch {report['torch']}, triton {report['triton']}")
    print(f"copy: {report['copy_gigabytes_per_second']:.0f} GB/s read and written\n")
    wanted = tuple(name for name in options.only.split(",") if name)
    ends = {"x".join(map(str, SIZES[k])) for k in (0, -1)}
    for case in cases(torch.device("cuda"), small=False):
        if (wanted and not case.name.startswith(wanted)) or (
            options.quick and "x" in case.size and case.size not in ends
        ):
            continue
        row = measure(case, report["copy_gigabytes_per_second"], properties.L2_cache_size)
        report["rows"].append(row)
        print(table([row]).splitlines()[-1], flush=True)
        if options.output:  # a run that is cut off leaves what it had
            with atomic_file(options.output) as temporary:
                temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
        torch.cuda.empty_cache()
    print("\n" + table(report["rows"]))
    missed = [line for row in report["rows"] for line in misses(row)]
    print("\n" + ("targets missed:\n  " + "\n  ".join(missed) if missed else "every target reached"))
    errors = [line for row in report["rows"] for line in wrong(row)]
    if errors:
        raise SystemExit("wrong:\n  " + "\n  ".join(errors))


if __name__ == "__main__":
    main()
