"""Checks that settings fit together, as far as their values alone show it. Imports no torch.

Checks that need the teacher or a divergence's function are in `training/checks.py`. Each function here raises
ValueError, whose text becomes one line of a ConfigError.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fdistill.base.errors import did_you_mean, shown
from fdistill.config.limits import MAX_NUMBER
from fdistill.config.sections import (
    DiscriminatorConfig,
    EvalConfig,
    FakeScoreConfig,
    GeneratorConfig,
    LogConfig,
    OptimizerConfig,
    StudentConfig,
)
from fdistill.config.terms import RegressionConfig
from fdistill.methods import METHODS, methods_with
from fdistill.student_kinds import MAX_STUDENT_STEPS, STUDENT_KINDS, fall, kinds_with


def objective_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method's objective: its defaults, overridden by the `given` settings of `objective`.
    Unset settings of other methods are left out; set ones raise ValueError.
    """
    owners: dict[str, list[str]] = {}
    for other, method in METHODS.items():
        for key in method.options:
            owners.setdefault(key, []).append(other)
    own = METHODS[name].options
    values = {key: option.default for key, option in own.items()}
    for key, value in given.items():
        if key not in owners:
            raise ValueError(f"objective.{key}: no such setting; {did_you_mean(key, owners)}")
        if key in own:
            values[key] = _checked_option(name, key, value)
        elif value != METHODS[owners[key][0]].options[key].unset:
            raise ValueError(
                f"objective.{key}: got {shown(value)}, which method={name} does not read; it is for "
                f"{', '.join(owners[key])}"
            )
    return values


def _checked_option(name: str, key: str, value: Any) -> Any:
    option = METHODS[name].options[key]
    if isinstance(option.default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"objective.{key}: got {shown(value)}; expected true or false")
        return value
    if value is None:
        raise ValueError(f"objective.{key}: method={name} needs it; expected a number, not None")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
        raise ValueError(f"objective.{key}: got {shown(value)}; expected a number of at most {MAX_NUMBER:g}")
    if option.above is not None and value <= option.above:
        raise ValueError(f"objective.{key}: got {value!r}; expected a number above {option.above:g}")
    return float(value)


def method_settings(name: str, generator: Any) -> Mapping[str, Any]:
    """The settings of a method's row, without a ratio of gradients where the generator's section, a mapping or a
    `GeneratorConfig`, has a weight for the GAN term.
    """
    settings = METHODS[name].settings
    given = generator.model_fields_set if isinstance(generator, GeneratorConfig) else generator or ()
    if not isinstance(given, Collection) or "gan_weight" not in given or "generator" not in settings:
        return settings
    own = {key: value for key, value in settings["generator"].items() if key != "gan_gradient_ratio"}
    return {**settings, "generator": own}


def check_objective(
    name: str, divergence: str | None, generator: GeneratorConfig, regression: RegressionConfig
) -> None:
    """Checks the settings that only some methods read: divergence, weighting and teacher pairs."""
    method = METHODS[name]
    if not method.weighting and generator.weighting != "normalised":
        raise ValueError(
            f"generator.weighting: got {generator.weighting!r}, which method={name} does not read; it is for "
            f"{', '.join(methods_with('weighting'))}"
        )
    if generator.normaliser_floor != GeneratorConfig().normaliser_floor and not (
        method.extra_terms and generator.weighting == "normalised"
    ):
        raise ValueError(
            f"generator.normaliser_floor: got {generator.normaliser_floor:g}, which method={name} with "
            f"generator.weighting={generator.weighting} does not read; expected {GeneratorConfig().normaliser_floor:g}"
        )
    if not method.pairs and regression.weight:
        raise ValueError(
            f"regression.weight: got {regression.weight!r}, which method={name} does not read; it is for "
            f"{', '.join(methods_with('pairs'))}"
        )
    if method.pairs and not regression.weight:
        raise ValueError(
            f"regression.weight: method={name} needs it; expected a number above 0, not {regression.weight}"
        )
    if method.pairs and not regression.pairs:
        raise ValueError(f"regression.pairs: method={name} regresses on teacher pairs; expected a number above 0")
    if method.divergence is None and divergence is not None:
        raise ValueError(
            f"divergence: method={name} has a fixed divergence; expected null, or method="
            f"{', '.join(methods_with('divergence'))}"
        )
    if generator.gan_gradient_ratio and not (method.extra_terms and generator.gan_weight):
        raise ValueError(
            f"generator.gan_gradient_ratio: got {generator.gan_gradient_ratio}, but method={name} with "
            f"generator.gan_weight={generator.gan_weight} has no GAN term beside matching; expected 0"
        )
    if generator.gan_gradient_ratio and generator.gan_weight != GeneratorConfig().gan_weight:
        raise ValueError(
            f"generator.gan_weight: got {generator.gan_weight}, but generator.gan_gradient_ratio="
            f"{generator.gan_gradient_ratio} sets that weight in every update; expected one of them: add "
            "generator.gan_gradient_ratio=0, or leave gan_weight out"
        )


def check_discriminator(
    name: str, data: str | None, generator: GeneratorConfig, discriminator: DiscriminatorConfig
) -> None:
    """Checks that the method may have a discriminator, that it can read its features, and that it is trained."""
    if METHODS[name].discriminator:
        _check_trained(name, data, generator, discriminator)
    else:
        _check_absent(name, generator, discriminator)
    default = DiscriminatorConfig()
    for setting in ("r1", "r1_sigma"):
        unread = not discriminator.r1_weight or (setting == "r1_sigma" and discriminator.r1 == "exact")
        if unread and getattr(discriminator, setting) != getattr(default, setting):
            raise ValueError(
                f"discriminator.{setting}: got {getattr(discriminator, setting)!r}, which nothing reads; expected "
                "discriminator.r1=approximate with discriminator.r1_weight above 0 as well"
            )
    if discriminator.head == "channel-mean" and discriminator.source != "fake":
        raise ValueError("discriminator.source: the channel-mean head has no weights to train; expected fake")


def _check_absent(name: str, generator: GeneratorConfig, discriminator: DiscriminatorConfig) -> None:
    for role, weight in (("generator", generator.gan_weight), ("discriminator", discriminator.gan_weight)):
        if weight > 0:
            raise ValueError(
                f"{role}.gan_weight: got {weight}, but method={name} has no discriminator; expected 0, "
                f"or method={METHODS[name].with_gan}"
            )
    default = DiscriminatorConfig()
    for setting in (
        "checkpoint",
        "source",
        "features",
        "head",
        "gan_weighting",
        "shared_noise",
        "r1_weight",
        "r1",
        "r1_sigma",
    ):
        value = getattr(discriminator, setting)
        if value != getattr(default, setting):
            raise ValueError(
                f"discriminator.{setting}: got {value!r}, but method={name} has no discriminator; leave it out, "
                f"or choose a method that has one: {', '.join(methods_with('discriminator'))}"
            )


def _check_trained(name: str, data: str | None, generator: GeneratorConfig, discriminator: DiscriminatorConfig) -> None:
    if not METHODS[name].scores:
        if discriminator.source != "fake":
            raise ValueError(f"discriminator.source: method={name} trains the network its heads read; expected fake")
        if discriminator.shared_noise:
            raise ValueError(f"discriminator.shared_noise: method={name} draws levels separately; expected false")
        if generator.weighting == "normalised" or generator.gan_weight:
            raise ValueError(
                f"generator: method={name} evaluates no teacher, which weighting=normalised needs, and has no GAN "
                "term; expected weighting=vsd or uniform, and gan_weight=0"
            )
        if not discriminator.gan_weight:
            raise ValueError(
                f"discriminator.gan_weight: got 0, but method={name} trains nothing but its classifier; "
                "expected discriminator.gan_weight > 0"
            )
    if generator.gan_weight > 0 and not discriminator.gan_weight:
        raise ValueError(
            f"generator.gan_weight: got {generator.gan_weight}, but discriminator.gan_weight=0 leaves the "
            "discriminator untrained; expected discriminator.gan_weight > 0, or generator.gan_weight=0 as well"
        )
    if discriminator.gan_weight and data is None:
        raise ValueError(
            f"data: got null, but method={name} shows real images to a discriminator; expected a data set, or "
            "teacher-samples"
        )


def check_scores(name: str, condition_dropout: float, fake_score: FakeScoreConfig) -> None:
    """Checks that a method without score networks has no condition dropout and no guidance of the fake score."""
    method = METHODS[name]
    if condition_dropout and (method.critic is None or not method.scores):
        raise ValueError(
            f"condition_dropout: got {condition_dropout}, but method={name} trains no fake score; expected 0"
        )
    if fake_score.alignment and (method.critic is None or not method.scores):
        raise ValueError(
            f"fake_score.alignment: got {fake_score.alignment}, but method={name} trains no fake score; expected 0"
        )
    if not method.scores and {fake_score.guidance_scale, fake_score.training_guidance_scale} != {1.0}:
        raise ValueError(f"fake_score.guidance_scale: method={name} evaluates no fake score; expected 1")


def check_reuse(name: str, reuse_samples: bool) -> None:
    """Checks that a method without a critic has no samples to use again."""
    if reuse_samples and METHODS[name].critic is None:
        raise ValueError(f"reuse_samples: got true, but method={name} trains no critic; expected false")


def check_rates(iterations: int, roles: Mapping[str, OptimizerConfig]) -> None:
    """Checks that a learning rate which falls has iterations left to fall in after its warm-up."""
    for role, section in roles.items():
        if section.needs_the_end and section.lr_warmup >= iterations:
            raise ValueError(
                f"{role}.lr_warmup: got {section.lr_warmup} of {iterations} iterations, which leaves none for "
                f"{role}.lr_schedule={section.lr_schedule}; expected fewer, or lr_schedule=constant"
            )


def check_keep_best(log: LogConfig, evaluated: EvalConfig) -> None:
    """Raises ValueError if the best checkpoint is to be kept and no scores say which one that is."""
    if log.keep_best and not evaluated.every:
        raise ValueError("log.keep_best: got true, but eval.every is 0, so that no scores say which is best; set both")


def check_precision(precision: str, frozen_precision: str) -> None:
    """Checks that networks whose weights have less precision than float32 compute in bfloat16."""
    if frozen_precision != "fp32" and precision != "bf16":
        raise ValueError(
            f"frozen_precision: got {frozen_precision}, but precision={precision}; expected precision=bf16 as well, or "
            "frozen_precision=fp32"
        )


def check_parallel(parallel: str, frozen_precision: str, roles: Mapping[str, OptimizerConfig]) -> None:
    """Checks that nothing which stays whole on every process would have to be split between them."""
    if parallel == "ddp":
        return
    if frozen_precision not in ("fp32", "bf16"):
        raise ValueError(
            f"frozen_precision: got {frozen_precision}, but parallel={parallel} splits weights between processes, and "
            "those in few bits stay whole; expected parallel=ddp, or frozen_precision=bf16"
        )
    for role, section in roles.items():
        if section.optimizer != "adamw":
            raise ValueError(
                f"{role}.optimizer: got {section.optimizer}, but parallel={parallel} splits moments between processes, "
                f"and those in 8 bits stay whole; expected parallel=ddp, or {role}.optimizer=adamw"
            )


def check_student(name: str, student: StudentConfig, regression: RegressionConfig, snapshot_every: int) -> None:
    """Checks the settings of the student's network and the extra terms of its loss."""
    if student.lora_rank and (student.checkpoint or student.network):
        raise ValueError(
            f"student.lora_rank: got {student.lora_rank}, but adapters are added to the teacher's own weights; "
            "expected 0, or neither student.checkpoint nor student.network"
        )
    if student.lora_rank and snapshot_every:
        raise ValueError(
            "ema.snapshot_every: snapshots store whole networks, not adapters; expected 0 with student.lora_rank"
        )
    kind = STUDENT_KINDS[student.generator]
    if student.noise_kl_weight and not kind.predicts_noise:
        raise ValueError(
            f"student.noise_kl_weight: got {student.noise_kl_weight}, but generator={student.generator} predicts no "
            f"noise while sampling; expected 0, or generator={' or '.join(kinds_with('predicts_noise'))}"
        )
    if student.noise_kl_weight and not METHODS[name].extra_terms:
        raise ValueError(
            f"student.noise_kl_weight: got {student.noise_kl_weight}, but method={name} does not add this term; "
            "expected 0, or method=f-distill"
        )
    if regression.weight and not kind.pairs:
        raise ValueError(
            f"regression.weight: teacher pairs are of the whole network; expected 0 with generator={student.generator}"
        )


def check_shapes(buckets: int, data: str | None, prompts: str | None) -> None:
    """Checks that a run whose batches have several shapes has prompts, and no data that have shapes of their own."""
    if buckets and (data is not None or prompts is None):
        given = f"data={data}" if data is not None else "prompts is null"
        raise ValueError(
            f"buckets: got {buckets}, but {given}, and shapes are chosen for runs from prompts alone; expected 0, or "
            "data=null with prompts; images are sorted by fdistill cache with --buckets"
        )


def _of_steps(student: StudentConfig) -> list[tuple[str, Any, Any]]:
    """(setting, value, value that leaves it out), of the settings that only students of several steps read."""
    return [
        ("sampler", student.sampler, "stochastic"),
        ("simulated", student.simulated, 1.0),
        ("any_step", student.any_step, False),
    ]


def check_steps(level: float | Sequence[float] | None, student: StudentConfig, *, data: bool) -> None:
    """Checks how many steps the student takes, and the settings of students of several steps.

    Args:
        data: whether the run reads images.
    """
    if not STUDENT_KINDS[student.generator].steps:
        for setting, value, unset in (
            ("steps", student.steps, None),
            ("shift", student.shift, None),
            *_of_steps(student),
        ):
            if value != unset:
                raise ValueError(
                    f"student.{setting}: got {value}, but generator={student.generator} takes one step; expected "
                    f"{'null' if unset is None else unset}"
                )
        return
    levels = list(level) if isinstance(level, Sequence) else [0.0 if level is None else level]
    if not 1 <= len(levels) <= MAX_STUDENT_STEPS or not fall(levels):
        raise ValueError(
            f"student_level: got {levels}; expected 1 to {MAX_STUDENT_STEPS} falling levels, as in [80.0, 2.5]"
        )
    if student.steps is not None and len(levels) > 1:
        raise ValueError(
            f"student.steps: got {student.steps}, but student_level lists {len(levels)} levels; expected null, or one "
            "student_level to begin with"
        )
    if student.shift is not None and student.steps is None:
        raise ValueError(f"student.shift: got {student.shift:g}, but student.steps is null, whose levels it shifts")
    steps = student.steps or len(levels)
    if steps == 1:
        for setting, value, unset in _of_steps(student):
            if value != unset:
                raise ValueError(
                    f"student.{setting}: got {value}, but the student takes one step; expected {unset}, or "
                    "student.steps above 1"
                )
    if student.simulated < 1 and not data:
        raise ValueError(
            f"student.simulated: got {student.simulated:g}, but data is null, and steps would begin with noised data; "
            "expected 1, or a data set"
        )
