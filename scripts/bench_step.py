"""Time, operations, memory and waits of the critic's and the student's update of any config; prints JSON.

    python scripts/bench_step.py CONFIG [key=value ...] [--against key=value,key=value] [--repeats 7] [--profile TRACE]
    python scripts/bench_step.py edm-w32       # random weights: EDM's CIFAR-10 network of width 32; or edm-w128, sd15
    python scripts/bench_step.py edm-w128 backend=reference --against backend=auto,speed.compile=true

`backend` is no setting of a config: with backend=reference plain torch does what fused kernels do elsewhere.

Both updates run as in training, on random samples of the teacher's shape. Everything runs twice before it is timed;
times are medians. With --against a second run has the further settings, and the two take turns; the difference of their
gradients, from the same weights and random numbers, is divided by the norm of the first one's. Memory is then that of
both runs, which are there at once. Beside other programs both have as many threads as the first run's
speed.share_cores says. Operations are those of matrix products and convolutions; their share of the peak is of a large
matrix product, timed in between. With --output the times are written before the rest is measured.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from bench_teachers import WORK
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.files import atomic_file
from fdistill.condition import TextCondition
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.data.loader import Batch
from fdistill.denoiser import Denoiser
from fdistill.guidance import GuidedDenoiser
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.distillation import Distillation
from fdistill.training.inputs import training_data
from fdistill.training.journal import Journal
from fdistill.training.loop import draw_critic_samples, settle, update_critic, update_student
from fdistill.training.optimise import Role
from fdistill.training.speed import follow_others

SAMPLES, CRITIC, STUDENT = "samples", "critic", "student"
_WARM_UP = 2
_BACKEND = "backend="
#: Every update is one of the first iteration, in which a warm-up would leave weights, and so gradients, as they begin.
_WHOLE_RATES = ("generator.lr_warmup=0", "fake_score.lr_warmup=0")


class Bench:
    """A run whose two updates can be called by themselves; `backend` is that of the fused kernels."""

    def __init__(self, config: DistillConfig, device: torch.device, backend: str = "auto"):
        self.run: Distillation = build(config, device)
        self.device = device
        self._backend = backend
        self._roles = {name: Role(self.run.role(name), optimizer) for name, optimizer in self.run.optimizers.items()}
        ratio = self.run.ratio
        schedule = self.run.networks.teacher.schedule
        self._journal = Journal(
            lambda t: ratio.bin_index(ratio.bin_level(schedule, t)), ratio.num_bins, config.max_skipped
        )
        self._generator = torch.Generator(device)
        self._batches = Batches(self.run, terms_data(self.run), self._samples())
        self._drawn: dict[str, Tensor] = {}
        settle(self.run, self._roles, self._generator)

    def _samples(self) -> Iterator[Batch]:
        config, teacher = self.run.config, self.run.networks.teacher
        draws = torch.Generator().manual_seed(0)
        rows = torch.arange(config.batch_size // rng.world()[1])
        images = torch.randn(len(rows), *teacher.sample_shape, generator=draws).clamp(-1, 1)
        example: Any = teacher.example_condition(len(rows), "cpu")
        if isinstance(teacher, GuidedDenoiser) and isinstance(teacher.null, TextCondition):
            example = teacher.null.to("cpu").repeated(len(rows))  # as long as the text encoder makes them
        text = example if isinstance(example, TextCondition) else None
        while True:
            yield Batch(images, rows % (teacher.num_classes or 1), rows, text)

    def samples(self) -> None:
        """Draws the samples that the critic's updates of an iteration share."""
        self._drawn = {"fake_x0": draw_critic_samples(self.run, self._batches.critic(0), self._generator)}

    def critic(self) -> None:
        """One update of the critic; with reuse_samples without the student's samples, which `samples` draws."""
        if self.run.stage.config.reuse_samples and not self._drawn:
            self.samples()
        arguments = {**self._batches.critic(0), **self._drawn, **self._kernels(self.run.critic_update)}
        update_critic(self.run, 0, arguments, self._roles, self._generator, self._journal)

    def student(self) -> None:
        """One update of the student, and of its averages."""
        arguments = {**self._batches.student(), **self._kernels(self.run.student_update)}
        update_student(self.run, arguments, self._roles, self._generator, self._journal)
        self.run.ema.update(self.run.stage.config.ema.decays)

    def _kernels(self, update: Callable[..., Any]) -> dict[str, str]:
        """The backend, for an update that has fused kernels."""
        return {"backend": self._backend} if "backend" in inspect.signature(update).parameters else {}

    def gradient(self, update: str) -> Tensor:
        """All gradients of an update in one vector, always from the same random numbers; weights stay as they are."""
        kept: list[Tensor] = []

        def keep(role: Role) -> Tensor:
            for parameter in role.parameters:
                if parameter.grad is not None:
                    kept.append(parameter.grad.flatten().double())
                    parameter.grad = None
            return torch.zeros((), device=self.device)

        self._generator.manual_seed(0)
        step = Role.step
        Role.step = keep  # type: ignore[method-assign, assignment]
        self._drawn = {}
        try:
            self.updates[update]()
        finally:
            Role.step = step  # type: ignore[method-assign]
        return torch.cat(kept)

    def take_weights(self, other: Bench) -> None:
        """Takes those of another run of the same networks, and its density ratio."""
        for name in self._roles:
            self.run.role(name).load_state_dict(other.run.role(name).state_dict())
        self.run.ratio.bins = other.run.ratio.bins.clone()

    @property
    def updates(self) -> dict[str, Callable[[], None]]:
        """Update -> how to run it once."""
        shared = {SAMPLES: self.samples} if self.run.stage.config.reuse_samples else {}
        critic = {CRITIC: self.critic} if self.run.stage.critic_steps else {}
        return {**shared, **critic, STUDENT: self.student}


def terms_data(run: Distillation) -> Any:
    """What terms of the loss read beside samples: the teacher's own for regression, prompts for CLIP and rewards. Only
    for these terms the config's data are opened.
    """
    config = run.config
    if config.regression.weight or config.clip_loss.used or config.reward.used:
        return training_data(run)
    return SimpleNamespace(pairs=None, text=None)


def opened(name: str, overrides: list[str]) -> Bench:
    """The run of a config, or of one of WORK, with further settings; `backend=...` is that of the kernels."""
    sys.path.insert(0, str(Path(__file__).parent))  # of the teachers in WORK
    config, *settings = WORK.get(name, [name])
    backends = [text.removeprefix(_BACKEND) for text in overrides if text.startswith(_BACKEND)]
    own = (text for text in overrides if not text.startswith(_BACKEND))
    loaded = load_config(config, [*settings, *_WHOLE_RATES, *own])
    return Bench(loaded, start(loaded.device)[1], *backends[-1:])


def machine(device: torch.device) -> dict[str, Any]:
    """What ran it."""
    named = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"device": named, "threads": torch.get_num_threads(), "torch": torch.__version__}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations per second of the best of several large matrix products in the precision that networks compute in."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def counted(update: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        update()
    return int(counter.get_total_flops())


def memory_peak(update: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of an update: allocated on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        update()
        return torch.cuda.max_memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now
    except OSError:
        update()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def profiled(update: Callable[[], None], device: torch.device, trace: Path | None) -> dict[str, float]:
    """What an update starts, how often the host reads a value of the device, and how long a GPU works for it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        update()
        synchronize(device)
    if trace is not None:
        found.export_chrome_trace(str(trace))
    names = Counter(event.name for event in found.events())
    launches = sum(count for name, count in names.items() if "LaunchKernel" in name)
    operations = sum(count for name, count in names.items() if name.startswith("aten::"))
    return {
        "launches": launches if device.type == "cuda" else operations,
        "host_reads": names["aten::_local_scalar_dense"],
        **({"gpu_seconds": busy_seconds(found.events())} if device.type == "cuda" else {}),
    }


def busy_seconds(events: Iterable[Any]) -> float:
    """How long a GPU works on at least one event of a profile; those of the CPU, and annotations, do not count."""
    own = [
        each
        for each in events
        if each.device_type == DeviceType.CUDA and not getattr(each, "is_user_annotation", False)
    ]
    total, until = 0.0, float("-inf")
    for begin, end in sorted((each.time_range.start, each.time_range.end) for each in own):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / 1e6


@contextmanager
def clocked(bench: Bench, spent: Counter[str]) -> Iterator[None]:
    """Inside, the forward passes of each role's network are timed."""
    networks = bench.run.networks
    roles: dict[str, Any] = {
        "teacher": networks.teacher,
        "fake score": networks.fake_score,
        "student": bench.run.student,
    }
    if networks.discriminator is not None:
        roles["heads"] = networks.discriminator
    changed: list[tuple[nn.Module, str]] = []

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            synchronize(bench.device)
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                synchronize(bench.device)
                spent[phase] += time.perf_counter() - began  # type: ignore[assignment]

        return called

    for role, module in roles.items():
        inner = [each for each in module.modules() if isinstance(each, Denoiser)] if role != "heads" else [module]
        for each in inner[-1:]:
            name = "forward" if role == "heads" else "run"
            setattr(each, name, timed(f"{role}, forward", getattr(each, name)))
            changed.append((each, name))
    backward, step = torch.Tensor.backward, Role.step
    torch.Tensor.backward = timed("backward", backward)  # type: ignore[method-assign]
    Role.step = timed("optimisers", step)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward, Role.step = backward, step  # type: ignore[method-assign]
        for each, name in changed:
            delattr(each, name)


def breakdown(bench: Bench, update: str, repeats: int) -> dict[str, float]:
    """Median seconds of forward passes by role, of the backward pass, of optimisers, and of the rest."""
    found: list[dict[str, float]] = []
    for _ in range(repeats):
        spent: Counter[str] = Counter()
        with clocked(bench, spent):
            whole = seconds(bench.updates[update], bench.device)
        found.append({**spent, "rest": whole - sum(spent.values())})
    return {name: median(each[name] for each in found) for name in found[0]}


def report(
    bench: Bench, times: dict[str, list[float]], peak: float, repeats: int, trace: Path | None
) -> dict[str, Any]:
    """Everything about one run."""
    config = bench.run.config
    found: dict[str, dict[str, Any]] = {}
    for name, update in bench.updates.items():
        flops, middle = counted(update), median(times[name])
        found[name] = {
            "seconds": middle,
            "fastest": min(times[name]),
            "slowest": max(times[name]),
            "images_per_second": config.batch_size / middle,
            "gflop": flops / 1e9,
            "share_of_matrix_peak": flops / middle / peak,
            "peak_bytes": memory_peak(update, bench.device),
            **profiled(update, bench.device, trace and trace.with_suffix(f".{name}.json")),
            "seconds_by_phase": breakdown(bench, name, min(3, repeats)),
        }
        if "gpu_seconds" in found[name]:
            found[name]["gpu_idle"] = 1 - found[name]["gpu_seconds"] / middle
    times_an_iteration = {SAMPLES: 1, CRITIC: bench.run.stage.critic_steps, STUDENT: 1}
    cycle = sum(times_an_iteration[name] * found[name]["seconds"] for name in found)
    return {"iteration_seconds": cycle, "matrix_peak_gflops": peak / 1e9, "updates": found}


def gradient_difference(a: Bench, b: Bench) -> dict[str, float]:
    """Of each update, from the weights of `a`: the norm of the difference, divided by that of the gradient of `a`."""
    b.take_weights(a)
    found = {}
    for update in [name for name in a.updates if name != SAMPLES]:
        plain, other = a.gradient(update), b.gradient(update)
        found[update] = float((other - plain).norm() / plain.norm())
    return found


def write(found: dict[str, Any], output: Path | None) -> None:
    """As JSON, if there is a file for it."""
    if output is not None:
        with atomic_file(output) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config, or one of " + ", ".join(WORK))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--against", help="settings of a second run, with commas between them")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--profile", type=Path, metavar="TRACE", help="a file name for traces of one update of each kind"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    benches = {"a": opened(arguments.config, arguments.overrides)}
    if arguments.against:
        benches["b"] = opened(arguments.config, [*arguments.overrides, *arguments.against.split(",")])
    device = benches["a"].device
    times: dict[str, dict[str, list[float]]] = {
        key: {update: [] for update in bench.updates} for key, bench in benches.items()
    }
    with follow_others(benches["a"].run.config, device) as follow:
        for repeat in range(_WARM_UP + arguments.repeats):
            for key, bench in benches.items():
                for update, call in bench.updates.items():
                    spent = seconds(call, device)
                    follow()
                    if repeat >= _WARM_UP:
                        times[key][update].append(spent)
        found: dict[str, Any] = {
            "config": arguments.config,
            "overrides": arguments.overrides,
            "against": arguments.against,
            "repeats": arguments.repeats,
            **machine(device),
        }
    write(found | {"seconds": times}, arguments.output)
    for key, bench in benches.items():
        peak = matrix_peak(device, bench.run.config.precision)
        trace = arguments.profile and arguments.profile.with_stem(f"{arguments.profile.stem}-{key}")
        found[key] = report(bench, times[key], peak, arguments.repeats, trace)
    if "b" in found:
        found["gradient_difference"] = gradient_difference(benches["a"], benches["b"])
        found["b_over_a"] = found["b"]["iteration_seconds"] / found["a"]["iteration_seconds"]
    write(found, arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
