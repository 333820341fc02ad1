"""What each answer changes in a recipe, and why."""

from __future__ import annotations

from pathlib import Path

from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.commands.init.answers import Hardware
from fdistill.commands.init.draft import Draft
from fdistill.commands.init.recipes import Recipe, is_of, nearest_recipe
from fdistill.commands.init.sources import DataAnswer
from fdistill.commands.init.teachers import TeacherAnswer
from fdistill.data import TEACHER_SAMPLES
from fdistill.methods import METHODS

#: Samples in an update from which on a density ratio without an upper bound is averaged over enough of them.
_MANY = 64
_FEW = 32  # samples that an update has at least, on a GPU; and at most, on a CPU
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_SAMPLES = {"count": 10000, "num_steps": 18}
_LORA_RATE = "Adapters need a higher rate than whole weights; this is the rate of DMD2's LoRA of SDXL."
_AS_SMALL = "As the recipes for 24 GB have it."


def draft_of(teacher: TeacherAnswer, data: DataAnswer, hardware: Hardware, steps: int, goal: str) -> Draft:
    """A config for these answers; whether it fits the GPUs' memory is not decided yet."""
    recipe = nearest_recipe(teacher, hardware, goal)
    draft = Draft.of(recipe.name, recipe.values)
    _teacher(draft, recipe, teacher)
    _steps(draft, teacher, steps)
    _hardware(draft, recipe, teacher, hardware)
    if goal == "diversity":
        _diversity(draft, teacher)
    _features(draft, teacher)
    _data(draft, teacher, data)
    if goal == "speed":
        _speed(draft, data)
    elif goal == "lora":
        _lora(draft)
    if "method" not in draft.reasons:
        draft.put("method", draft.method, f"The method of the recipe {recipe.name}, which suits your goal, {goal}.")
    return draft


def _teacher(draft: Draft, recipe: Recipe, teacher: TeacherAnswer) -> None:
    draft.put("teacher", teacher.name, f"Your teacher is {teacher.describe()}.")
    if teacher.base is not None:
        draft.put(
            "teacher_base", teacher.base, "The file does not say its text encoders and settings; this pipeline does."
        )
    if not is_of(recipe, teacher):
        draft.leave_out("smoke")  # it describes another family's network
    denoiser, scale = teacher.denoiser, draft.get("guidance_scale", 1.0)
    alone = denoiser.text_shapes is None and denoiser.null_class is None
    distilled = teacher.settings.get("guidance_embeds") is False and teacher.network == "FluxTransformer2DModel"
    if scale != 1 and (alone or distilled):
        why = "has no label for no class" if alone else "was distilled to sample without guidance"
        draft.put("guidance_scale", 1.0, f"The teacher {why}, so it is not guided (1 is no guidance).")
    level = draft.get("student_level")
    schedule = denoiser.schedule
    highest = level[0] if isinstance(level, list) else level
    if recipe.levels != teacher.levels:
        sampler = "karras" if teacher.levels == "sigma" else "uniform"
        why = "The recipe's teacher has noise levels of another kind, so these are drawn over all of them."
        draft.put("matching_levels", {"sampler": sampler, "low": 0.02, "high": 0.98}, why)
        draft.put("critic_levels", {"sampler": sampler}, why)
    if recipe.levels != teacher.levels or not schedule.t_min < highest <= schedule.t_max:
        draft.put("student_level", None, "The student starts from the teacher's highest noise level (null).")
    resolution = draft.get("resolution")
    if resolution is not None and (resolution > teacher.size or resolution % (teacher.factor or 1)):
        draft.leave_out("resolution")


def _steps(draft: Draft, teacher: TeacherAnswer, steps: int) -> None:
    level = draft.get("student_level")
    before = len(level) if isinstance(level, list) else 1
    if steps == before:
        number = "one step" if steps == 1 else f"{steps} steps"
        draft.reasons.setdefault("student_level", f"You asked for {number}, which the recipe takes from here.")
        return
    draft.leave_out("student_level")
    if steps == 1:
        assert isinstance(level, list)
        draft.put(
            "student_level", level[0], f"You asked for one step. The recipe takes {before}, which is easier to learn."
        )
        draft.leave_out("student.sampler")
        return
    why = f"You asked for {steps} steps; they are spread along the teacher's own schedule (docs/few-step.md)."
    draft.put("student.steps", steps, why)
    if not isinstance(level, list) and level is not None and not teacher.takes_prompts:
        draft.put("student_level", level, "The first step starts from here, and the others are below.")
    stages = draft.get("stages")
    if stages:
        last = dict(stages[-1])
        why = "The recipe's warm-up on the teacher's pairs is for one step, so it is left out for several."
        draft.leave_out("stages", "regression")
        for key, value in last.items():
            draft.put(key, value, why)


def _hardware(draft: Draft, recipe: Recipe, teacher: TeacherAnswer, hardware: Hardware) -> None:
    embedded = teacher.name in EMBEDDED_TEACHERS
    batch = int(draft.get("batch_size", 128))
    if not hardware.gpus:
        draft.put("device", "cpu", "You have no GPU for this run.")
        if embedded:
            return
        if draft.get("precision", "fp32") != "fp32":
            draft.put("precision", "fp32", "CPUs have few instructions for bf16, so that fp32 is faster there.")
        draft.leave_out(
            "frozen_precision", *(f"{role}.optimizer" for role in ("generator", "fake_score", "discriminator"))
        )
        if batch > _FEW:
            draft.put("batch_size", _FEW, f"A CPU is slow, so an update has {_FEW} samples, not the recipe's {batch}.")
        return
    own = max(batch // recipe.gpus * hardware.gpus, min(batch, _FEW))
    own = -(-own // hardware.gpus) * hardware.gpus
    if own != batch:
        each = own // hardware.gpus
        draft.put(
            "batch_size",
            own,
            f"{each} samples for each GPU; the recipe has {batch} in all, for {recipe.gpus} GPU(s). With fewer samples "
            "in an update the student sees fewer images, so score it on the way and train longer if it still improves.",
        )


def _diversity(draft: Draft, teacher: TeacherAnswer) -> None:
    if METHODS[draft.method].divergence is None or not draft.trains_heads:
        _add_heads(draft, teacher)
    batch = int(draft.get("batch_size", 128))
    if batch >= _MANY:
        why = "Your goal is diversity: forward KL weighs up the kinds of images that the student makes too rarely."
        draft.put("divergence", "forward-kl", why)
    else:
        why = (
            f"Your goal is diversity. With {batch} samples in an update forward KL's weights are too noisy; those of "
            "Jensen-Shannon have an upper bound, and it misses fewer kinds of images than reverse KL (docs/modes.md)."
        )
        draft.put("divergence", "jensen-shannon", why)


def _add_heads(draft: Draft, teacher: TeacherAnswer) -> None:
    """f-distill's discriminator, as FastGen's config of Flux has it: a divergence needs its density ratio."""
    why = f"The recipe's {draft.method} has no divergence to choose, or no heads for its ratio; diversity needs both."
    draft.put("method", "f-distill", why)
    draft.leave_out("objective", "augmentation", "fake_score.guidance_scale", "fake_score.training_guidance_scale")
    pooled = "mid" not in teacher.denoiser.feature_shapes
    heads = {
        "lr": 1e-5,
        "beta1": 0.9,
        "weight_decay": 0.01,
        "source": "teacher",
        "head": "pooled" if pooled else "convolutional",
        "features": ["depth50" if pooled else "mid"],
        "gan_weight": 1.0,
        "shared_noise": True,
    }
    draft.put(
        "discriminator", heads, "The divergence needs a density ratio, which heads on the teacher's features estimate."
    )
    draft.put("generator.gan_weight", 0.03, "The same heads add a GAN term, as in FastGen's config of Flux.")


def _features(draft: Draft, teacher: TeacherAnswer) -> None:
    if not draft.trains_heads:
        return
    shapes = list(teacher.denoiser.feature_shapes)
    wanted = draft.get("discriminator.features", ["mid"])
    if shapes and not set(wanted) <= set(shapes):
        middle = next((name for name in ("mid", "depth50") if name in shapes), shapes[len(shapes) // 2])
        why = f"This network has no {', '.join(wanted)}, so the heads read the features in the middle of it."
        draft.put("discriminator.features", [middle], why)


def _data(draft: Draft, teacher: TeacherAnswer, data: DataAnswer) -> None:
    uses_pairs = bool(draft.get("stages"))
    samples = draft.get("teacher_samples", {})
    if not uses_pairs:
        draft.leave_out("teacher_samples")
    draft.leave_out("prompts", "images")
    seen = (
        "" if draft.trains_heads else " This method has no discriminator, so it reads their captions or classes alone."
    )
    if data.kind == "images":
        draft.put("data", data.name, f"Your images.{seen}")
        if data.resized:
            why = f"Your images are cropped and resized to the teacher's {teacher.size} pixels."
            draft.put("images.recipe", "center-box", why)
    elif data.kind == "latents":
        _latents(draft, teacher, data, seen)
    elif data.kind == "to encode":
        folder = f"{Path(data.name.partition(':')[2] or data.name).stem}-latents"
        draft.put("data", folder, f"Your images as latents; the first command below makes them of {data.name}.{seen}")
        draft.before.append(_cache_command(draft, data.name, folder))
    elif data.kind == "samples" or draft.trains_heads:
        why = "There are no images, so samples of the teacher are drawn once and stand for them."
        draft.put("data", TEACHER_SAMPLES, why)
        small = teacher.name in EMBEDDED_TEACHERS
        kept = {**_SAMPLES, **({"count": 2000} if small else {}), **samples}
        draft.put(
            "teacher_samples",
            kept,
            "More samples show more of what the teacher can draw; each costs as many evaluations.",
        )
        if "smoke" in draft.values:
            smoke = draft.values["smoke"]
            smoke["overrides"] = {**smoke.get("overrides", {}), "teacher_samples": {"count": 16, "num_steps": 3}}
    else:
        draft.put("data", None, "This method shows images to nothing, so the prompts are all that it reads.")
    if data.kind == "prompts":
        draft.put(
            "prompts", data.name, "The student learns what it is asked for; use at least 10,000 prompts if you can."
        )


def _latents(draft: Draft, teacher: TeacherAnswer, data: DataAnswer, seen: str) -> None:
    draft.put("data", data.name, f"Your latents, which `fdistill cache` has made.{seen}")
    if not teacher.takes_prompts:
        return
    draft.leave_out("resolution")
    if data.resolution != teacher.size:
        draft.put("resolution", data.resolution, "Your latents were encoded at this size.")
    if data.negative_prompt:
        draft.put("negative_prompt", data.negative_prompt, "Your captions were encoded with this negative prompt.")
    narrow = draft.get("frozen_precision", "fp32") != "fp32"
    if data.precision == "fp32" and narrow:
        draft.put(
            "frozen_precision", "fp32", "Your captions were encoded in fp32, and a run has to encode prompts alike."
        )
    if data.precision == "bf16" and not narrow:
        why = "Your captions were encoded in bf16, and a run has to encode prompts alike."
        draft.put("precision", "bf16", why)
        draft.put("frozen_precision", "bf16", why)


def _cache_command(draft: Draft, images: str, folder: str) -> list[str]:
    precision = "fp32" if draft.get("frozen_precision", "fp32") == "fp32" else "bf16"
    options = {
        "--teacher": draft.get("teacher"),
        "--teacher-base": draft.get("teacher_base"),
        "--resolution": draft.get("resolution"),
        "--precision": precision if precision != "fp32" else None,
    }
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    return ["fdistill", "cache", images, *given, "--output", folder]


def _speed(draft: Draft, data: DataAnswer) -> None:
    if METHODS[draft.method].critic is not None and not draft.get("stages") and not data.shapes:
        why = (
            "Your goal is speed: the critic's updates share the student's samples. An iteration took 0.85 to 0.9 times "
            "as long where it was measured (docs/speed.md)."
        )
        draft.put("reuse_samples", True, why)
    if draft.get("gradient_checkpointing"):
        why = "Your goal is speed: activations are kept and not computed again, which takes more memory."
        draft.put("gradient_checkpointing", False, why)


def _lora(draft: Draft) -> None:
    why = "Your goal is a LoRA: the student is adapters, which `fdistill export` writes as a file."
    if draft.get("student.lora_rank"):
        draft.explain("student.lora_rank", why)
        return
    draft.put("student.lora_rank", 64, why)
    draft.put("student.lora_alpha", 8.0, _AS_SMALL)
    draft.put("student.lora_targets", _ATTENTION, _AS_SMALL)
    draft.put("generator.lr", 5e-5, _LORA_RATE)
    if not draft.get("fake_score.lora_rank"):
        draft.put("fake_score.lora_rank", 64, "The fake score shares the teacher's weights as well.")
        draft.put("fake_score.lora_targets", _ATTENTION, _AS_SMALL)
        draft.put("fake_score.lr", 1e-4, "Adapters need a higher rate, and the fake score has to keep up.")
