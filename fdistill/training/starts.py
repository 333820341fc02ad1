"""What roles start from: checkpoints of networks, and the roles of earlier runs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fdistill.adapters.checkpoint import Checkpoint, load_denoiser, resolve_checkpoint
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.base.state_dicts import load_exactly, take
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.ema import trained_state
from fdistill.step import Networks
from fdistill.students.experts import experts_in
from fdistill.training import checks
from fdistill.training.checkpoint import checkpoints, load_checkpoint, newest_intact


def open_start(
    config: DistillConfig, origin: Checkpoint, teacher: Denoiser, setting: str, *, memory_of_files: bool = False
) -> Denoiser:
    """Loads the network that a role starts from, as `setting` says, in the teacher's resolution and guidance.

    Args:
        memory_of_files: as for `load_denoiser`.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it makes other samples than the teacher.
    """
    if origin.folder is not None and experts_in(origin.folder):
        raise ConfigError(
            f"{setting}: {origin.name!r} has experts for phases, which are no one network; expected another "
            "checkpoint, or the run's own teacher"
        )
    start = load_denoiser(origin, null_class=config.null_class, memory_of_files=memory_of_files)
    if start.text_shapes is not None:
        start.resize(*teacher.sample_shape[1:])
    if start.embedded_guidance is not None:
        start.embedded_guidance = config.guidance_scale
    checks.check_alike(setting, origin.name, start, teacher)
    return start


def start_roles(config: DistillConfig, networks: Networks, teacher: Denoiser) -> None:
    """Gives fake score and discriminator the weights that the config names for them, if it names any.

    Raises:
        CheckpointError: they cannot be read, or do not fit.
        ConfigError: there is no role that they could be given to.
    """
    if config.fake_score.checkpoint is not None:
        _start_fake_score(config, config.fake_score.checkpoint, networks.fake_score, teacher)
    name = config.discriminator.checkpoint
    if name is None:
        return
    if networks.discriminator is None:
        raise ConfigError(
            f"discriminator.checkpoint: got {name!r}, but no discriminator is trained; expected null, or "
            "discriminator.gan_weight above 0"
        )
    found = _last_state(name)
    if found is None:
        raise CheckpointError(
            f"discriminator.checkpoint {name!r}: no run's folder; expected one, with checkpoints/ in it"
        )
    load_trained(networks.discriminator, _role_of(found, "discriminator", name), f"discriminator.checkpoint {name!r}")


def _start_fake_score(config: DistillConfig, name: str, fake_score: Denoiser, teacher: Denoiser) -> None:
    what, found = f"fake_score.checkpoint {name!r}", _last_state(name)
    if found is not None:
        load_trained(fake_score, _role_of(found, "fake_score", name), what)
        return
    if config.fake_score.lora_rank:
        raise ConfigError(
            f"{what}: a whole network, but fake_score.lora_rank={config.fake_score.lora_rank} trains adapters on the "
            "teacher's; expected the folder of a run with the same adapters, or lora_rank=0"
        )
    start = open_start(config, resolve_checkpoint(name), teacher, "fake_score.checkpoint")
    load_exactly(fake_score, start.state_dict(), what)


def _last_state(name: str) -> dict[str, Tensor] | None:
    """The tensors of the last checkpoint of a run's folder; None for anything else.

    Raises:
        CheckpointError: the run has no checkpoint, or it cannot be read.
    """
    folder = Path(name)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        return None
    made = checkpoints(folder / "checkpoints")
    if not made:
        raise CheckpointError(
            f"checkpoint {name!r}: a run without a checkpoint yet; expected one in {folder}/checkpoints"
        )
    try:
        return load_checkpoint(made[-1])[0]
    except CheckpointError as error:
        intact = newest_intact(made[:-1])
        other = "no other one is intact" if intact is None else f"{intact} is intact, and that run's --resume takes it"
        raise CheckpointError(f"{error}; {other}") from error


def _role_of(state: dict[str, Tensor], role: str, name: str) -> dict[str, Tensor]:
    """A role's tensors in a run's state; CheckpointError if the run trained none."""
    found = take(state, role)
    if not found:
        raise CheckpointError(f"{role}.checkpoint {name!r}: that run trained no {role}; expected one that did")
    return found


def load_trained(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Gives a module its trained tensors, and leaves those that it shares; CheckpointError unless exactly these fit."""
    trained = trained_state(module)
    own = {key: value for key, value in module.state_dict().items() if key not in trained}
    load_exactly(module, {**own, **tensors}, what)
