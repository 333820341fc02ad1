"""The published runs that docs/stages.md writes as stages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fdistill.config.reading import load_config

PAGE = (Path(__file__).parent.parent.parent / "docs" / "stages.md").read_text()
RUNS = re.findall(r"```yaml\n(method: dmd2\nteacher.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    ("run", "updates", "rates", "gan_weight"),
    [(0, (410_000, 140_000), (2e-6, 5e-7), 3e-3), (1, (39_000, 2_000), (1e-5, 5e-7), 1e-3)],
)
def test_dmd2s_runs_are_as_the_text_says(
    run: int, updates: tuple[int, int], rates: tuple[float, float], gan_weight: float, tmp_path: Path
) -> None:
    assert len(RUNS) == 2
    (tmp_path / "run.yaml").write_text(RUNS[run])
    config = load_config(str(tmp_path / "run.yaml"))
    stages = config.stage_configs()
    assert tuple(stage.iterations * stage.critic_steps for stage in stages) == updates
    assert all(f"{count:,}" in PAGE for count in updates)
    for stage, rate in zip(stages, rates, strict=True):
        assert {section.lr for section in stage.roles.values()} == {rate}
    assert [stage.generator.gan_weight for stage in stages] == [0, gan_weight]
    assert [stage.discriminator.gan_weight for stage in stages] == [0, 1e-2]
    assert config.batch_size == (280, 2048)[run]
    assert (config.student_level, config.guidance_scale) == ((80, 1), (999, 1.75))[run]
    for section in config.roles.values():
        assert (section.beta1, section.beta2, section.weight_decay) == (0.9, 0.999, 0.01)
        assert section.lr_warmup * config.critic_steps == 500
    assert (config.matching_levels.low, config.matching_levels.high) == (0.02, 0.98)
    assert (config.critic_levels.low, config.critic_levels.high) == (0, 1)
    samplers = {config.matching_levels.sampler, config.critic_levels.sampler}
    assert samplers == {("karras", "uniform")[run]}
