"""What a run would do, without doing it: `fdistill distill --dry-run`."""

from __future__ import annotations

from fdistill.base.devices import start
from fdistill.base.files import nothing_cached
from fdistill.config.reading import dump_config
from fdistill.config.schema import DistillConfig
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.data.account import account_of
from fdistill.methods import METHODS
from fdistill.students.lora import has_adapters
from fdistill.training.build import build
from fdistill.training.distillation import Distillation
from fdistill.training.inputs import TrainingData, data_samples, pair_samples, stored_data
from fdistill.training.loop import open_watch
from fdistill.training.parts import check_parts
from fdistill.training.parts import describe as describe_parts
from fdistill.training.prompts import EncodingPlan
from fdistill.training.read_data import facts_of
from fdistill.training.updates import denoising_weighting


def describe(config: DistillConfig) -> str:
    """The text of `--dry-run`: the config, and what a run of it would do.

    Loads the teacher, builds the networks and reads one batch, so it raises the errors that a run would raise. It
    encodes no prompts or images, draws no teacher samples, and leaves nothing in the cache: a teacher that has to be
    converted or merged with a LoRA first is made in a temporary folder. Like a run, it downloads from hubs. If the
    config asks for scores, it computes the reference's features, so that errors of the protocol show as well.

    Raises:
        ConfigError, CheckpointError, DataError: as `distill` does before it writes anything.
    """
    with nothing_cached():
        state, device = start(config.device)
        plan = EncodingPlan()
        check_parts(config, state.num_processes)
        run = build(config, device, plan)
        read = _read_once(run, plan)
        evaluation = _evaluation(run, plan)
        lines = [
            *_networks(run),
            *read,
            f"iterations     {config.iterations}, each {config.critic_steps} critic updates and then 1 student update "
            f"of {config.batch_size} samples",
            *(f"accumulated    {phrase}" for phrase in describe_parts(config, state.num_processes)),
            *(f"stage {stage.number:<9}{stage.describe()}" for stage in run.stages if config.stages),
            *(f"beforehand     {sentence}" for sentence in _preparations(run, plan)),
            *evaluation,
            f"device         {device}, {config.precision}, {state.num_processes} process(es)",
        ]
    return dump_config(config) + "\n" + "\n".join(lines)


def _read_once(run: Distillation, plan: EncodingPlan) -> list[str]:
    """Reads one batch, for the errors that a run would raise there. Returns the line about what a run reads."""
    config = run.config
    if data_samples(run) is not None:
        return []
    if any(job.kind == "latents" and not job.is_done for job in plan.jobs):
        assert config.data is not None
        source = open_source(config.data)
        with ImageLoader(source, run.image_shape, Batching(1, config.seed), recipe=config.images.recipe) as images:
            next(images)
        return [f"data           {account_of(source, captioned=run.text is not None).sentence()}"]
    one, data = config.model_copy(update={"batch_size": 1}), stored_data(run)
    with TrainingData(data, None).loader(one, run.networks.teacher, 0) as loader:
        next(loader)
    return [f"data           {facts_of(run, data)['summary']}"]


def _preparations(run: Distillation, plan: EncodingPlan) -> list[str]:
    """What a run does once before its first iteration, and which results are in the cache."""
    sentences = []
    for job in plan.jobs:
        for part in job.parts:
            sentences.append(
                f"{part} are in the cache" if job.is_done else f"would encode {part} (none of them cached)"
            )
    for samples in (data_samples(run), pair_samples(run)):
        if samples is not None:
            what = f"{samples.count:,} teacher samples with {samples.evaluations} evaluations each"
            sentences.append(f"{what} are in the cache" if samples.is_cached else f"would draw {what}")
    return sentences


def _networks(run: Distillation) -> list[str]:
    """Lines about the method, the teacher and what is trained."""
    config = run.config
    millions = {
        name: sum(p.numel() for p in run.role(name).parameters() if p.requires_grad) / 1e6 for name in run.optimizers
    }
    discriminator = "none"
    if run.networks.discriminator is not None:
        on = f"{config.discriminator.source} features {', '.join(config.discriminator.features)}"
        discriminator = f"{config.discriminator.head} heads on {on}"
    return [
        f"method         {config.method}: {METHODS[config.method].summary}",
        f"teacher        {config.teacher} ({type(run.networks.fake_score).__name__}), "
        f"samples {run.networks.teacher.sample_shape}, {run.networks.teacher.num_classes or 'no'} classes",
        f"guidance       {config.guidance_scale:g}"
        + ("" if config.guidance_teacher is None else f", away from the network {config.guidance_teacher}"),
        *_prompts(run),
        f"student        {run.student.describe()}{_start(run)}",
        f"divergence     {(config.divergence and run.divergence.name) or 'the method has its own'}",
        f"discriminator  {discriminator}",
        *_denoising(run),
        "trained        " + ", ".join(f"{name} {count:.2f} M" for name, count in millions.items()),
    ]


def _denoising(run: Distillation) -> list[str]:
    """A line about the weight of the fake score's loss, where the method trains one."""
    if not METHODS[run.config.method].scores:
        return []
    weighting, own = denoising_weighting(run.config, run.networks), run.networks.fake_score.loss_weighting
    compared = "as the teacher was trained" if weighting == own else f"while the teacher was trained with {own!r}"
    return [f"fake score     denoises with the weight {weighting!r}, {compared}"]


def _prompts(run: Distillation) -> list[str]:
    if run.text is None:
        return []
    prompts = run.text.embeddings.prompts
    negative = f", away from {run.config.negative_prompt!r}" if run.config.negative_prompt else ""
    return [
        f"text           {len(prompts)} prompts, such as {prompts[0]!r}{negative}; images of {run.image_size} pixels"
    ]


def _start(run: Distillation) -> str:
    origin = "" if run.origin is run.checkpoint else f", from {run.origin.name}"
    if has_adapters(run.student):
        origin += f", adapters of rank {run.config.student.lora_rank} on the teacher's weights"
    if run.resized is None:
        return origin
    copied, new = run.resized.copied, run.resized.new
    return f"{origin}, {len(copied)} of {len(copied) + len(new)} tensors copied (new: {', '.join(new) or 'none'})"


def _evaluation(run: Distillation, plan: EncodingPlan) -> list[str]:
    watch = open_watch(run, plan)
    return [] if watch is None else [f"evaluated      every {run.config.eval.every} and at last, {watch.describe()}"]
