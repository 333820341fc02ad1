"""Configs that a slip of the pen or bad will made slow, large or strange: each is refused at once, in a sentence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fdistill.base.errors import ConfigError
from fdistill.config.plain_yaml import MAX_CHARACTERS, parse_yaml
from fdistill.config.reading import dump_config, load_config, load_smoke

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations=!!int foo", "has the tag 'tag:yaml.org,2002:int'"),
        ("generator.lr=!!float abc", "has the tag"),
        ("data=!!python/object/apply:os.system [ls]", "has the tag"),
        ("iterations=" + "9" * 5000, "not YAML"),
        ("student.network=" + "[" * 2000, "levels"),
        ("student.network=" + "{a: " * 2000, "levels"),
        ("data=" + "x" * (MAX_CHARACTERS + 1), "characters"),
        (".".join(["a"] * 5000) + "=1", "no such setting"),
        ("stages=[{iterations: 2, " + ".".join(["a"] * 400) + ": 1}]", "no such setting"),
        ("ratio.num_bins=1000000000000", "ratio.num_bins: got 1000000000000; expected at most"),
        ("student.lora_rank=1000000000000", "student.lora_rank: got"),
        ("fake_score.lora_rank=1000000000000", "fake_score.lora_rank: got"),
        ("batch_size=1000000000000", "batch_size: got"),
        ("generator.micro_batch=1000000000000", "generator.micro_batch: got"),
        ("eval.batch_size=1000000000000", "eval.batch_size: got"),
        ("iterations=1000000000000", "iterations: got"),
        ("resolution=1000000000", "resolution: got"),
        ("critic_steps=1000000000", "critic_steps: got"),
        ("images.workers=1000000", "images.workers: got"),
        ("matching_levels.std=1e300", "matching_levels.std: got"),
        ("critic_levels.rho=1e300", "critic_levels.rho: got"),
        ("critic_levels.mean=-1e300", "critic_levels.mean: got"),
        ("generator.lr=1e300", "generator.lr: got"),
        ("student_level=1e300", "student_level: got"),
        ("teacher_lora_scale=1e300", "teacher_lora_scale: got"),
        ("stages=[{iterations: 1000000000000}]", "stage 1: iterations: got"),
        ("ema.decays=[0.98, 0.98]", "ema.decays: has 0.98 twice"),
        ("ema.sigma_rel=[0.1, 0.05, 0.10]", "ema.sigma_rel: has 0.1 twice"),
        ("discriminator.features=[mid, mid]", "discriminator.features: has 'mid' twice"),
        ("eval.metrics=[fid, fid]", "eval.metrics: has 'fid' twice"),
        ("student.network={layers_per_block: 1000000}", "layers_per_block: got 1000000; expected at most 1,000"),
        ("student.network={transformer_layers_per_block: [1, [1000000]]}", "transformer_layers_per_block: got 1000000"),
        ("student.network={block_out_channels: [1000000000000]}", "block_out_channels: got 1000000000000"),
        ("student.network={sample_size: .inf}", "sample_size: got inf"),
        ("{1: 2}=3", "no such setting"),
        ("=", "expected key=value"),
        ("data=[*a]", "not YAML"),
        ("data=a\nb: c", "not YAML"),
        ("data=%", "not YAML"),
        ("data=\x00", "not YAML"),
    ],
)
def test_overrides(override: str, message: str) -> None:
    before = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert time.perf_counter() - before < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "an alias inside an anchored value"),
        ("a: &a {x: 1}\nb: &b {<<: [*a, *a]}\n", "an alias inside an anchored value"),
        ("a: &a [*a]\n", "an alias inside an anchored value"),
        ("a: &a x\nb: [" + "*a, " * 200 + "]\n", "aliases"),
        ("a: [" + "x, " * 20_000 + "]\n", "values"),
        ("x" * (MAX_CHARACTERS + 1), "characters"),
        ("0\n", "expected a mapping of settings, got int"),
        ("false\n", "expected a mapping of settings, got bool"),
        ("[]\n", "expected a mapping of settings, got list"),
        ("''\n", "expected a mapping of settings, got str"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("? [a, b]\n: 1\n", "config: "),
        ("1: 2\n", "config: "),
        ("a: 1\na: 2\n", "not YAML"),
        ("\x07", "not YAML"),
    ],
)
def test_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    before = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert time.perf_counter() - before < 5


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"iterations: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_config(tmp_path / "own.yaml")


def test_what_a_smoke_section_may_ask_for(tmp_path: Path) -> None:
    for line, message in (
        ("network: {_class_name: UNet2DModel, layers_per_block: 1000000}", "layers_per_block: got 1000000"),
        ("images: 1000000000", "images: got 1000000000"),
    ):
        (tmp_path / "own.yaml").write_text(f"smoke:\n  {line}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_smoke(tmp_path / "own.yaml")


def test_dates_are_words_and_empty_files_are_empty(tmp_path: Path) -> None:
    assert load_config("digits", ["data=2001-99-99"]).data == "2001-99-99"
    config = load_config("digits", ["data=2001-12-14", "teacher=2001-12-14t21:59:43.10-05:00"])
    assert (config.data, config.teacher) == ("2001-12-14", "2001-12-14t21:59:43.10-05:00")
    (tmp_path / "own.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "own.yaml") == config
    (tmp_path / "own.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert load_config(tmp_path / "own.yaml") == load_config(None)


def test_anchors_of_plain_values_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "generator: &slow {lr: 1e-6, beta1: 0.5}\nfake_score: *slow\ndiscriminator: {<<: *slow, lr: 2e-6}\n"
    )
    config = load_config(path)
    assert config.fake_score.lr == 1e-6
    assert (config.discriminator.lr, config.discriminator.beta1) == (2e-6, 0.5)
    assert parse_yaml("a: &a x\nb: *a", "test") == {"a": "x", "b": "x"}


def test_a_path_names_a_config_as_a_text_does() -> None:
    assert load_config(Path("digits")) == load_config("digits")
