"""What a run would do, without doing it: `fdistill distill --dry-run`."""

from __future__ import annotations

from fdistill.base.devices import start
from fdistill.config.reading import dump_config
from fdistill.config.schema import DistillConfig
from fdistill.methods import METHODS
from fdistill.students.lora import has_adapters
from fdistill.training.build import Distillation, build
from fdistill.training.inputs import TrainingData, stored_data
from fdistill.training.loop import open_watch


def describe(config: DistillConfig) -> str:
    """What a run would do: the text of `--dry-run`. Loads the teacher and builds all networks, writes nothing."""
    state, device = start(config.device)
    run = build(config, device)
    data = stored_data(config, run)  # refuses what does not fit
    if data is not None:
        one = config.model_copy(update={"batch_size": 1})
        with TrainingData(data, None).loader(one, run.networks.teacher, 0) as loader:
            next(loader)  # and what cannot be decoded to the teacher's samples
    watch = open_watch(config, run, device)
    millions = {
        name: sum(p.numel() for p in run.role(name).parameters() if p.requires_grad) / 1e6 for name in run.optimizers
    }
    discriminator = "none"
    if run.networks.discriminator is not None:
        on = f"{config.discriminator.source} features {', '.join(config.discriminator.features)}"
        discriminator = f"{config.discriminator.head} heads on {on}"
    lines = [
        f"method         {config.method}: {METHODS[config.method].summary}",
        f"teacher        {config.teacher} ({type(run.networks.fake_score).__name__}), "
        f"samples {run.networks.teacher.sample_shape}, {run.networks.teacher.num_classes or 'no'} classes",
        f"guidance       {config.guidance_scale:g}",
        *([] if run.text is None else [_prompts(run, config)]),
        f"student        {run.student.describe()}{_start(run, config)}",
        f"divergence     {(config.divergence and run.divergence.name) or 'the method has its own'}",
        f"discriminator  {discriminator}",
        "trained        " + ", ".join(f"{name} {count:.2f} M" for name, count in millions.items()),
        f"iterations     {config.iterations}, each {config.critic_steps} critic updates and then 1 student update "
        f"of {config.batch_size} samples",
        *([] if watch is None else [f"evaluated      every {config.eval.every} and at last, {watch.describe()}"]),
        f"device         {device}, {config.precision}, {state.num_processes} process(es)",
    ]
    return dump_config(config) + "\n" + "\n".join(lines)


def _prompts(run: Distillation, config: DistillConfig) -> str:
    assert run.text is not None
    prompts = run.text.embeddings.prompts
    negative = f", away from {config.negative_prompt!r}" if config.negative_prompt else ""
    return f"text           {len(prompts)} prompts, such as {prompts[0]!r}{negative}; images of {run.image_size} pixels"


def _start(run: Distillation, config: DistillConfig) -> str:
    origin = "" if run.origin is run.checkpoint else f", from {run.origin.name}"
    if has_adapters(run.student):
        origin += f", adapters of rank {config.student.lora_rank} on the teacher's weights"
    if run.resized is None:
        return origin
    copied, new = run.resized.copied, run.resized.new
    return f"{origin}, {len(copied)} of {len(copied) + len(new)} tensors copied (new: {', '.join(new) or 'none'})"
