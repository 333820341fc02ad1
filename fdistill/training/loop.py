"""The loop of `distill`: critic and student updates, EMA, records, samples, checkpoints, export."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from torch import Tensor
from tqdm import tqdm

from fdistill import __version__
from fdistill.base import rng
from fdistill.base.devices import autocast, start, upload
from fdistill.base.distributed import average_gradients
from fdistill.base.errors import ConfigError, FDistillError, NonFiniteError, OutputError
from fdistill.base.files import atomic_file, writing
from fdistill.base.images import grid, save_grid, to_unit
from fdistill.condition import Condition, none_like, upload_condition, where
from fdistill.config.reading import changed_keys, dump_config, load_config
from fdistill.config.schema import DistillConfig
from fdistill.data import EpochOrder
from fdistill.data.sample_loader import FixedSamples, ScaledLatents
from fdistill.denoiser import Denoiser
from fdistill.ema_profiles import profile_name
from fdistill.step import Pairs, StepResult
from fdistill.students.folder import save_student
from fdistill.training.build import Distillation, build
from fdistill.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fdistill.training.curves import save_curves
from fdistill.training.inputs import TrainingData, training_data
from fdistill.training.journal import Journal, append_record, read_records, scalars, truncate_records
from fdistill.training.prompts import Obtain, encode
from fdistill.training.sample_grids import grid_prompts, save_teacher_grid, student_images
from fdistill.training.snapshots import save_snapshot, truncate_snapshots

if TYPE_CHECKING:
    from evaluation.watch import Watch


def distill(
    config: str | Path | DistillConfig = "digits",
    *,
    output: str | Path,
    resume: bool = False,
    **overrides: Any,
) -> Path:
    """Distils a teacher into a student of one step or a few.

    Args:
        config: the name of an embedded config, a YAML file, or a DistillConfig.
        output: the run folder: config.yaml, metrics.jsonl, samples/, checkpoints/, ema/, student/, and with eval.every
            best/, the student that scored best. Must not exist or be empty.
        resume: go on from the newest checkpoint in `output`, or start if there is none.
        **overrides: settings over the config's: divergence="forward-kl"; dotted ones as **{"generator.lr": 1e-5}.

    Returns:
        The student: a folder for `fdistill.load_student` and for `diffusers.DiffusionPipeline.from_pretrained`.

    Raises:
        ConfigError, CheckpointError, OutputError: before anything is written.
        NonFiniteError: a loss became NaN or infinite; the last good checkpoint is kept.
    """
    if not isinstance(config, DistillConfig):
        config = load_config(str(config), overrides)
    elif overrides:
        raise ConfigError("distill: overrides go with the name or path of a config, not with a DistillConfig")
    folder = Path(output)
    state, device = start(config.device)
    if config.batch_size % state.num_processes:
        raise ConfigError(f"batch_size: {config.batch_size} does not divide among {state.num_processes} processes")
    check_output(folder, config, resume)
    state.wait_for_everyone()  # before the main process writes into what the others are still checking
    run = build(config, device)
    data = training_data(config, run, device)
    watch = open_watch(config, run, device)
    found = checkpoints(folder / "checkpoints")
    if found:
        tensors, meta = load_checkpoint(found[-1])
        run.load_state(tensors, f"checkpoint {found[-1]}")
        run.iteration = meta["iteration"]
        if run.iteration > config.iterations:
            raise ConfigError(
                f"iterations: got {config.iterations}, but {folder} is at iteration {run.iteration} already"
            )
    if state.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "config.yaml") as temporary:
            temporary.write_text(dump_config(config), encoding="utf-8")
        if run.resized is not None:
            listed = {"copied": run.resized.copied, "new": run.resized.new}
            with atomic_file(folder / "student_weights.json") as temporary:
                temporary.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        truncate_records(folder / "metrics.jsonl", run.iteration)
        truncate_snapshots(folder / "ema", run.iteration)
    state.wait_for_everyone()
    _train(run, data, watch, config, folder, device, main=state.is_main_process)
    student = folder / "student"
    if state.is_main_process:
        _save_student(run, config, folder, student, device)
    state.wait_for_everyone()
    return student


def open_watch(config: DistillConfig, run: Distillation, device: torch.device, obtain: Obtain = encode) -> Watch | None:
    """What scores the student as it learns; None where nothing does. Raises as `evaluation.watch.Watch`."""
    if not config.eval.every:
        return None
    from evaluation.watch import Watch

    return Watch(config, run, device, obtain)


def _save_student(
    run: Distillation,
    config: DistillConfig,
    folder: Path,
    student: Path,
    device: torch.device,
    **facts: str,
) -> None:
    with run.ema.applied(config.ema.export):
        save_student(
            run.student,
            student,
            origin=run.origin,
            latents=run.latents,
            card={**_card(config, run, folder), **facts},
            config=dump_config(config),
            samples=grid(student_images(run, config, device)),
        )


def check_output(folder: Path, config: DistillConfig, resume: bool) -> None:
    """Raises OutputError or ConfigError unless `folder` is free, or is this very run to be resumed."""
    if config.log.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log.tracker: 'wandb' needs `pip install wandb`; expected tensorboard or none without it")
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {folder}: is a file; expected a folder that is empty or does not exist")
        if not folder.is_dir() or not any(folder.iterdir()):
            return
    if not (folder / "config.yaml").is_file():
        raise OutputError(f"output {folder}: not empty, and not a run (no config.yaml); choose another folder")
    if not resume:
        raise OutputError(
            f"output {folder}: holds a run already; add --resume to go on with it, or choose another folder"
        )
    changed = changed_keys(load_config(str(folder / "config.yaml")), config)
    if changed:
        raise ConfigError(
            f"output {folder}: that run has other settings ({'; '.join(changed)}); "
            "resume with its own settings, or choose another folder"
        )


def _card(config: DistillConfig, run: Distillation, folder: Path) -> dict[str, Any]:
    """What the model card's table says; the last record is what training knew of itself."""
    records = read_records(folder / "metrics.jsonl")
    return {
        "teacher": config.teacher,
        "teacher_guidance": config.guidance_scale,
        "started_from": run.origin.name,
        "metrics": records[-1] if records else {},
        "method": config.method,
        "divergence": config.divergence and run.divergence.name,
        "iterations": run.iteration,
        "batch_size": config.batch_size,
        "critic_steps": config.critic_steps,
        "ema": config.ema.export,
        "seed": config.seed,
        "num_classes": run.student.num_classes,
        **({} if run.text is None else {"prompts": grid_prompts(run)[:16]}),
        "fdistill_version": __version__,
    }


def _train(
    run: Distillation,
    data: TrainingData,
    watch: Watch | None,
    config: DistillConfig,
    folder: Path,
    device: torch.device,
    *,
    main: bool,
) -> None:
    networks, schedule, student = run.networks, run.networks.teacher.schedule, run.student
    generator = torch.Generator(device)
    rank, processes = rng.world()
    local = config.batch_size // processes
    journal = Journal(
        lambda t: run.ratio.bin_index(run.ratio.bin_level(schedule, t)),
        run.ratio.num_bins,
    )

    def batch() -> tuple[Tensor, Condition | None, Tensor]:
        read = next(loader)
        images = upload(read.images, device)
        condition = read.text if read.text is not None else read.labels if networks.teacher.num_classes else None
        return (
            images if images.is_floating_point() else to_unit(images),
            None if condition is None else upload_condition(condition, device),
            read.rows,
        )

    def told(condition: Condition | None, number: int) -> dict[str, Condition]:
        """What the critic is told: the condition, or that there is none."""
        if not config.condition_dropout or condition is None or run.none is None:
            return {}
        draws = torch.Generator().manual_seed(
            rng.derived_seed(config.seed, rng.Stream.NO_CONDITION, run.iteration, number)
        )
        dropped = torch.rand(config.batch_size, generator=draws)[rank * local : (rank + 1) * local]
        return {
            "told": where(upload(dropped < config.condition_dropout, device), none_like(condition, run.none), condition)
        }

    def image_loss(rows: Tensor) -> dict[str, Any]:
        clip, text = run.clip, data.source.text if isinstance(data.source, ScaledLatents | FixedSamples) else None
        if clip is None or text is None:
            return {}
        features = clip.encode_prompts(text.prompts(rows))
        return {"image_loss": lambda x0: clip(x0, features), "image_weight": config.clip_loss.weight}

    def options(phase: int) -> dict[str, int]:
        """Which of a few-step student's steps makes the samples: the same for a whole batch, a host's draw."""
        if len(student.levels) == 1:
            return {}
        return {
            "student_steps": 1
            + rng.derived_seed(config.seed, rng.Stream.STUDENT_STEP, run.iteration, phase) % len(student.levels)
        }

    pair_order = EpochOrder(len(data.pairs.x0), config.batch_size, config.seed) if data.pairs else None

    def pairs() -> dict[str, Pairs]:
        if data.pairs is None or pair_order is None:
            return {}
        rows = pair_order.rows(run.iteration)[rank * local : (rank + 1) * local]
        condition: Condition | None = data.pairs.labels[rows] if networks.teacher.num_classes else None
        if run.text is not None:
            condition = run.text.rows(rows % len(run.text.index))
        uploaded = None if condition is None else upload_condition(condition, device)
        return {"pairs": Pairs(upload(data.pairs.noise(rows), device), upload(data.pairs.x0[rows], device), uploaded)}

    def ramp() -> dict[str, float]:
        if not (run.divergence.needs_ratio and config.ratio.warmup):
            return {}
        return {"ratio_ramp": min(1.0, run.iteration / config.ratio.warmup)}

    denoisers = {
        role: [module for module in run.role(role).modules() if isinstance(module, Denoiser)] for role in run.optimizers
    }

    def update(result: StepResult, roles: Mapping[str, float]) -> None:
        result.loss.backward()
        norms = {}
        for role, clip in roles.items():
            parameters = [p for p in run.role(role).parameters() if p.requires_grad]
            average_gradients(parameters)
            norms[role] = torch.nn.utils.clip_grad_norm_(parameters, clip)
            run.optimizers[role].step()
            run.optimizers[role].zero_grad()
            for denoiser in denoisers[role]:
                denoiser.after_update()
        journal.add(result.logs, norms)

    critic_clips: dict[str, float] = {
        role: getattr(config, role).grad_clip for role in ("fake_score", "discriminator") if role in run.optimizers
    }
    start_of_run, done_before = time.perf_counter(), run.iteration
    with (
        data.loader(config, networks.teacher, run.iteration * config.critic_steps) as loader,
        _trackers(config, folder, run.iteration, main) as trackers,
        tqdm(
            total=config.iterations * config.batch_size,
            initial=run.iteration * config.batch_size,
            desc="distil",
            unit="img",
            unit_scale=True,
            disable=not main,
            mininterval=1.0,
        ) as bar,
    ):
        if run.iteration == 0 and main and config.log.samples_every:
            save_teacher_grid(run, config, folder, device)
            save_grid(student_images(run, config, device), folder / "samples" / f"{run.iteration:06d}.png")
        while run.iteration < config.iterations:
            generator.manual_seed(rng.derived_seed(config.seed, rng.Stream.STEP, run.iteration))
            # For dropout, which must differ between processes.
            torch.manual_seed(rng.derived_seed(config.seed, rng.Stream.DROPOUT, run.iteration, rank))
            for k in range(config.critic_steps):
                real_x0, condition, rows = batch()
                with autocast(device, config.precision):
                    result = run.critic_update(real_x0, condition, generator, **options(k), **told(condition, k))
                update(result, critic_clips)
            with autocast(device, config.precision):
                result = run.student_update(
                    condition,
                    generator,
                    batch_size=local,
                    **ramp(),
                    **pairs(),
                    **options(config.critic_steps),
                    **image_loss(rows),
                )
            update(result, {"generator": config.generator.grad_clip})
            run.ema.update()
            run.iteration += 1
            bar.update(config.batch_size)

            last = run.iteration == config.iterations
            due = _due(run.iteration, config.log.checkpoint_every) or last
            keep = _due(run.iteration, config.ema.snapshot_every) or (last and config.ema.snapshot_every > 0)
            measured = watch is not None and (_due(run.iteration, config.eval.every) or last)
            if _due(run.iteration, config.log.every) or due or keep or measured:
                scores: dict[str, float] = {}
                try:
                    record = journal.record()
                    if due or keep or measured:
                        run.check_finite()
                    if watch is not None and measured:
                        before = time.perf_counter()
                        scores = _scores(watch, run, config)
                        start_of_run += time.perf_counter() - before  # seconds are of training alone
                except NonFiniteError as error:
                    raise _stopped(error, run.iteration, folder) from error
                seconds = time.perf_counter() - start_of_run
                record = {
                    "iteration": run.iteration,
                    "images_per_second": (run.iteration - done_before) * config.batch_size / seconds,
                    "seconds": seconds,
                    "data/skipped": len(loader.skipped),
                    **record,
                    **scores,
                }
                if main:
                    earlier = read_records(folder / "metrics.jsonl") if scores else []
                    append_record(folder / "metrics.jsonl", record)
                    for tracker in trackers:
                        tracker.log(scalars(record), step=run.iteration)
                    # Before the checkpoint: what is resumed from it has the best student of the records up to it.
                    if watch is not None and scores and watch.is_best(scores, earlier):
                        _save_student(run, config, folder, folder / "best", device, kept_for=watch.reason(scores))
            if main and config.log.samples_every and (_due(run.iteration, config.log.samples_every) or last):
                save_grid(student_images(run, config, device), folder / "samples" / f"{run.iteration:06d}.png")
            if main and keep:  # before the checkpoint, so that a run resumed from it has every snapshot up to it
                for width in config.ema.sigma_rel:
                    save_snapshot(folder / "ema", run.iteration, width, run.ema.shadows[profile_name(width)])
            if main and due:
                meta = {"fdistill_version": __version__, "torch_version": torch.__version__}
                save_checkpoint(folder / "checkpoints", run.iteration, run.state(), meta, config.log.keep_checkpoints)
    if main:
        save_curves(read_records(folder / "metrics.jsonl"), folder / "curves.png")


def _scores(watch: Watch, run: Distillation, config: DistillConfig) -> dict[str, float]:
    """Of the weights that are exported."""
    run.student.eval()
    with run.ema.applied(config.ema.export):
        scores = watch.scores()
    run.student.train()
    return scores


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _stopped(error: NonFiniteError, iteration: int, folder: Path) -> FDistillError:
    good = checkpoints(folder / "checkpoints")
    kept = f"the last good checkpoint is {good[-1]}" if good else "there was no checkpoint yet"
    return NonFiniteError(
        f"stopped at iteration {iteration}: {error}; {kept}; lower that role's lr or grad_clip and run again"
    )


@contextmanager
def _trackers(config: DistillConfig, folder: Path, iteration: int, main: bool) -> Iterator[list[GeneralTracker]]:
    """The configured tracker, started; none on other processes."""
    trackers: list[GeneralTracker] = []
    if main and config.log.tracker == "tensorboard":
        trackers.append(TensorBoardTracker("", folder / "tensorboard", purge_step=iteration + 1 if iteration else None))
    elif main and config.log.tracker == "wandb":
        trackers.append(WandBTracker("fdistill", dir=str(folder)))
    with writing(folder):
        for tracker in trackers:
            tracker.start()
        try:
            yield trackers
        finally:
            for tracker in trackers:
                tracker.finish()
