"""Post-hoc EMA: a student with another power-function average of its run's weights, made from the run's snapshots
(EDM2, arXiv 2312.02696, section 3); `fdistill ema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdistill.adapters.checkpoint import Checkpoint, resolve_checkpoint
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError, CheckpointError, shown
from fdistill.base.files import claimed_folder
from fdistill.base.images import grid
from fdistill.base.state_dicts import load_exactly
from fdistill.ema_profiles import gamma_from_sigma_rel, posthoc_weights, profile_name
from fdistill.generation.generate import labels_or_prompts, open_maker
from fdistill.generation.network_maker import NetworkMaker
from fdistill.generation.sampling import Sampling
from fdistill.generator import Student
from fdistill.student_kinds import STUDENT_FILE
from fdistill.students.folder import save_student, student_facts, student_folder
from fdistill.training.snapshots import Snapshot, combine, find_snapshots

_SAMPLES = 20  # images in the model card's picture
#: Facts that `save_student` writes itself, and metrics, which were measured with other weights.
_NOT_OF_THE_CARD = ("levels", "decoder_levels", "size", "null_class", "network", "pipeline", "call", "metrics", "files")


def reconstruct_student(
    run: str | Path,
    *,
    sigma_rel: float,
    output: str | Path,
    iteration: int | None = None,
    network: str | None = None,
    device: str = "auto",
) -> Path:
    """Writes a student folder like RUN/student, but with another average of the run's weights.

    Args:
        run: the folder of a finished run with snapshots in ema/ (settings `ema.sigma_rel` and `ema.snapshot_every`).
        sigma_rel: width of the average, relative to the number of iterations, in [1e-4, 12^(-1/2)].
        output: a folder that is empty or does not exist.
        iteration: the iteration whose average is made, one with a snapshot; the last by default. Its snapshots and all
            earlier ones are combined.
        network: "module:function" for a student whose network is your own code.
        device: "auto", "cpu", "cuda" or "mps"; where the samples for the model card are drawn.

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, OutputError: before anything is written.
    """
    gamma = gamma_from_sigma_rel(sigma_rel)
    original = student_folder(run)
    used = _snapshots(Path(run), iteration)
    last = used[-1].iteration
    with claimed_folder(Path(output)) as folder:
        _, chosen_device = start(device)
        maker = open_maker(original, chosen_device, Sampling(network=network))
        assert isinstance(maker, NetworkMaker)
        assert isinstance(maker.model, Student)
        coefficients = posthoc_weights(
            [snapshot.iteration for snapshot in used],
            [gamma_from_sigma_rel(snapshot.sigma_rel) for snapshot in used],
            last,
            gamma,
        )
        load_exactly(maker.model, combine(used, coefficients.tolist()), f"snapshots of {run}")
        facts, config = student_facts(original), _training_config(original)
        own = network if network is not None and "network" in facts else None
        condition = labels_or_prompts(maker, _SAMPLES, prompts=facts.get("prompts"))
        samples = grid(maker.sample(_seed(facts), range(_SAMPLES), condition, chosen_device))
        card = {key: value for key, value in facts.items() if key not in _NOT_OF_THE_CARD}
        card |= {"iterations": last, "ema": profile_name(sigma_rel), "ema_snapshots": len(used)}
        save_student(
            maker.model.to("cpu"),
            folder,
            origin=resolve_checkpoint(own) if own else Checkpoint(str(original), original),
            latents=maker.latents,
            card=card,
            config=config,
            samples=samples,
        )
    return folder


def _training_config(student: Path) -> str:
    path = student / "training_config.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the run's folder again") from error


def _seed(facts: Mapping[str, Any]) -> int:
    seed = facts.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise CheckpointError(f"{STUDENT_FILE}: seed is {shown(seed)}; expected the run's, so copy its folder again")
    return seed


def _snapshots(run: Path, iteration: int | None) -> list[Snapshot]:
    """The snapshots up to an iteration, which must have one; all by default."""
    found = find_snapshots(run / "ema")
    if not found:
        raise CheckpointError(
            f"run {str(run)!r}: no snapshots in {run / 'ema'}; expected those of a run with settings such as "
            "'ema.sigma_rel=[0.05, 0.1]' and ema.snapshot_every=50"
        )
    known = sorted({snapshot.iteration for snapshot in found})
    if iteration is not None and iteration not in known:
        near = min(known, key=lambda there: abs(there - iteration))
        raise ArgumentError(
            f"iteration: got {iteration}, expected one with a snapshot ({len(known)} from {known[0]} to {known[-1]}); "
            f"the nearest is {near}"
        )
    return [snapshot for snapshot in found if iteration is None or snapshot.iteration <= iteration]
