"""The training loop of `distill`. Every iteration runs the critic's updates, the student's update, and logging."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.distributed import from_main_process, wait_for_everyone
from fdistill.base.errors import ConfigError, StoppedError
from fdistill.base.heartbeat import telling_others
from fdistill.base.images import save_grid
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.data.account import say
from fdistill.data.embeddings import Embeddings
from fdistill.generation.network_maker import NetworkMaker
from fdistill.step import PerSample
from fdistill.teachers.teacher import Teacher
from fdistill.training import read_data
from fdistill.training.alignment import align
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.cache import Encoding
from fdistill.training.distillation import Distillation
from fdistill.training.environment import note_environment
from fdistill.training.inputs import TrainingData, training_data
from fdistill.training.journal import Journal
from fdistill.training.live_view import LiveView
from fdistill.training.logbook import Logbook
from fdistill.training.optimise import Role
from fdistill.training.parts import Split, backward, check_parts, count_of, draw_samples
from fdistill.training.prompts import Obtain, encode, open_prompts
from fdistill.training.run_folder import check_output, export_student, held_folder, prepare_folder, resume_from
from fdistill.training.sample_grids import data_images
from fdistill.training.speed import follow_others
from fdistill.training.stages import batches_before, settle_ratio
from fdistill.training.stopping import Stop

if TYPE_CHECKING:
    from evaluation.watch import Watch


def distill(
    config: str | Path | DistillConfig = "digits",
    *,
    output: str | Path,
    resume: bool = False,
    **overrides: Any,
) -> Path:
    """Distils a teacher into a student that samples in one step or a few.

    Args:
        config: the name of an embedded config, the path of a YAML file, or a DistillConfig.
        output: the run folder, which must be empty or not exist, unless `resume` is True. The run writes config.yaml,
            data.json, environment.json, metrics.jsonl, samples/, checkpoints/, ema/ and student/ into it; with
            eval.every also best/, the student with the best score.
        resume: continue from the newest checkpoint in `output`, or start anew if there is none.
        **overrides: settings that replace the config's, as divergence="forward-kl", or with dots as
            **{"generator.lr": 1e-5}.

    Returns:
        The student's folder, for `fdistill.load_student` and `diffusers.DiffusionPipeline.from_pretrained`.

    Raises:
        ConfigError, CheckpointError, OutputError: raised before anything is written.
        NonFiniteError: losses or gradients became NaN or infinite in `max_skipped` updates of a role in a row, or
            weights did; the last good checkpoint is kept.
        StoppedError: SIGTERM, SIGINT or SIGUSR1 came; the iteration was finished and a checkpoint written.
    """
    if not isinstance(config, DistillConfig):
        config = load_config(str(config), overrides)
    elif overrides:
        raise ConfigError("distill: overrides go with the name or path of a config, not with a DistillConfig")
    folder = Path(output)
    state, device = start(config.device)
    if config.batch_size % state.num_processes:
        raise ConfigError(f"batch_size: {config.batch_size} does not divide among {state.num_processes} processes")
    check_parts(config, state.num_processes)
    check_output(folder, config, resume)
    wait_for_everyone()  # before the main process writes into what the others are still checking
    with telling_others(), ExitStack() as stack:
        from_main_process(lambda: stack.enter_context(held_folder(folder, config, resume)))
        run = build(config, device)
        data = training_data(run)
        watch = open_watch(run)
        resume_from(folder, run)
        from_main_process(lambda: prepare_folder(folder, run))
        if state.is_main_process:
            read_data.note(folder, run, data.source, {} if watch is None else watch.read)
            note_environment(folder, device)
            _save_data_grid(run, data, folder / "samples" / "data.png")
            _announce(run, folder, state.num_processes)
        received = train(run, data, Logbook(run, folder, watch, main=state.is_main_process))
        wait_for_everyone()  # a launcher ends all processes once one has ended
        if received:
            raise StoppedError(
                f"{folder}: stopped by {signal.Signals(received).name}; saved iteration {run.iteration} of "
                f"{config.iterations}; continue with --resume",
                128 + received,
            )
        if state.is_main_process or run.sharded:
            export_student(run, folder, name="student", main=state.is_main_process)
        wait_for_everyone()
    return folder / "student"


def _save_data_grid(run: Distillation, data: TrainingData, path: Path) -> None:
    """Saves images of the data beside the grids of teacher and student, of the same classes or prompts."""
    if run.config.log.samples_every and not path.is_file() and not run.sharded:
        images = data_images(run, data.source)
        if images is not None:
            path.parent.mkdir(exist_ok=True)
            save_grid(images, path)


def _announce(run: Distillation, folder: Path, processes: int) -> None:
    """One line about the teacher that was read, and one that says where the run begins with how many processes."""
    teacher = run.networks.teacher
    millions = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    known = "prompts" if run.text is not None else f"{teacher.num_classes or 'no'} classes"
    say(f"teacher {run.config.teacher}", f"{millions:,.1f} million weights, for {known}")
    count = "1 process" if processes == 1 else f"{processes} processes"
    where = f"iteration {run.iteration} to {run.config.iterations}"
    tqdm.write(f"{folder}: {where}, {count} on {run.device}", file=sys.stderr)


def open_watch(run: Distillation, obtain: Obtain = encode) -> Watch | None:
    """The scorer of the student during training; None if `eval.every` is 0. Raises what `evaluation.watch.Watch` does.

    Args:
        obtain: returns the folder of encoded prompts; see `open_inputs`.
    """
    config = run.config
    if not config.eval.every:
        return None
    from evaluation.watch import Watch, WatchedStudent, WatchSettings

    def encoded(prompts: Sequence[str]) -> Embeddings:
        teacher = Teacher(run.checkpoint, run.networks.teacher, run.latents)
        encoding = Encoding(run.device, negative_prompt=config.negative_prompt, precision=config.encoder_precision)
        return open_prompts(list(prompts), teacher, encoding, obtain, "evaluation prompts")

    student = WatchedStudent(
        NetworkMaker("the student", run.student, None, "", run.latents),
        run.image_shape,
        None if run.text is None else encoded,
        run.sharded,
    )
    settings = WatchSettings(**config.eval.model_dump(exclude={"every"}), seed=config.seed)
    return Watch(student, settings, run.device)


def train(run: Distillation, data: TrainingData, logbook: Logbook) -> int:
    """Trains from the run's current iteration to the config's last, or until a signal; returns the signal, or 0."""
    config, generator = run.config, torch.Generator(run.device)
    roles = {name: Role(run.role(name), optimizer) for name, optimizer in run.optimizers.items()}
    first_batch = batches_before(run.stages, run.iteration)
    received = 0
    with (
        Stop(run.device) as stop,
        data.loader(config, run.networks.teacher, first_batch) as loader,
        logbook,
        LiveView(config.batch_size, run.iteration, config.iterations, main=rng.world()[0] == 0) as view,
        follow_others(config, run.device) as follow,
    ):
        batches = Batches(run, data, loader)
        while run.iteration < config.iterations and not received:
            iterate(run, batches, roles, generator, logbook.journal)
            follow()
            received = stop.received()
            record = logbook.after_iteration(loader.skipped, stopping=received != 0)
            view.after_iteration(run.iteration, record, logbook.alarms)
    logbook.save_curves()
    return received


def iterate(
    run: Distillation,
    batches: Batches,
    roles: Mapping[str, Role],
    generator: torch.Generator,
    journal: Journal,
) -> None:
    """One iteration: the critic's updates, then the student's update, then the update of its averaged weights."""
    settle(run, roles, generator)
    samples: dict[str, Tensor] = {}
    for number in range(run.stage.critic_steps):
        arguments = batches.critic(number)
        if run.stage.config.reuse_samples and not samples:
            samples = {"fake_x0": draw_critic_samples(run, arguments, generator)}
        update_critic(run, number, {**arguments, **samples}, roles, generator, journal)
    update_student(run, batches.student(), roles, generator, journal)
    batches.finish()
    align(run.networks, run.stage.config.fake_score.alignment)
    run.ema.update(run.stage.config.ema.decays)
    run.iteration += 1


def settle(run: Distillation, roles: Mapping[str, Role], generator: torch.Generator) -> None:
    """Gives roles and ratio the settings of this iteration, and random generators its seed."""
    stage = run.stage
    for name in stage.roles & roles.keys():
        roles[name].settle(stage.config.roles[name], stage.rate(name, run.iteration))
    settle_ratio(run.ratio, stage.config)
    generator.manual_seed(rng.derived_seed(run.config.seed, rng.Stream.STEP, run.iteration))
    # Dropout draws from the global generator, and must draw different numbers in each process.
    torch.manual_seed(rng.derived_seed(run.config.seed, rng.Stream.DROPOUT, run.iteration, rng.world()[0]))


def draw_critic_samples(run: Distillation, arguments: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """The student's samples [B, C, H, W] for a critic's update with these arguments."""
    return draw_samples(run.networks, arguments, generator, _split(run, "fake_score", {}))


def update_critic(
    run: Distillation,
    number: int,
    arguments: Mapping[str, Any],
    roles: Mapping[str, Role],
    generator: torch.Generator,
    journal: Journal,
) -> None:
    """The critic's update `number`, from 0, of this iteration: fake score and discriminator, where they are trained."""
    critic = {name: role for name, role in roles.items() if name in run.stage.roles and name != "generator"}
    logs = backward(run.critic_update, arguments, generator, _split(run, "fake_score", critic))
    batch = batches_before(run.stages, run.iteration) + min(number + 1, run.stage.batches)
    step(logs, critic, journal, f"iteration {run.iteration + 1}, batch {batch}")


def update_student(
    run: Distillation,
    arguments: Mapping[str, Any],
    roles: Mapping[str, Role],
    generator: torch.Generator,
    journal: Journal,
) -> None:
    """The student's update. Where it is skipped, the density ratio's bins stay as they were, too."""
    student = {"generator": roles["generator"]}
    bins = run.ratio.bins.clone()
    logs = backward(run.student_update, arguments, generator, _split(run, "generator", student))
    place = f"iteration {run.iteration + 1}"
    if run.stage.batches:  # the conditions are those of the critic's last batch
        place += f", batch {batches_before(run.stages, run.iteration) + run.stage.batches}"
    (norm,) = step(logs, student, journal, place)
    now = run.ratio.bins
    run.ratio.bins = torch.where(norm.isfinite().to(now.device), now, bins.to(now.device))


def _split(run: Distillation, section: str, roles: Mapping[str, Role]) -> Split:
    count = count_of(run.stage.config, section, rng.world()[1])
    return Split(count, run.config.precision, [run.role(name) for name in roles])


def step(
    logs: Sequence[Mapping[str, PerSample]], roles: Mapping[str, Role], journal: Journal, place: str
) -> list[Tensor]:
    """Runs an optimiser step for each role that an update has given gradients; returns the gradients' norms.

    Args:
        logs: of the update's parts.
        place: where the update is, for the journal.
    """
    norms = {name: role.step() for name, role in roles.items()}
    journal.add(logs, norms, {name: role.weights for name, role in roles.items()}, place)
    return list(norms.values())
