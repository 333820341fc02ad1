"""What messages about settings advise is tried: the settings are taken once the advice is followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config

#: In place of a value: the setting is left out.
LEFT_OUT = object()
Settings = dict[str, Any]

PHASED: Settings = {"student.steps": 4, "student.phases": 2, "student.lora_rank": 8}

#: (settings, words of what is said to them, changes of the settings that these words advise)
ADVICE: list[tuple[Settings, str, list[Settings]]] = [
    (
        {"method": "sim", "generator.weighting": "vsd"},
        "it is for",
        [{"generator.weighting": LEFT_OUT}, {"method": "f-distill"}, {"method": "diff-instruct"}],
    ),
    (
        {"regression.weight": 0.1},
        "does not read; it is for dmd, regression",
        [{"regression.weight": 0}, {"method": "dmd"}, {"method": "regression"}],
    ),
    (
        {"objective.alpha": 1.0},
        "does not read; it is for sid, sida",
        [{"objective.alpha": LEFT_OUT}, {"method": "sid"}, {"method": "sida"}],
    ),
    ({"log.keep_best": True}, "so that no scores say which is best; set both", [{"eval.every": 10}]),
    ({"objective.alhpa": 1.0}, "did you mean 'alpha'", [{"objective.alhpa": LEFT_OUT}]),
    ({"method": "dmd", "regression.weight": 0}, "a number above 0", [{"regression.weight": 0.1}]),
    ({"method": "dmd", "regression.pairs": 0}, "a number above 0", [{"regression.pairs": 1}]),
    (
        {"method": "sid", "divergence": "js"},
        "expected null, or method=",
        [{"divergence": None}, {"method": "f-distill"}],
    ),
    (
        {"generator.gan_gradient_ratio": 1.0, "generator.gan_weight": 0.1},
        "expected one of them",
        [{"generator.gan_gradient_ratio": 0}, {"generator.gan_weight": LEFT_OUT}],
    ),
    (
        {"method": "sida", "generator.gan_gradient_ratio": 1.0},
        "has no GAN term beside matching; expected 0",
        [{"generator.gan_gradient_ratio": 0}, {"method": "f-distill"}],
    ),
    (
        {"discriminator.r1": "approximate"},
        "expected discriminator.r1=approximate with discriminator.r1_weight above 0",
        [{"discriminator.r1_weight": 100}],
    ),
    (
        {"discriminator.r1_sigma": 0.2},
        "expected discriminator.r1=approximate with discriminator.r1_weight above 0",
        [{"discriminator.r1": "approximate", "discriminator.r1_weight": 100}],
    ),
    (
        {"method": "sida", "discriminator.source": "teacher"},
        "no weights to train; expected fake",
        [{"discriminator.source": "fake"}],
    ),
    *(
        (
            {"method": without, "generator.gan_weight": 0.1},
            f"has no discriminator; expected 0, or method={instead}",
            [{"generator.gan_weight": 0}, {"method": instead}],
        )
        for without, instead in (("dmd", "dmd2"), ("sid", "sida"), ("vsd", "f-distill"), ("regression", "f-distill"))
    ),
    (
        {"method": "diff-instruct", "discriminator.gan_weight": 0.1},
        "has no discriminator; expected 0, or method=f-distill",
        [{"discriminator.gan_weight": 0}, {"method": "f-distill"}],
    ),
    *(
        (
            {"method": "diff-instruct", f"discriminator.{key}": value},
            "leave it out, or choose a method that has one: f-distill, dmd2",
            [{f"discriminator.{key}": LEFT_OUT}, {"method": "f-distill"}, {"method": "dmd2"}],
        )
        for key, value in (("source", "teacher"), ("head", "pooled"), ("shared_noise", True), ("r1_weight", 1.0))
    ),
    (
        {"method": "diffratio", "discriminator.source": "teacher"},
        "trains the network its heads read; expected fake",
        [{"discriminator.source": "fake"}],
    ),
    (
        {"method": "diffratio", "discriminator.shared_noise": True},
        "draws levels separately; expected false",
        [{"discriminator.shared_noise": False}],
    ),
    *(
        (
            {"method": "diffratio", **wrong},
            "expected weighting=vsd or uniform, and gan_weight=0",
            [{"generator.weighting": kind, "generator.gan_weight": 0} for kind in ("vsd", "uniform")],
        )
        for wrong in ({"generator.weighting": "normalised"}, {"generator.gan_weight": 0.1})
    ),
    *(
        (
            {"generator.normaliser_floor": 0.1, **wrong},
            "does not read; expected 1e-06",
            [{"generator.normaliser_floor": 1e-6}, {"generator.normaliser_floor": LEFT_OUT}],
        )
        for wrong in ({"method": "sid"}, {"generator.weighting": "uniform"})
    ),
    (
        {"method": "diffratio", "discriminator.gan_weight": 0},
        "expected discriminator.gan_weight > 0",
        [{"discriminator.gan_weight": 0.1}],
    ),
    (
        {"discriminator.gan_weight": 0},
        "expected discriminator.gan_weight > 0, or generator.gan_weight=0 as well",
        [{"discriminator.gan_weight": 0.1}, {"generator.gan_weight": 0}],
    ),
    ({"data": None}, "expected a data set, or teacher-samples", [{"data": "digits"}, {"data": "teacher-samples"}]),
    ({"method": "diffratio", "condition_dropout": 0.1}, "expected 0", [{"condition_dropout": 0}]),
    ({"method": "diffratio", "fake_score.guidance_scale": 2.0}, "expected 1", [{"fake_score.guidance_scale": 1}]),
    (
        {"generator.lr_schedule": "cosine", "generator.lr_warmup": 400, "iterations": 400},
        "expected fewer, or lr_schedule=constant",
        [{"generator.lr_warmup": 399}, {"generator.lr_schedule": "constant"}],
    ),
    (
        {"frozen_precision": "bf16"},
        "expected precision=bf16 as well, or frozen_precision=fp32",
        [{"precision": "bf16"}, {"frozen_precision": "fp32"}],
    ),
    (
        {"precision": "bf16", "frozen_precision": "nf4", "parallel": "fsdp"},
        "those in few bits stay whole; expected parallel=ddp, or frozen_precision=bf16",
        [{"parallel": "ddp"}, {"frozen_precision": "bf16"}],
    ),
    (
        {"fake_score.optimizer": "adamw-8bit", "parallel": "hybrid"},
        "those in 8 bits stay whole; expected parallel=ddp, or fake_score.optimizer=adamw",
        [{"parallel": "ddp"}, {"fake_score.optimizer": "adamw"}],
    ),
    (
        {"student.lora_rank": 4, "student.network": {"layers_per_block": 1}},
        "expected 0, or neither student.checkpoint nor student.network",
        [{"student.lora_rank": 0}, {"student.network": LEFT_OUT}],
    ),
    (
        {"student.lora_rank": 4, "ema.sigma_rel": [0.1], "ema.snapshot_every": 5},
        "expected 0 with student.lora_rank",
        [{"ema.snapshot_every": 0}, {"student.lora_rank": 0}],
    ),
    (
        {"student.noise_kl_weight": 0.1},
        "expected 0, or generator=tiue",
        [{"student.noise_kl_weight": 0}, {"student.generator": "tiue"}],
    ),
    (
        {"method": "sid", "student.generator": "tiue", "student.noise_kl_weight": 0.1},
        "expected 0, or method=f-distill",
        [{"student.noise_kl_weight": 0}, {"method": "f-distill"}],
    ),
    (
        {"method": "sid", "clip_loss": {"weight": 0.1, "weights": "a.safetensors"}},
        "expected 0, or method=f-distill",
        [{"clip_loss.weight": 0}, {"method": "f-distill"}],
    ),
    (
        {"clip_loss.weight": 0.1},
        "expected 0, or the file of the weights of clip_loss.model=ViT-B-32",
        [{"clip_loss.weight": 0}, {"clip_loss.weights": "a.safetensors"}],
    ),
    (
        {"method": "sid", "reward": {"gradient_ratio": 0.1, "weights": "a.pt"}},
        "expected 0, or method=f-distill",
        [{"reward.gradient_ratio": 0}, {"method": "f-distill"}],
    ),
    (
        {"reward.weight": 0.1},
        "expected 0, or the file of the weights of reward.model=hps21",
        [{"reward.weight": 0}, {"reward.weights": "a.pt"}],
    ),
    (
        {"clip_loss": {"weight": 0.1, "gradient_ratio": 0.2, "weights": "a.safetensors"}},
        "expected one of them: set clip_loss.weight=0 or clip_loss.gradient_ratio=0",
        [{"clip_loss.weight": 0}, {"clip_loss.gradient_ratio": 0}],
    ),
    (
        {"reward": {"weight": 0.1, "gradient_ratio": 0.2, "weights": "a.pt"}},
        "expected one of them: set reward.weight=0 or reward.gradient_ratio=0",
        [{"reward.weight": 0}, {"reward.gradient_ratio": 0}],
    ),
    (
        {"method": "regression", "student.generator": "tiue"},
        "teacher pairs are of the whole network",
        [{"student.generator": "denoiser"}],
    ),
    (
        {"student_level": [1.0, 2.0]},
        "expected 1 to 8 falling levels, as in [80.0, 2.5]",
        [{"student_level": levels} for levels in ([80.0, 2.5], [3.0], [4.0, 3.0, 2.0])],
    ),
    (
        {"student.any_step": True},
        "expected False, or student.steps above 1",
        [{"student.steps": 2}, {"student.steps": 8}, {"student.any_step": False}],
    ),
    (
        {"method": "decoupled-dmd"},
        "expected a guidance_scale above 1, or augmentation.weight=0",
        [{"guidance_scale": 2.0}, {"augmentation.weight": 0.0}],
    ),
    (
        {"method": "decoupled-dmd", "guidance_scale": 2.0, "guidance_rescale": 0.5},
        "expected 0, or augmentation.weight=0",
        [{"guidance_rescale": 0.0}, {"augmentation.weight": 0.0}],
    ),
    (
        {"student.steps": 4, "diversity.weight": 0.05, "student.any_step": True},
        "updates take all steps, from noise; expected False, or diversity.weight=0",
        [{"student.any_step": False}, {"diversity.weight": 0.0}],
    ),
    (
        {"student.steps": 4, "diversity.weight": 0.05, "segment.weight": 0.5},
        "take all steps, not one; expected 0, or diversity.weight=0",
        [{"segment.weight": 0.0}, {"diversity.weight": 0.0}],
    ),
    (
        {"segment.weight": 0.5},
        "but the student takes one step; expected 0, or student.steps above 1",
        [{"segment.weight": 0.0}, {"student.steps": 2}],
    ),
    (
        {"student.previous_phase": "runs/phase-1"},
        "expected null, or the number of phases of that run",
        [{"student.previous_phase": None}, {**PHASED, "student.previous_phase": "runs/phase-1"}],
    ),
    (
        {**PHASED, "student.phases": 5},
        "but the student takes 4 steps; expected at most 4",
        [{"student.phases": 4}, {"student.steps": 5}],
    ),
    (
        {**PHASED, "student.lora_rank": 0},
        "expected a rank, such as student.lora_rank=32",
        [{"student.lora_rank": 32}, {"student.phases": 1}],
    ),
    (
        {**PHASED, "student.any_step": True},
        "expected False, or student.phases=1",
        [{"student.any_step": False}, {"student.phases": 1}],
    ),
    ({"student_level": -1}, "expected a level above 0", [{"student_level": value} for value in (1.0, [2.0], None)]),
    (
        {"matching_levels.low": 0.9, "matching_levels.high": 0.5},
        "expected low < high",
        [{"matching_levels.low": 0.4}],
    ),
    (
        {"ema.export": 0.5, "ema.sigma_rel": [0.05]},
        "expected one of decays [0.98] or sigma_rel=0.05",
        [{"ema.export": 0.98}, {"ema.export": "sigma_rel=0.05"}],
    ),
    (
        {"ema.snapshot_every": 5},
        "expected widths such as [0.05, 0.1], or snapshot_every=0",
        [{"ema.sigma_rel": [0.05, 0.1]}, {"ema.snapshot_every": 0}],
    ),
    ({"ema.decays": [0.98, 0.98]}, "expected each once", [{"ema.decays": [0.98]}]),
    ({"method": "fdistill"}, "did you mean 'f-distill'", [{"method": "f-distill"}]),
    ({"generator.lrr": 1e-4}, "did you mean 'lr'", [{"generator.lrr": LEFT_OUT, "generator.lr": 1e-4}]),
    ({"log.tracker": "tensorbord"}, "did you mean 'tensorboard'", [{"log.tracker": "tensorboard"}]),
    (
        {"stages": [{"iterations": 3}, {"iterations": 2}], "iterations": 6},
        "leave it out, or give their sum",
        [{"iterations": LEFT_OUT}, {"iterations": 5}],
    ),
    (
        {"stages": "many"},
        "expected a list such as [{iterations: 100}, {iterations: 50}]",
        [{"stages": [{"iterations": 100}, {"iterations": 50}]}],
    ),
    ({"stages": [{"iterations": 0}]}, "expected how many it has, at least 1", [{"stages": [{"iterations": 1}]}]),
    (
        {"stages": [{"iterations": 2, "batch_size": 4}]},
        "set it for the run and leave it out here",
        [{"stages": [{"iterations": 2}], "batch_size": 4}],
    ),
    (
        {"method": "diff-instruct", "stages": [{"iterations": 2}, {"iterations": 2, "method": "vsd"}]},
        "set fake_score.lora_rank for the run, or name in this stage the losses that change",
        [
            {"fake_score.lora_rank": 64},
            {"stages": [{"iterations": 2}, {"iterations": 2, "generator.weighting": "vsd"}]},
        ],
    ),
    (
        {"stages": [{"iterations": 2}, {"iterations": 2, "method": "diffratio"}]},
        "expected methods that all have a score network, or the same method in all stages",
        [
            {"stages": [{"iterations": 2}, {"iterations": 2, "method": "diff-instruct"}]},
            {"stages": [{"iterations": 2}, {"iterations": 2}]},
        ],
    ),
]


@pytest.mark.parametrize(("wrong", "words", "advised"), ADVICE, ids=[words for _, words, _ in ADVICE])
def test_settings_are_taken_once_advice_is_followed(wrong: Settings, words: str, advised: list[Settings]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, wrong)
    assert words in str(caught.value)
    for changes in advised:
        mended = {key: value for key, value in {**wrong, **changes}.items() if value is not LEFT_OUT}
        load_config(None, mended)


def test_a_config_for_another_method() -> None:
    with pytest.raises(ConfigError, match="choose a config for 'dmd', or one that names no method, such as digits"):
        load_config("digits-sid", {"method": "dmd"})
    assert load_config("digits-dmd").method == load_config("digits", {"method": "dmd"}).method == "dmd"


def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_config("digit")
    load_config("digits")


def test_texts_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected key=value, as in divergence=forward-kl or generator\.lr=1e-5"):
        load_config("digits", ["divergence"])
    load_config("digits", ["divergence=forward-kl", "generator.lr=1e-5"])
