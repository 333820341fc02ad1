"""Every method as a whole: it trains, pays for nothing it does not use, and refuses what it lacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill, load_student
from fdistill.base.errors import ArgumentError, ConfigError, DataError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import dump_config, load_config
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import GeneratorConfig
from fdistill.denoiser import Denoiser
from fdistill.generator import FewStepGenerator
from fdistill.methods import METHODS
from fdistill.noise import EDMSchedule, karras_levels
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step import Networks, Pairs, diffratio_step, generator_step, uni_instruct_step
from fdistill.training.build import build
from fdistill.training.journal import read_records
from support.denoisers import GaussianDenoiser
from support.networks import ExactLogRatio, LinearGenerator
from support.thorough import at_night

QUICK = {"batch_size": 8, "iterations": 2, "log.every": 1, "log.samples_every": 0, "log.tracker": "none"}
SMALL = {"regression.pairs": 16, "teacher_samples.count": 16, "teacher_samples.num_steps": 3}
GUIDED: dict[str, object] = {"guidance_scale": 2.0, "guidance_teacher": "digits"}

ROLES = {
    "f-distill": {"generator", "fake_score", "discriminator"},
    "dmd2": {"generator", "fake_score", "discriminator"},
    "decoupled-dmd": {"generator", "fake_score", "discriminator"},
    "dmd": {"generator", "fake_score"},
    "diff-instruct": {"generator", "fake_score"},
    "vsd": {"generator", "fake_score"},
    "sim": {"generator", "fake_score"},
    "sid": {"generator", "fake_score"},
    "sida": {"generator", "fake_score"},
    "uni-instruct": {"generator", "fake_score", "discriminator"},
    "regression": {"generator"},
    "diffratio": {"generator", "fake_score", "discriminator"},
}


def _often(method: str) -> bool:
    """Of these methods by day one alone is tried."""
    return method in ("dmd2", "sida", "vsd", "dmd", "diffratio")


def run(teacher: Path, output: Path, **settings: object) -> Path:
    overrides: dict[str, Any] = {"teacher": str(teacher), **QUICK, **SMALL, **needed(settings), **settings}
    return distill("digits", output=output, **overrides)


def built(teacher: Path, **settings: object) -> Any:
    config = load_config("digits", {"teacher": str(teacher), **QUICK, **SMALL, **needed(settings), **settings})
    return build(config, torch.device("cpu"))


def needed(settings: Mapping[str, object]) -> dict[str, object]:
    """What a method needs beside its name: guidance, where it is a term of its own."""
    return GUIDED if settings.get("method") == "decoupled-dmd" else {}


def weights(student: Path) -> dict[str, Tensor]:
    return load_file(student / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_table_of_this_file_names_every_method() -> None:
    assert ROLES.keys() == METHODS.keys()


@pytest.mark.parametrize("method", at_night(METHODS, lambda name: _often(name) or name in ("sim", "diff-instruct")))
def test_a_method_trains_from_its_name_alone(tiny_teacher: Path, tmp_path: Path, method: str) -> None:
    student = run(tiny_teacher, tmp_path / "run", method=method)
    trained, start = weights(student), weights(tiny_teacher)
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert {key.split("/")[0] for key in records[-1] if key.endswith("grad_norm")} == ROLES[method]
    assert all(records[-1][f"{role}/grad_norm"] > 0 for role in ROLES[method] - {"discriminator"})
    assert load_config(str(tmp_path / "run" / "config.yaml")).method == method


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_config_reads_back(method: str, tmp_path: Path) -> None:
    config = load_config("digits", {"method": method, **needed({"method": method})})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_the_files_settings_come_over_the_methods(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("method: sid\nobjective: {alpha: 0.7}\n")
    config = load_config(str(tmp_path / "own.yaml"))
    assert config.objective.alpha == 0.7
    assert config.critic_steps == 1
    assert load_config(str(tmp_path / "own.yaml"), ["objective.alpha=0.9"]).objective.alpha == 0.9
    assert DistillConfig(method="sid").objective.alpha == 1.2
    assert DistillConfig().divergence == "jensen-shannon"


def test_reverse_kl_and_dmd2_without_the_gan_are_one(tiny_teacher: Path, tmp_path: Path) -> None:
    no_gan = {"generator.gan_weight": 0.0, "discriminator.gan_weight": 0.0, "iterations": 3}
    first = run(tiny_teacher, tmp_path / "f", divergence="reverse-kl", **no_gan)
    second = run(tiny_teacher, tmp_path / "dmd2", method="dmd2", **no_gan)
    one, two = weights(first), weights(second)
    assert all(torch.equal(one[name], two[name]) for name in one)


class _Seen:
    """Evaluations of denoisers: which network, on what input, and whether weight gradients were on."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool]] = []


@contextmanager
def recorded(*networks: Denoiser) -> Iterator[_Seen]:
    seen = _Seen()
    for network in networks:
        inner = network.run

        def run_recorded(fed: Tensor, *rest: Any, inner: Any = inner, network: Denoiser = network, **kw: Any) -> Any:
            trainable = any(p.requires_grad for p in network.parameters())
            seen.calls.append(
                (id(network), hash(fed.detach().numpy().tobytes()), trainable and torch.is_grad_enabled())
            )
            return inner(fed, *rest, **kw)

        network.run = run_recorded  # type: ignore[method-assign]
    yield seen


EVALUATIONS = {  # (critic, student): student itself, teacher, fake score on fakes, tapped network on reals
    "f-distill": (3, 3),
    "dmd2": (3, 3),
    "decoupled-dmd": (3, 4),
    "dmd": (2, 4),
    "diff-instruct": (2, 3),
    "vsd": (2, 3),
    "sim": (2, 3),
    "sid": (2, 3),
    "sida": (3, 3),
    "uni-instruct": (3, 3),
    "regression": (0, 1),
    "diffratio": (3, 2),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_network_is_evaluated_twice_on_one_input_and_no_frozen_weight_gets_a_gradient(
    tiny_teacher: Path, method: str
) -> None:
    made = built(tiny_teacher, method=method)
    networks, labels = made.networks, torch.arange(8) % 10
    real = torch.rand(8, 1, 8, 8) * 2 - 1
    pairs = {"pairs": Pairs(torch.randn(8, 1, 8, 8), real, labels)} if METHODS[method].pairs else {}
    denoisers = (networks.unguided.teacher, networks.fake_score, made.student.denoiser)
    updates = (
        (lambda: made.critic_update(real, labels, torch.Generator().manual_seed(0)), ("fake_score", "discriminator")),
        (
            lambda: made.student_update(labels, torch.Generator().manual_seed(0), batch_size=8, **pairs),
            ("generator",),
        ),
    )
    for (update, trained), expected in zip(updates, EVALUATIONS[method], strict=True):
        if METHODS[method].critic is None and "generator" not in trained:
            continue
        with recorded(*denoisers) as seen:
            update().loss.backward()
        assert len(seen.calls) == expected
        assert len({call[:2] for call in seen.calls}) == expected, "one network, one input, twice"
        own = {id(getattr(networks, role)) for role in trained} | {
            id(made.student.denoiser) for r in trained if r == "generator"
        }
        for network, _, with_weight_gradients in seen.calls:
            assert with_weight_gradients == (network in own)
        for role in ("teacher", "generator", "fake_score", "discriminator"):
            module = getattr(networks, role)
            if module is not None and role not in trained:
                assert all(p.grad is None for p in module.parameters()), role
        for role in trained:
            if getattr(networks, role) is not None:
                for p in getattr(networks, role).parameters():
                    p.grad = None


def saved_bytes(update: Any) -> int:
    """Of distinct tensors that autograd keeps for the backward pass, weights apart."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, torch.nn.Parameter):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = update()
    assert result is not None
    return sum(kept.values())


def test_evaluations_that_need_no_gradient_keep_no_activations(tiny_teacher: Path) -> None:
    """Diff-Instruct keeps what the student alone keeps; SiD, whose gradient passes through both networks, far more."""
    labels, noise = torch.arange(8) % 10, torch.randn(8, 1, 8, 8)

    def step(method: str, **settings: float) -> int:
        made = built(tiny_teacher, method=method, **settings)
        return saved_bytes(lambda: made.student_update(labels, torch.Generator().manual_seed(0), batch_size=8).loss)

    student = built(tiny_teacher, method="diff-instruct").student
    alone = saved_bytes(lambda: student(noise, labels))
    assert step("diff-instruct") < 1.02 * alone
    assert step("f-distill", **{"generator.gan_weight": 0.0}) < 1.02 * alone
    assert step("f-distill") < 1.7 * alone  # and the encoder of the tapped network, for the GAN term
    assert step("sid") > 2.5 * alone


def test_diffratio_with_the_exact_ratio_is_diff_instruct_with_exact_scores() -> None:
    p, q, schedule = (0.3, 0.8), (-0.2, 0.6), EDMSchedule()
    gradients = []
    for step in (diffratio_step, generator_step):
        teacher, fake = GaussianDenoiser(*p, size=3), GaussianDenoiser(*q, size=3)
        student = LinearGenerator(a=q[1], b=q[0], size=3)
        networks = Networks(teacher, fake, student, ExactLogRatio(p, q, schedule), fake)  # type: ignore[arg-type]
        rest: dict[str, Any] = {} if step is diffratio_step else {"gan_weight": 0.0}
        step(
            networks,
            None,
            torch.Generator().manual_seed(0),
            batch_size=64,
            weighting="vsd",
            levels=lambda schedule, u: karras_levels(schedule, u, low=0.1, high=0.7),
            **rest,
        ).loss.backward()
        gradients.append(torch.stack([student.a.grad, student.b.grad]))  # type: ignore[list-item]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_dmds_regression_is_the_mean_square_of_its_pairs(tiny_teacher: Path) -> None:
    made = built(tiny_teacher, method="dmd")
    labels, noise, x0 = torch.arange(8) % 10, torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8)
    torch.manual_seed(0)
    losses = [
        made.student_update(labels, torch.Generator().manual_seed(0), batch_size=8, **pairs).loss
        for pairs in ({}, {"pairs": Pairs(noise, x0, labels)})
    ]
    expected = 0.25 * (made.student(noise, labels) - x0).square().mean()
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-5, atol=1e-6)


def test_uni_instructs_gradient_passes_through_the_ratio(tiny_teacher: Path) -> None:
    gradients = []
    for detach in (False, True):
        made = built(tiny_teacher, method="uni-instruct", **{"objective.detach_weight": detach})
        for parameter in made.networks.fake_score.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        made.student_update(torch.arange(8), torch.Generator().manual_seed(0), batch_size=8).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.student.parameters() if p.grad is not None]))
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


def test_steps_that_need_a_ratio_say_so() -> None:
    networks = Networks(GaussianDenoiser(0, 1), GaussianDenoiser(0, 1), LinearGenerator(1.0, 0.0, 1))
    for step in (generator_step, uni_instruct_step):
        with pytest.raises(ArgumentError, match=r"'jensen-shannon' weighs by a density ratio; expected a DensityRatio"):
            step(networks, None, torch.Generator(), batch_size=2, divergence="js")
        with pytest.raises(ArgumentError, match="expected `discriminator` and `tapped`"):
            step(networks, None, torch.Generator(), batch_size=2, divergence="js", ratio=DensityRatio())


def test_no_discriminator_is_built_where_none_is_used(tiny_teacher: Path) -> None:
    for method, roles in ROLES.items():
        assert built(tiny_teacher, method=method).optimizers.keys() == roles
    assert built(tiny_teacher, method="sida").networks.discriminator is not None
    assert built(tiny_teacher, method="sid").networks.discriminator is None


def square_half(r: Tensor) -> Tensor:
    return (r - 1) ** 2 / 2


def test_a_divergence_of_ones_own_by_module_and_function(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"ratio.warmup": 0, "iterations": 4, "generator.lr": 1e-2, "discriminator.lr": 1e-2}
    students = [
        weights(run(tiny_teacher, tmp_path / str(k), divergence=divergence, **settings))
        for k, divergence in enumerate(["test_methods:square_half", square_half, "alpha(2)", "forward-kl"])
    ]

    def distance(k: int) -> float:
        return max((students[0][name] - students[k][name]).abs().max().item() for name in students[0])

    assert distance(1) == 0
    assert distance(2) < 0.1 * distance(3)  # h = r^2, as here, and h = r
    with pytest.raises(ConfigError, match="module:function"):
        run(tiny_teacher, tmp_path / "none", divergence="test_methods:nothing")


@pytest.mark.parametrize("method", at_night(["f-distill", "dmd2", "sida", "uni-instruct", "diffratio"], _often))
def test_data_free(tiny_teacher: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With teacher samples for data, the data set is not even loaded; the samples are made once."""
    monkeypatch.setattr("fdistill.training.inputs.open_source", lambda name: pytest.fail(f"loaded {name}"))
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    run(tiny_teacher, tmp_path / "run", method=method, data="teacher-samples")
    monkeypatch.setattr("fdistill.data.teacher_samples.heun_sample", lambda *a, **k: pytest.fail("made again"))
    run(tiny_teacher, tmp_path / "again", method=method, data="teacher-samples")
    one, two = weights(tmp_path / "run" / "student"), weights(tmp_path / "again" / "student")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_methods_that_read_no_images_need_none(tiny_teacher: Path, tmp_path: Path) -> None:
    for method in ("sid", "sim", "dmd", "diff-instruct", "vsd", "regression"):
        run(tiny_teacher, tmp_path / method, method=method, data=None, iterations=1)
    with pytest.raises(ConfigError, match=r"data: got null.*expected a data set, or teacher-samples"):
        run(tiny_teacher, tmp_path / "f", data=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sidd"}, "did you mean 'sid'"),
        (
            {"divergence": "js", "discriminator.gan_weight": 0.0, "generator.gan_weight": 0.0},
            "discriminator.gan_weight > 0",
        ),
        ({"divergence": "alpha(0.5)", "discriminator.gan_weight": 0.0}, "discriminator.gan_weight > 0"),
        ({"method": "dmd", "regression.pairs": 0}, "regression.pairs: method=dmd regresses"),
        ({"method": "dmd", "regression.weight": 0.0}, "regression.weight: method=dmd needs it"),
        ({"method": "sid", "generator.gan_weight": 1e-3}, "has no discriminator; expected 0, or method=sida"),
        ({"method": "sid", "discriminator.gan_weight": 1e-2}, "has no discriminator; expected 0, or method=sida"),
        ({"method": "dmd", "generator.gan_weight": 1e-3}, "has no discriminator; expected 0, or method=dmd2"),
        ({"method": "sim", "generator.gan_weight": 1e-3}, "has no discriminator; expected 0, or method=f-distill"),
        (
            {"method": "sid", "discriminator.r1_weight": 1.0},
            "discriminator.r1_weight: got 1.0, but method=sid has no discriminator",
        ),
        ({"method": "regression", "condition_dropout": 0.1}, "condition_dropout: .*method=regression trains no fake"),
        ({"method": "regression", "regression.weight": 0.0}, "regression.weight: method=regression needs it"),
        (
            {"method": "sid", "discriminator.r1": "approximate"},
            "discriminator.r1: got 'approximate', but method=sid has no discriminator",
        ),
        ({"discriminator.r1": "approximate"}, "discriminator.r1: got 'approximate', which nothing reads"),
        (
            {"discriminator.r1_weight": 1.0, "discriminator.r1_sigma": 0.3},
            "discriminator.r1_sigma: got 0.3, which nothing reads; expected discriminator.r1=approximate",
        ),
        ({"method": "sid", "objective.alpha": None}, "objective.alpha: method=sid needs it"),
        (
            {"method": "sid", "divergence": "js"},
            "divergence: method=sid has a fixed divergence.*f-distill, uni-instruct",
        ),
        (
            {"objective.alpha": 1.0},
            "objective.alpha: got 1.0, which method=f-distill does not read; it is for sid, sida",
        ),
        ({"regression.weight": 1.0}, "it is for dmd"),
        ({"method": "sim", "generator.weighting": "vsd"}, "generator.weighting: got 'vsd', which method=sim does not"),
        ({"method": "diffratio", "generator.weighting": "normalised"}, "expected weighting=vsd or uniform"),
        ({"method": "diffratio", "generator.gan_weight": 1e-3}, "expected weighting=vsd or uniform, and gan_weight=0"),
        ({"student_level": [9.0 - step for step in range(9)]}, "expected 1 to 8 falling levels"),
        ({"student.steps": 4, "student_level": [2.5, 0.5]}, "student.steps: got 4, but student_level lists 2 levels"),
        ({"student.steps": 4, "student.shift": 3.0}, "student.shift: got 3, but the teacher is no flow"),
        ({"student.shift": 3.0}, "student.shift: got 3, but student.steps is null"),
        ({"student.steps": 1, "student.any_step": True}, "student.any_step: got True, but the student takes one step"),
        ({"student.sampler": "deterministic"}, "student.sampler: got deterministic, but the student takes one step"),
        ({"student.simulated": 0.5}, "student.simulated: got 0.5, but the student takes one step"),
        (
            {
                "method": "diff-instruct",
                "data": None,
                "student.steps": 2,
                "student.simulated": 0.5,
            },
            "student.simulated: got 0.5, but data is null",
        ),
        ({"student.generator": "tiue", "student.steps": 2}, "student.steps: got 2, but generator=tiue takes one step"),
        (
            {"student.generator": "tiue", "student.any_step": True},
            "student.any_step: got True, but generator=tiue takes",
        ),
        ({"student_level": [0.5, 2.5]}, "expected 1 to 8 falling levels"),
        ({"student_level": []}, "expected 1 to 8 falling levels"),
        ({"student_level": [90.0, 2.5]}, r"levels: expected falling numbers in \(0.002, 80\]"),
        ({"discriminator.head": "channel-mean", "discriminator.source": "teacher"}, "expected fake"),
        ({"discriminator.head": "channel-mean", "discriminator.features": ["mid", "down0"]}, "expected one of"),
        (
            {"method": "diffratio", "discriminator.gan_weight": 0.0},
            "discriminator.gan_weight: got 0, but method=diffratio trains nothing but its classifier",
        ),
        ({"method": "sid", "discriminator.head": "channel-mean"}, "discriminator.head: .*choose a method.*sida"),
        ({"method": "sid", "discriminator.features": ["down0"]}, "discriminator.features: .*no discriminator"),
        ({"method": "sid", "discriminator.shared_noise": True}, "discriminator.shared_noise: .*no discriminator"),
        ({"method": "diffratio", "discriminator.shared_noise": True}, "diffratio draws levels separately; expected f"),
        (
            {"method": "diffratio", "discriminator.source": "teacher"},
            "trains the network its heads read; expected f",
        ),
        ({"method": ["sid"]}, r"method: got \['sid'\]; did you mean 'sid'"),
        ({"student_level": "abc"}, "student_level: got 'abc'; expected a level above 0, a list of them, or null"),
        ({"student_level": -1}, "student_level: got -1; expected a level above 0"),
        ({"student_level": [2.5, float("nan")]}, "expected a level above 0"),
        ({"divergence": "alpha(1000)"}, r"h\(200\) is inf.*expected ratio.lower and ratio.upper closer together"),
        ({"divergence": lambda r: r - 1}, "test_methods:<lambda>"),
        ({"divergence": "alpha(inf)"}, "finite number"),
        ({"divergence": "alpha(nan)"}, "finite number"),
    ],
)
def test_what_a_method_lacks_is_said(
    tiny_teacher: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_teacher, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_dry_run_names_the_method_and_makes_no_samples(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdistill.training.inputs.teacher_samples", lambda *a, **k: pytest.fail("made samples"))
    text = describe(load_config("digits", {"teacher": str(tiny_teacher), "method": "dmd"}))
    assert "method         dmd: reverse KL with regression on the teacher's own ODE pairs" in text
    assert "discriminator  none" in text
    text = describe(load_config("digits", {"teacher": str(tiny_teacher), "student_level": [2.5, 0.5]}))
    assert "2 evaluations at levels 2.5, 0.5" in text
    with pytest.raises(DataError, match="did you mean 'digits'"):
        describe(load_config("digits", {"teacher": str(tiny_teacher), "data": "digitts"}))


def test_a_lora_critic_shares_its_base_and_trains_its_adapters_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    made = built(tiny_teacher, method="vsd", **{"fake_score.lora_rank": 4})
    teacher, fake = made.networks.teacher, made.networks.fake_score
    own = {p.data_ptr() for p in teacher.parameters()}
    adapters = [p for p in fake.parameters() if p.requires_grad]
    assert {p.data_ptr() for p in fake.parameters() if not p.requires_grad} == own
    assert sum(p.numel() for p in adapters) < 0.5 * sum(p.numel() for p in teacher.parameters())
    saved = {name for name in made.state() if name.startswith("fake_score.")}
    assert saved
    assert all("lora_" in name for name in saved)
    x_t, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.arange(4)
    torch.testing.assert_close(fake(x_t, t, labels), teacher(x_t, t, labels), rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(dict(teacher.named_parameters()))
    run(tiny_teacher, tmp_path / "run", method="vsd", **{"fake_score.lora_rank": 4})
    made.critic_update(torch.zeros(4, 1, 8, 8), labels, torch.Generator().manual_seed(0)).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapters)
    made.optimizers["fake_score"].step()
    assert (fake(x_t, t, labels) - teacher(x_t, t, labels)).abs().max() > 1e-5
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_without_peft_lora_says_what_to_install(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdistill.students.lora.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fdistill\[lora\]'"):
        built(tiny_teacher, method="vsd")


@pytest.mark.parametrize("method", at_night(["f-distill", "dmd2"], _often))
@pytest.mark.parametrize("levels", [[2.5, 0.5], [80.0, 5.0, 1.0, 0.3]])
def test_students_of_a_few_steps_train_and_load(
    tiny_teacher: Path, tmp_path: Path, method: str, levels: list[float]
) -> None:
    run(tiny_teacher, tmp_path / "run", method=method, student_level=levels, **{"log.samples_every": 1})
    student = load_student(tmp_path / "run")
    assert list(student.levels) == levels
    noise = torch.randn(3, *([len(levels)] if len(levels) > 1 else []), 1, 8, 8)
    assert student(noise, torch.arange(3)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("method", at_night(["f-distill", "vsd", "dmd", "diffratio"], _often))
def test_resumed_runs_equal_uninterrupted_ones(tiny_teacher: Path, tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"method": method, "log.checkpoint_every": 2}
    if method == "f-distill":
        settings["student_level"] = [2.5, 0.5]
    straight = run(tiny_teacher, tmp_path / "straight", iterations=4, **settings)
    run(tiny_teacher, tmp_path / "resumed", iterations=2, **settings)
    overrides: dict[str, Any] = {"teacher": str(tiny_teacher), **QUICK, **SMALL, **settings, "iterations": 4}
    resumed = distill("digits", output=tmp_path / "resumed", resume=True, **overrides)
    one, two = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_config_and_a_page(method: str) -> None:
    root = Path(__file__).parent.parent
    name = "digits" if method == "f-distill" else f"digits-{method}"
    assert load_config(name).method == method
    page = (root / "docs" / "methods" / f"{method}.md").read_text()
    assert f"`method={method}`" in page
    assert f"fdistill distill {name} " in page
    assert f"]({method}.md)" in (root / "docs" / "methods" / "README.md").read_text()


def test_a_section_given_as_an_object_keeps_the_methods_settings() -> None:
    config = DistillConfig(method="diff-instruct", generator=GeneratorConfig(lr=2e-4))
    assert (config.generator.lr, config.generator.weighting, config.generator.gan_weight) == (2e-4, "uniform", 0.0)


def test_settings_written_for_one_method_are_not_taken_for_another(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config("digits", {"method": "sid"})))
    for name in ("digits-sid", str(tmp_path / "config.yaml")):
        with pytest.raises(ConfigError, match=r"are for 'sid'; choose a config for 'dmd2', or one that names no"):
            load_config(name, ["method=dmd2"])


def test_the_decoder_of_diffratios_classifier_is_not_trained(tiny_teacher: Path) -> None:
    made = built(tiny_teacher, method="diffratio")
    trained = {name for name, p in made.networks.fake_score.named_parameters() if p.requires_grad}
    assert any("mid_block" in name for name in trained)
    assert not any("up_blocks" in name or "conv_out" in name for name in trained)
    made.critic_update(torch.zeros(8, 1, 8, 8), torch.arange(8), torch.Generator().manual_seed(0)).loss.backward()
    assert all(p.grad is not None for p in made.networks.fake_score.parameters() if p.requires_grad)
    assert not any(name.startswith("fake_score.") and "up_blocks" in name for name in made.state())


def test_few_step_students_take_all_their_steps_unless_told(tiny_teacher: Path) -> None:
    made = built(tiny_teacher, student_level=[2.5, 0.5])
    with recorded(made.student.denoiser) as seen:
        made.student_update(torch.arange(8), torch.Generator().manual_seed(0), batch_size=8)
        made.student_update(torch.arange(8), torch.Generator().manual_seed(0), batch_size=8, rollout=Rollout((2.5,)))
    assert [with_gradient for _, _, with_gradient in seen.calls] == [False, True, True]


@pytest.mark.thorough
def test_every_step_of_a_few_step_student_is_trained(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its own samples, from data, and on the way to fewer steps; data that steps begin with is the run's."""
    forward, a, b, c = FewStepGenerator.forward, 80.0, 5.0, 1.0
    seen: dict[str, set[tuple[tuple[float, ...], bool]]] = {}

    def recording(
        self: FewStepGenerator, noise: Tensor, condition: Tensor | None = None, rollout: Rollout | None = None
    ) -> Tensor:
        if rollout is None:  # the picture of samples at the end
            return forward(self, noise, condition)
        data = rollout.x0 is not None
        seen.setdefault("student" if torch.is_grad_enabled() else "critic", set()).add((rollout.levels, data))
        if rollout.x0 is not None:
            assert rollout.x0.shape == (8, 1, 8, 8)
            assert rollout.x0.std() > 0.5
        return forward(self, noise, condition, rollout)

    monkeypatch.setattr(FewStepGenerator, "forward", recording)
    simulated = {((a,), False), ((a, b), False), ((a, b, c), False)}
    for name, settings, expected in (
        ("both", {"student.simulated": 0.5}, simulated | {((b,), True), ((c,), True)}),
        ("any", {"student.any_step": True}, simulated),  # of one, two and three steps; of two it passes the first two
    ):
        seen.clear()
        run(tiny_teacher, tmp_path / name, student_level=[a, b, c], iterations=20, critic_steps=1, **settings)
        assert seen == {"student": expected, "critic": expected}, name
