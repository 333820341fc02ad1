"""Post-hoc EMA: a student with any power-function average of its run's weights, made of the snapshots the run left
(EDM2, arXiv 2312.02696, section 3).
"""

from __future__ import annotations

from pathlib import Path

from fdistill.adapters.checkpoint import Checkpoint, resolve_checkpoint
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import claim_folder, read_json_object
from fdistill.base.images import grid
from fdistill.base.state_dicts import load_exactly
from fdistill.ema_profiles import gamma_from_sigma_rel, posthoc_weights, profile_name
from fdistill.generation.generate import open_source, told_of
from fdistill.generation.network_maker import Source
from fdistill.generator import Student
from fdistill.students.folder import STUDENT_FILE, save_student, student_folder
from fdistill.training.snapshots import Snapshot, combine, find_snapshots

_SAMPLES = 20  # in the model card's picture
#: What `save_student` says itself, and what was measured with the other weights.
_NOT_OF_THE_CARD = ("levels", "decoder_levels", "size", "null_class", "network", "pipeline", "call", "metrics")


def reconstruct_student(
    run: str | Path,
    *,
    sigma_rel: float,
    output: str | Path,
    iteration: int | None = None,
    network: str | None = None,
    device: str = "auto",
) -> Path:
    """Writes a student folder like RUN/student that holds another average of the run's weights.

    Args:
        run: the folder of a finished run with snapshots in ema/ (`ema.sigma_rel` and `ema.snapshot_every`).
        sigma_rel: width of the average relative to `iteration`, in [1e-4, 12^(-1/2)].
        output: a folder that is empty or does not exist.
        iteration: one with a snapshot; the last by default. Earlier snapshots and its own are combined.
        network: "module:function" of a student of a user's own network.
        device: where the card's samples are drawn.

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, OutputError: before anything is written.
    """
    gamma = gamma_from_sigma_rel(sigma_rel)
    used = _snapshots(Path(run), iteration)
    last = used[-1].iteration
    original = student_folder(run)
    folder = claim_folder(Path(output))
    _, chosen_device = start(device)
    source = open_source(original, chosen_device, network=network)
    assert isinstance(source, Source)
    assert isinstance(source.model, Student)
    coefficients = posthoc_weights(
        [snapshot.iteration for snapshot in used],
        [gamma_from_sigma_rel(snapshot.sigma_rel) for snapshot in used],
        last,
        gamma,
    )
    load_exactly(source.model, combine(used, coefficients.tolist()), f"snapshots of {run}")
    facts = read_json_object(original / STUDENT_FILE)
    own = network if network is not None and "network" in facts else None
    told = told_of(source, _SAMPLES, prompts=facts.get("prompts"))
    samples = grid(source.sample(int(facts.get("seed", 0)), range(_SAMPLES), told, chosen_device))
    card = {key: value for key, value in facts.items() if key not in _NOT_OF_THE_CARD}
    card |= {"iterations": last, "ema": profile_name(sigma_rel), "ema_snapshots": len(used)}
    save_student(
        source.model.to("cpu"),
        folder,
        origin=resolve_checkpoint(own) if own else Checkpoint(str(original), original),
        latents=source.latents,
        card=card,
        config=(original / "training_config.yaml").read_text(encoding="utf-8"),
        samples=samples,
    )
    return folder


def _snapshots(run: Path, iteration: int | None) -> list[Snapshot]:
    """Those up to an iteration, which must be among theirs."""
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
