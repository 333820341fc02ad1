"""Other people's pipelines make their own images here: the same as in diffusers, whatever the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fdistill import OneStepPipeline, TiUEPipeline, distill, generate, load_student
from fdistill.adapters.tiny_parts import autoencoder, untrained
from fdistill.adapters.unet2d_condition import tiny_unet as condition_unet
from fdistill.base.errors import ArgumentError, CheckpointError, NonFiniteError
from fdistill.base.rng import Stream
from fdistill.commands.cli import app
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.generation.generate import labels_or_prompts, open_maker
from fdistill.generation.maker import Maker
from fdistill.generation.network_maker import NetworkMaker
from fdistill.generation.pipeline_maker import PipelineMaker, noise_seed
from fdistill.generation.sampling import Sampling
from support.denoisers import tiny_unet
from support.families import ddpm as ddpm_in_one_folder

CPU = torch.device("cpu")
PROMPTS = ["a bold seven", "a thin two", "a thin digit", "a bold nine", "a seven"]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(scheduler: Any) -> DiffusionPipeline:
    return tiny_pipeline("StableDiffusionPipeline", scheduler=scheduler)


def lcm() -> DiffusionPipeline:
    """SimianLuo/LCM_Dreamshaper_v7: a network that takes the guidance scale as an input."""
    plain = stable_diffusion(LCMScheduler(**BETAS))
    parts = {**plain.components, "unet": condition_unet(time_cond_proj_dim=8)}
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def turbo(class_name: str = "StableDiffusionPipeline") -> DiffusionPipeline:
    """stabilityai/sd-turbo, sdxl-turbo, and SDXL-Lightning as one loads it."""
    return tiny_pipeline(class_name, scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"))


def dit(scheduler: Any) -> DiffusionPipeline:
    transformer: DiTTransformer2DModel = untrained(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=1000,
        )
    )
    return DiTPipeline(transformer, autoencoder(), scheduler)


def consistency() -> DiffusionPipeline:
    torch.manual_seed(0)
    return ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler(sigma_data=0.75))


def unconditional(pipeline: Any, scheduler: Any) -> DiffusionPipeline:
    torch.manual_seed(0)
    made: DiffusionPipeline = pipeline(tiny_unet(num_class_embeds=None, in_channels=3, out_channels=3), scheduler)
    return made


#: Name -> (pipeline, steps, guidance scale, evaluations for an image, which condition it takes beside the noise).
PIPELINES: dict[str, tuple[Callable[[], DiffusionPipeline], int, float, int, str]] = {
    "lcm": (lcm, 4, 8.0, 4, "prompt"),
    "lcm-lora": (lambda: stable_diffusion(LCMScheduler(**BETAS)), 4, 0.0, 4, "prompt"),
    "sd-turbo": (turbo, 1, 0.0, 1, "prompt"),
    "sdxl-lightning": (lambda: turbo("StableDiffusionXLPipeline"), 2, 1.0, 2, "prompt"),
    "ancestral": (lambda: stable_diffusion(EulerAncestralDiscreteScheduler(**BETAS)), 3, 2.0, 6, "prompt"),
    "heun": (lambda: stable_diffusion(HeunDiscreteScheduler(**BETAS)), 3, 1.0, 5, "prompt"),
    "flux": (lambda: tiny_pipeline("FluxPipeline"), 2, 3.5, 2, "prompt"),
    "pixart": (lambda: tiny_pipeline("PixArtSigmaPipeline"), 2, 3.0, 4, "prompt"),
    "ddpm": (lambda: unconditional(DDPMPipeline, DDPMScheduler()), 5, 1.0, 5, ""),
    "ddim": (lambda: unconditional(DDIMPipeline, DDIMScheduler()), 3, 1.0, 3, ""),
    "dit": (lambda: dit(DDIMScheduler()), 3, 4.0, 6, "class_labels"),
    "dit-ddpm": (lambda: dit(DDPMScheduler()), 3, 1.0, 3, "class_labels"),
    "consistency": (consistency, 1, 1.0, 1, "class_labels"),
    "consistency-2": (consistency, 2, 1.0, 2, "class_labels"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    for name, (make, *_) in PIPELINES.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in PIPELINES}


def opened(folder: Path, steps: int = 1, guidance_scale: float = 1.0, **options: Any) -> PipelineMaker:
    sampling = Sampling(sampler="pipeline", num_steps=steps, guidance_scale=guidance_scale, **options)
    maker = open_maker(folder, CPU, sampling)
    assert isinstance(maker, PipelineMaker)
    return maker


def conditions(maker: Maker, indices: list[int], kind: str) -> Any:
    everything = labels_or_prompts(maker, 10, prompts=PROMPTS if kind == "prompt" else None)
    if everything is None:
        return None
    return (
        everything[torch.tensor(indices)] if isinstance(everything, torch.Tensor) else [everything[i] for i in indices]
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_an_image_is_diffusers_own_whatever_its_batch(folders: dict[str, Path], name: str) -> None:
    _, steps, guidance_scale, evaluations, kind = PIPELINES[name]
    size = {"resolution": 16} if kind == "prompt" else {}  # Flux and PixArt draw 1024 pixels by default
    maker = opened(folders[name], steps, guidance_scale, **size)
    state = torch.get_rng_state()
    with maker.counted() as counted:
        first = maker.sample(3, [4], conditions(maker, [4], kind), CPU)
        together = maker.sample(3, range(5), conditions(maker, list(range(5)), kind), CPU)
        counted.images = 6
    assert counted.per_image == evaluations
    assert torch.equal(torch.get_rng_state(), state)
    some = torch.cat([maker.sample(3, part, conditions(maker, part, kind), CPU) for part in ([3, 1], [4, 0, 2])])
    assert together.dtype == torch.uint8
    assert together.shape[2:] == (16, 16) if kind == "prompt" or name.startswith("dit") else (8, 8)
    apart = (some[[3, 1, 4, 0, 2]].int() - together.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.01
    assert (first.int() - together[4].int()).abs().max() <= 1
    different = [(together[i] != together[j]).float().mean() for i in range(5) for j in range(i)]
    assert min(different) > 0.3
    assert (maker.sample(4, [4], conditions(maker, [4], kind), CPU) != first).float().mean() > 0.3

    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(noise_seed(3, 4))}
    if kind:
        call[kind] = [PROMPTS[4] if kind == "prompt" else 4]
    if kind == "prompt":
        call |= {"height": 16, "width": 16}
    if kind == "prompt" or name.startswith("dit"):
        call["guidance_scale"] = guidance_scale
    if name == "pixart":
        call["use_resolution_binning"] = False
    if name == "dit-ddpm":  # which draws noise past its generator
        torch.manual_seed(noise_seed(3, 4, Stream.PIPELINE_GLOBAL))
    image = pipeline(**call).images[0]
    expected = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)
    assert (first[0].int() - expected.int()).abs().max() <= 1
    assert (first[0] != expected).float().mean() < 0.01


def test_values_are_rounded(folders: dict[str, Path]) -> None:
    maker = opened(folders["sd-turbo"])
    pipeline = DiffusionPipeline.from_pretrained(folders["sd-turbo"])
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(noise_seed(0, 0))
    floats = pipeline(
        PROMPTS[0], num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="np"
    ).images[0]
    image = maker.sample(0, [0], PROMPTS[:1], CPU)[0].permute(1, 2, 0).numpy()
    away = np.abs(floats * 255 - image.astype(float))
    assert away.max() <= 0.5001
    assert (np.floor(floats * 255) != image).mean() > 0.2


def test_no_two_images_share_their_noise() -> None:
    """Of a generator's seed 32 bits are read."""
    low = torch.randn(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(low, torch.randn(4, generator=torch.Generator().manual_seed(5 + 2**32)))
    for seed in (0, 7):
        assert len({noise_seed(seed, index) for index in range(50_000)}) == 50_000
    assert all(0 <= noise_seed(seed, 2**40 + 1) < 2**32 for seed in range(9))
    assert noise_seed(0, 3) != noise_seed(0, 3, Stream.PIPELINE_GLOBAL) != noise_seed(1, 3)


def test_what_it_says_of_itself(folders: dict[str, Path], tmp_path: Path) -> None:
    maker = opened(folders["lcm"], 4, 8.0)
    assert (maker.kind, maker.num_steps, maker.guidance_scale) == ("pipeline", 4, 8.0)
    assert maker.sampler == "LatentConsistencyModelPipeline, LCMScheduler"
    assert (maker.takes_prompts, maker.num_classes) == (True, None)
    assert maker.cut(PROMPTS) == ""
    assert maker.cut(["word " * 200]).startswith("1 of 1 prompts are longer than the 77 tokens")
    assert opened(folders["dit"]).num_classes == 1000
    assert opened(folders["consistency"]).num_classes == 10
    plain = opened(folders["ddpm"])
    assert (plain.num_classes, plain.takes_prompts, plain.guidance_scale) == (None, False, None)
    assert opened(ddpm_in_one_folder(tmp_path / "old"), 2).sample(0, [0], None, CPU).shape == (1, 3, 8, 8)


def test_guidance_negative_prompt_and_resolution_reach_the_pipeline(folders: dict[str, Path]) -> None:
    def image(**options: Any) -> torch.Tensor:
        return opened(folders["sd-turbo"], 2, **options).sample(0, [0], PROMPTS[:1], CPU).int()

    plain = image()
    assert torch.equal(image(guidance_scale=0.0), plain)
    assert (image(guidance_scale=5.0) - plain).abs().max() > 2
    assert (image(guidance_scale=5.0, negative_prompt="a thin two") - image(guidance_scale=5.0)).abs().max() > 2
    assert image(resolution=32).shape == (1, 3, 32, 32)


def test_guidance_of_a_class_that_calls_it_true_cfg_scale(tmp_path: Path) -> None:
    """FLUX.1-schnell's network takes no scale as an input."""
    tiny_pipeline("FluxPipeline", network={"guidance_embeds": False}).save_pretrained(tmp_path / "schnell")
    images = []
    for scale, evaluations in ((1.0, 2), (3.0, 4)):
        maker = opened(tmp_path / "schnell", 2, scale, resolution=16)
        with maker.counted() as counted:
            images.append(maker.sample(0, [0, 1], PROMPTS[:2], CPU))
            counted.images = 2
        assert (counted.per_image, maker.guidance_scale) == (evaluations, scale)
    assert not torch.equal(*images)


def spoilt(folder: Path, name: str, target: Path) -> Path:
    """A copy in which one weight is not a number."""
    shutil.copytree(folder, target)
    path = target / name / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight" if name == "unet" else "decoder.conv_out.weight"].view(-1)[0] = float("nan")
    save_file(tensors, path)
    return target


def test_images_that_are_not_finite_are_refused(folders: dict[str, Path], tiny_teacher: Path, tmp_path: Path) -> None:
    bad = spoilt(folders["sd-turbo"], "vae", tmp_path / "bad")
    with pytest.raises(NonFiniteError, match="image 7 has values that are NaN"):
        opened(bad).sample(0, [7, 8], PROMPTS[:2], CPU)
    other = spoilt(tiny_teacher, "unet", tmp_path / "other")
    for sampler in ("heun", "pipeline"):
        with pytest.raises(NonFiniteError, match=r"image 0 has values that are NaN.*fdistill inspect"):
            generate(other, num_images=2, output=tmp_path / "out", num_steps=1, sampler=sampler)
    assert not (tmp_path / "out").exists()


def test_one_bad_image_is_named(tiny_teacher: Path) -> None:
    maker = open_maker(tiny_teacher, CPU, Sampling(num_steps=1))
    assert isinstance(maker, NetworkMaker)

    class OnePixel(torch.nn.Module):
        factor = 1

        def decode(self, x0: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.arange(len(x0))[:, None, None, None] == 2, torch.inf, x0)

    object.__setattr__(maker, "latents", OnePixel())
    with pytest.raises(NonFiniteError, match="image 12 has"):
        maker.sample(0, [10, 11, 12, 13], torch.arange(4), CPU)


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy with other entries in its model_index.json."""
    shutil.copytree(folder, target)
    path = target / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_safety_checkers_are_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    with_checker = edited(folders["sd-turbo"], tmp_path / "c", safety_checker=checker, requires_safety_checker=True)
    with pytest.raises((OSError, ValueError)):  # its files are not there
        DiffusionPipeline.from_pretrained(with_checker)
    images = opened(with_checker).sample(0, [0], PROMPTS[:1], CPU)
    assert torch.equal(images, opened(folders["sd-turbo"]).sample(0, [0], PROMPTS[:1], CPU))


MARK = "from pathlib import Path\nPath({mark!r}).touch()\nfrom diffusers import *\n"


@pytest.mark.parametrize(
    ("changes", "file", "message"),
    [
        ({"_class_name": "RectifiedFlowPipeline"}, None, "'RectifiedFlowPipeline' is not one of diffusers.*evaluate"),
        ({"_class_name": ["mine", "MyPipeline"]}, "mine.py", "is not one of diffusers"),
        ({"_class_name": "AutoencoderKL"}, None, "is not one of diffusers"),
        ({"unet": ["my_unet", "UNet2DConditionModel"]}, "unet/my_unet.py", "its unet is of 'my_unet'"),
        ({"unet": ["mine", "UNet2DConditionModel"]}, None, "its unet is of 'mine'"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "unet/diffusers.py", "its unet is of 'diffusers'"),
        ({}, "None.py", "None.py: code of checkpoints is not run"),
        ({"_class_name": "StableDiffusionUpscalePipelines"}, None, "is not one of diffusers"),
        ({"_class_name": "DanceDiffusionPipeline"}, None, "takes no|is not one of diffusers"),
        ({"_class_name": "DiffusionPipeline"}, None, "takes no generator"),
        ({"_class_name": "RePaintPipeline"}, None, "RePaintPipeline needs image|is not one of diffusers"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, None, "cannot load|do not fit"),
        ({"scheduler": ["diffusers", "NoScheduler"]}, None, "cannot be loaded"),
    ],
)
def test_code_of_checkpoints_is_not_run(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], file: str | None, message: str
) -> None:
    folder = edited(folders["sd-turbo"], tmp_path / "odd", **changes)
    if file is not None:
        (folder / file).write_text(MARK.format(mark=str(tmp_path / "was-run")))
    with pytest.raises(CheckpointError, match=message):
        opened(folder)
    assert not (tmp_path / "was-run").exists()


def test_files_that_cannot_be_read_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    place = Path("unet") / "diffusion_pytorch_model.safetensors"
    cut = edited(folders["sd-turbo"], tmp_path / "cut")
    (cut / place).write_bytes((cut / place).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="unet: cannot load the weights"):
        opened(cut)
    fewer = edited(folders["sd-turbo"], tmp_path / "fewer")
    tensors = load_file(fewer / place)
    tensors.pop("conv_out.weight")
    save_file(tensors, fewer / place)
    with pytest.raises(CheckpointError, match=r"1 missing keys such as conv_out.weight"):
        opened(fewer)
    pickle = edited(folders["sd-turbo"], tmp_path / "pickle")
    text = pickle / "text_encoder"
    torch.save({**load_file(text / "model.safetensors"), "extra": {1, 2}}, text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: holds no state dict"):
        opened(pickle)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model_index.json"):
        opened(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no model_index.json"):
        open_maker("support.denoisers:GaussianDenoiser", CPU, Sampling(sampler="pipeline"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"guidance_scale": 2.0}, "guidance_scale: got 2, but DDPMPipeline .* takes none; leave it out"),
        ("ddpm", {"resolution": 16}, "resolution: DDPMPipeline .* has a fixed resolution; leave it out"),
        ("dit", {"negative_prompt": "a cat"}, "negative_prompt: DiTPipeline .* takes none"),
        ("ddpm", {"steps": 0}, "steps: expected at least 1, got 0"),
        ("ddpm", {"network": "mine:network"}, "network: got 'mine:network'"),
    ],
)
def test_arguments_that_a_class_does_not_take(
    folders: dict[str, Path], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        opened(folders[name], **options)


def test_bad_requests(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="sampler: got 'hein'; did you mean 'heun'"):
        open_maker(folders["ddpm"], CPU, Sampling(sampler="hein"))
    with pytest.raises(ArgumentError, match=r"prompts: .* takes none"):
        generate(folders["ddpm"], num_images=1, output=tmp_path / "o", sampler="pipeline", prompts=["a"])
    with pytest.raises(ArgumentError, match=r"prompts: .* is a text-to-image model; expected at least one prompt"):
        generate(folders["lcm"], num_images=1, output=tmp_path / "o", sampler="pipeline")
    with pytest.raises(ArgumentError, match="got 10, expected 0 to 9"):
        generate(folders["consistency"], num_images=1, output=tmp_path / "o", sampler="pipeline", class_labels=[10])
    with pytest.raises(ArgumentError, match=r"StableDiffusionPipeline refuses the call.*divisible by 8"):
        opened(folders["sd-turbo"], resolution=20).sample(0, [0], PROMPTS[:1], CPU)
    small = edited(folders["dit"], tmp_path / "small")
    shutil.rmtree(small / "transformer")
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10,
    ).save_pretrained(small / "transformer")  # fmt: skip
    with pytest.raises(ArgumentError, match="DiTPipeline guides with label 1000 for no class"):
        opened(small, 2, 3.0)


def test_where_only_diffusers_can_run_it_the_message_says_how(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not supported.*`--sampler pipeline` runs it"):
        open_maker(folders["lcm"], CPU)
    odd = edited(folders["ddpm"], tmp_path / "odd")
    path = odd / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "ScoreSdeVeScheduler"}))
    with pytest.raises(CheckpointError, match=r"scheduler 'ScoreSdeVeScheduler' is not supported.*--sampler pipeline"):
        open_maker(odd, CPU)
    cut = edited(folders["ddpm"], tmp_path / "cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name in (cut, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError) as caught:
            open_maker(name, CPU)
        assert "--sampler pipeline" not in str(caught.value)


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def test_generate_writes_a_pipelines_images(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = generate(
        folders["lcm"],
        num_images=5,
        seed=3,
        output=tmp_path / "images",
        prompts=PROMPTS,
        batch_size=2,
        num_steps=4,
        guidance_scale=8.0,
        sampler="pipeline",
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["steps"], manifest["guidance"]) == ("pipeline", 4, 8.0)
    assert (manifest["evaluations_per_image"], manifest["prompts"]) == (4, PROMPTS)
    assert manifest["sampler"] == "LatentConsistencyModelPipeline, LCMScheduler"
    expected = opened(folders["lcm"], 4, 8.0).sample(3, range(5), PROMPTS, CPU).permute(0, 2, 3, 1).int().numpy()
    assert np.abs(read(folder) - expected).max() <= 1


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    options = ["--num-images", "3", "--steps", "2", "--sampler", "pipeline", "--output", str(tmp_path / "images")]
    done = CliRunner().invoke(app, ["generate", str(folders["ddim"]), *options])
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "images" / "manifest.json").read_text())
    assert (manifest["sampler"], manifest["evaluations_per_image"]) == ("DDIMPipeline, DDIMScheduler", 2)


class TestStudents:
    @pytest.fixture(scope="class")
    def run(self, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        output = tmp_path_factory.mktemp("students") / "run"
        distill("digits", output=output, teacher=str(tiny_teacher), batch_size=8, iterations=1)
        return output

    def test_it_is_run_as_other_programs_do(self, run: Path, tmp_path: Path) -> None:
        """With its own number of steps, and not as many as a teacher."""
        folder = generate(run, num_images=3, seed=2, output=tmp_path / "i", sampler="pipeline")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["kind"], manifest["steps"], manifest["evaluations_per_image"]) == ("student", 1, 1)
        assert manifest["guidance"] is None
        noise = torch.cat(
            [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(noise_seed(2, i))) for i in range(3)]
        )
        x0 = load_student(run)(noise, torch.arange(3))
        expected = (x0.clamp(-1, 1) * 127.5 + 127.5).round()[:, 0].numpy()
        assert np.abs(read(folder) - expected).max() <= 1

    def test_a_label_for_no_class_is_not_drawn(self, run: Path, tmp_path: Path) -> None:
        student = tmp_path / "student"
        shutil.copytree(run / "student", student)
        facts = json.loads((student / "fdistill_student.json").read_text())
        (student / "fdistill_student.json").write_text(json.dumps({**facts, "null_class": 9}))
        assert open_maker(student, CPU, Sampling(sampler="pipeline")).num_classes == 9
        (student / "fdistill_student.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"fdistill_student.json: cannot be read"):
            open_maker(student, CPU, Sampling(sampler="pipeline"))

    def test_pipelines_of_ours_count_what_they_do(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        pipeline = OneStepPipeline(tiny_unet(), DDPMScheduler(), student={"levels": [900.0, 500.0], "null_class": 9})
        pipeline.save_pretrained(tmp_path / "two")
        maker = opened(tmp_path / "two")
        with maker.counted() as counted:
            maker.sample(0, range(3), torch.arange(3), CPU)
            counted.images = 3
        assert (counted.per_image, maker.num_steps, maker.num_classes) == (2, 2, 9)

    def test_tiue_students(self, tmp_path: Path) -> None:
        """One evaluation each, by either sampler, and the same images for the same noise."""
        torch.manual_seed(0)
        pipeline = TiUEPipeline(
            tiny_unet(), DDPMScheduler(), student={"decoder_levels": [999.0, 600.0, 200.0], "size": 8}
        )
        folder = tmp_path / "tiue"
        pipeline.save_pretrained(folder)
        facts = {"levels": [999.0], "decoder_levels": [999.0, 600.0, 200.0], "null_class": None}
        call = {"num_inference_steps": 1, "guidance_scale": 0.0}
        (folder / "fdistill_student.json").write_text(json.dumps({**facts, "call": call}))
        for sampler in ("heun", "pipeline"):
            maker = open_maker(folder, CPU, Sampling(sampler=sampler))
            with maker.counted() as counted:
                images = maker.sample(0, range(3), torch.arange(3), CPU)
                counted.images = 3
            assert counted.per_image == 1, sampler
            assert (maker.kind, maker.num_classes, maker.takes_prompts) == ("student", 10, False)
        noise = torch.cat(
            [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(noise_seed(0, i))) for i in range(3)]
        )
        x0 = load_student(folder)(noise, torch.arange(3))
        assert ((x0.clamp(-1, 1) * 127.5 + 127.5).round() - images).abs().max() <= 1
        for steps in (2, 3):
            with pytest.raises(ArgumentError, match=rf"steps: got {steps}, but .* is a student that takes one step"):
                load_student(folder, steps=steps)
