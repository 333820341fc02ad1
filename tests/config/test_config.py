from __future__ import annotations

from pathlib import Path

import pytest

from fdistill.base.errors import ConfigError
from fdistill.config.reading import changed_keys, config_path, dump_config, load_config


def test_numbers_are_numbers() -> None:
    config = load_config(
        "digits",
        [
            "generator.lr=1e-5",
            "fake_score.lr=2.5E-4",
            "ema={decays: [0.9, 0.98], export: 0.9}",
            "student_level=80",
            "seed=3",
        ],
    )
    assert config.generator.lr == 1e-5
    assert config.fake_score.lr == 2.5e-4
    assert config.ema.decays == [0.9, 0.98]
    assert config.student_level == 80.0
    assert config.seed == 3


def test_null_is_none_and_no_is_a_word() -> None:
    assert load_config("digits", ["student_level=null"]).student_level is None
    with pytest.raises(ConfigError, match="got 'no'"):
        load_config("digits", ["log.tracker=no"])


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("iterations: 7\ngenerator:\n  lr: 1e-6\n")
    config = load_config(str(path), {"generator.beta1": 0.5, "ratio": {"upper": 30}})
    assert (config.iterations, config.generator.lr, config.generator.beta1, config.ratio.upper) == (7, 1e-6, 0.5, 30.0)
    assert config.teacher == "digits"


def test_a_section_given_as_a_mapping_changes_what_it_names_alone() -> None:
    config = load_config("digits", ["generator={gan_weight: 2e-3}"])
    assert config.generator.gan_weight == 2e-3
    assert config.generator.lr == load_config("digits").generator.lr == 4e-4
    assert load_config("digits", {"teacher": Path("some") / "folder"}).teacher == "some/folder"


def test_a_gan_weight_that_is_given_is_not_balanced(tmp_path: Path) -> None:
    def settings(*given: str, name: str = "digits") -> tuple[float, float]:
        generator = load_config(name, list(given)).generator
        return generator.gan_weight, generator.gan_gradient_ratio

    assert settings() == (1e-3, 0.3)
    assert settings("generator.gan_weight=0.001") == (1e-3, 0)
    assert settings("generator.gan_weight=0", "discriminator.gan_weight=0", "divergence=reverse-kl") == (0, 0)
    assert settings("method=dmd2") == (1e-3, 0)  # as published
    assert settings(name="sd15") == (1e-3, 0)
    file = tmp_path / "mine.yaml"
    file.write_text("generator: {gan_gradient_ratio: 1.0}")
    assert settings(name=str(file)) == (1e-3, 1.0)
    with pytest.raises(ConfigError, match=r"gan_weight: got 0\.1, but generator\.gan_gradient_ratio=1\.0"):
        settings("generator.gan_weight=0.1", name=str(file))
    with pytest.raises(
        ConfigError, match=r"gan_gradient_ratio: got 1\.0, but method=f-distill with generator\.gan_weight=0"
    ):
        settings("generator.gan_weight=0", name=str(file))
    without = load_config("digits", {"stages": [{"iterations": 1, "method": "diff-instruct"}, {"iterations": 1}]})
    assert [stage.generator.gan_gradient_ratio for stage in without.stage_configs()] == [0, 0.3]
    staged = load_config("digits", {"stages": [{"iterations": 1}, {"iterations": 1, "generator.gan_weight": 0.1}]})
    assert [stage.generator.gan_gradient_ratio for stage in staged.stage_configs()] == [0.3, 0]


def test_every_config_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    for path in sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml")):
        config = load_config(str(path))
        copy = tmp_path / path.name
        copy.write_text(dump_config(config))
        assert load_config(str(copy)) == config
        assert path.read_text().startswith("# "), f"{path} must say what it reaches, on what hardware, in how long"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("divergense=js", "divergense: no such setting; did you mean 'divergence'"),
        ("generator.learning_rate=1", r"generator\.learning_rate: no such setting"),
        ("generator.lrr=1", "did you mean 'lr'"),
        ("generator.lr=-1", r"generator\.lr: got -1; expected more than 0"),
        ("generator.lr=.inf", r"generator\.lr"),
        ("generator.lr=fast", "got 'fast'"),
        ("iterations=0", "expected at least 1"),
        ("batch_size=1.5", "expected a whole number"),
        ("iterations=true", "iterations: got True"),
        ("generator.lr=true", "generator.lr: got True"),
        ("matching_levels.mean=.nan", "finite"),
        ("precision=fp8", "precision: got 'fp8'"),
        ("log.tracker=tensorbord", "did you mean 'tensorboard'"),
        ("discriminator.source=faek", "did you mean 'fake'"),
        ("ema.export=0.5", "expected one of decays"),
        ("matching_levels.low=0.99", "expected low < high"),
        ("generator=3", "generator: got 3"),
        ("iterations.x=3", "'iterations' is not a section"),
        ("iterations", "expected key=value"),
        ("iterations=[", "not YAML"),
    ],
)
def test_bad_settings_say_what_where_and_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", [override])


@pytest.mark.parametrize("override", ["ratio.upper=30000", "ratio.lower=1e-5"])
def test_bounds_that_clamped_logits_never_reach_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        load_config("digits", [override])
    assert load_config("digits", ["ratio.lower=5e-5", "ratio.upper=22026"]).ratio.upper == 22026


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("digits", ["divergense=js", "iterations=0"])
    assert "divergense" in str(caught.value)
    assert "iterations" in str(caught.value)


def test_unknown_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        config_path("digit")
    bad = tmp_path / "list.yaml"
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(str(bad))


def test_what_may_change_on_resume() -> None:
    old = load_config("digits")
    assert changed_keys(old, load_config("digits", ["iterations=9", "log.every=1", "device=cpu"])) == []
    assert changed_keys(old, load_config("digits", ["generator.lr=1e-5", "fake_score.grad_clip=1"])) == []
    assert changed_keys(old, load_config("digits", ["generator.beta1=0.5"])) == ["generator.beta1: 0.0 -> 0.5"]
    stages = "stages=[{iterations: 3, generator.lr: LR}, {iterations: COUNT}]"
    staged = [
        load_config("digits", [stages.replace("LR", lr).replace("COUNT", count)])
        for lr, count in (("1e-5", "5"), ("1e-6", "5"), ("1e-5", "6"))
    ]
    assert changed_keys(staged[0], staged[1]) == []
    assert changed_keys(staged[0], staged[2]) == ["stage 2.iterations: 5 -> 6"]
