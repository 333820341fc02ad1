"""Scores from end to end: several processes, batches, bad input, and the commands evaluate, reference and compare."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation import features
from evaluation.evaluate import describe, evaluate
from evaluation.protocols import PROTOCOLS
from evaluation.weights import PUBLISHED
from fdistill import generate
from fdistill.adapters.unet2d_condition import tiny_unet as condition_unet
from fdistill.assets import CLIP_DIGITS
from fdistill.base.errors import ArgumentError, CheckpointError, DataError, NonFiniteError
from fdistill.commands import cli
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.data.digit_captions import evaluation_prompts, load_digit_images
from fdistill.data.digits import load_digits
from support.processes import launch_commands

SMALL = pytest.mark.filterwarnings("ignore:.*names show the count")


def write(folder: Path, images: Tensor, order: Sequence[int] | None = None, **manifest: Any) -> Path:
    """uint8 [N, C, H, W] as PNG files, named by `order`, and a manifest."""
    folder.mkdir(parents=True)
    for i, image in zip(order or range(len(images)), images, strict=True):
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if len(image) == 1 else array).save(folder / f"{i:06d}.png")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def digits(folder: Path, count: int, first: int = 0) -> Path:
    images, labels = load_digits()
    part = slice(first, first + count)
    return write(folder, images[part], labels=labels[part].tolist(), seed=5)


def noise(count: int, size: int, seed: int = 0, channels: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=random)


# --- processes


@SMALL
@pytest.mark.thorough
def test_two_processes_score_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd counts, a last batch that is not full, fewer batches than processes, prompts, LPIPS, which only
    the main process runs, and references; then everything again from the cache."""
    digits(tmp_path / "samples", 89)
    digits(tmp_path / "real", 75, 500)
    pictures, prompts = load_digit_images()[0], [prompt.text for prompt in evaluation_prompts()]
    write(tmp_path / "captioned", pictures[:21], prompts=prompts[:21])
    write(tmp_path / "pictures", noise(5, 16))
    lpips = tmp_path / "lpips"
    lpips.mkdir()
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    torch.save(state, lpips / PUBLISHED["vgg16"].name)
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(linear, lpips / PUBLISHED["lpips"].name)

    def commands(folder: str) -> list[list[str]]:
        def score(samples: str, output: str, *options: str) -> list[str]:
            return ["evaluate", samples, *options, "--output", f"{folder}/{output}.json", "--device", "cpu"]

        against = ["--reference", "real", "--replicates", "3"]
        every = ["--metrics", "fd_digits,precision,recall,class_accuracy,density_coverage,authenticity"]
        reference = ["reference", "real", "--device", "cpu", "--batch-size", "16", "--output"]
        folder_scores = score("samples", "folder", *against, *every, "--batch-size", "16")
        return [
            score("digits", "teacher", *["--steps", "6", "--num-images", "71", "--batch-size", "16"], *against),
            folder_scores,
            score("samples", "one-batch", *against, *every, "--batch-size", "128"),
            score(
                "captioned",
                "captioned",
                *["--protocol", "digits-t2i", "--metrics", "clip_digits,ink", "--batch-size", "4"],
            ),
            score("pictures", "lpips", *["--protocol", "folder", "--metrics", "lpips_diversity", "--weights", "lpips"]),
            [*reference, f"{folder}/moments.npz"],
            [*reference, f"{folder}/rows.npz", "--metrics", "fd_digits,recall"],
            [arg.replace("/folder.json", "/again.json") for arg in folder_scores],
        ]

    monkeypatch.chdir(tmp_path)
    for processes, folder in ((1, "one"), (2, "two")):
        monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / f"cache-{folder}"))
        (tmp_path / folder).mkdir()
        if processes == 1:
            for arguments in commands(folder):
                cli.app(arguments, standalone_mode=False)
        else:
            launch_commands(commands(folder), tmp_path)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    names = {name for name in names if name.endswith((".json", ".npz"))}
    assert len(names) == 8
    for name in sorted(names):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        if name.endswith(".npz"):
            with np.load(one) as first, np.load(two) as second:
                assert first.files == second.files
                for key in set(first.files) - {"facts"}:
                    np.testing.assert_allclose(second[key], first[key], rtol=1e-6, atol=1e-6)
                assert str(first["facts"]) == str(second["facts"])
            continue
        results = [json.loads(path.read_text()) for path in (one, two)]
        assert results[1]["metrics"] == {
            key: pytest.approx(value, rel=1e-6, abs=1e-9) for key, value in results[0]["metrics"].items()
        }, name
        assert results[1]["spread"].keys() == results[0]["spread"].keys()
        for result in results:
            result["provenance"] = {
                key: value for key, value in result["provenance"].items() if key not in ("date", "seconds_per_image")
            }
        assert results[1]["provenance"] == results[0]["provenance"]
    teacher = json.loads((tmp_path / "two" / "teacher.json").read_text())
    assert teacher["metrics"]["class_accuracy@71"] > 0.9  # labels are by the number of the image in all processes
    again, before = (json.loads((tmp_path / "two" / f"{n}.json").read_text())["metrics"] for n in ("again", "folder"))
    assert again == before


@SMALL
def test_neither_batches_nor_order_matter(tmp_path: Path) -> None:
    images = load_digits()[0]
    real = digits(tmp_path / "real", 300, 900)
    order = np.random.default_rng(0).permutation(97).tolist()
    folders = [write(tmp_path / "a", images[:97]), write(tmp_path / "b", images[:97], order)]
    how: dict[str, Any] = {"reference": real, "replicates": 0, "device": "cpu"}
    expected = evaluate(folders[0], batch_size=64, **how)["metrics"]
    assert expected["fd_digits@97 vs real"] > 1
    for folder, batch_size in ((folders[0], 7), (folders[1], 64), (folders[1], 97)):
        found = evaluate(folder, batch_size=batch_size, **how)["metrics"]
        assert found == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


# --- the glue around torch-fidelity's own functions


def test_scores_are_torch_fidelitys_of_the_same_images(
    inception_file: Path,
    tmp_path: Path,
) -> None:
    samples, real = noise(10, 32) // 2, noise(6, 32, seed=1)
    found = evaluate(
        write(tmp_path / "samples", samples),
        protocol="folder",
        reference=write(tmp_path / "real", real),
        metrics=["inception_score", "precision", "recall"],
        weights={"": inception_file.parent},
        device="cpu",
    )
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    with torch.no_grad():
        pool, logits = network(samples)
        real_pool = network(real)[0]
    score = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    near = prc_features_to_metric(pool.double(), real_pool.double(), prc_neighborhood=3, verbose=False)
    mark = f" (other weights {found['provenance']['extractors']['inception']['sha256'][:8]})"
    assert found["metrics"] == {
        f"inception_score@10{mark}": pytest.approx(score["inception_score_mean"], rel=1e-6),
        f"precision@10 vs real{mark}": pytest.approx(near["precision"]),
        f"recall@10 vs real{mark}": pytest.approx(near["recall"]),
    }


# --- bad input


@SMALL
def test_what_cannot_be_measured_is_refused_before_anything_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extracted(*_: object, **__: object) -> None:
        raise AssertionError("features were extracted")

    monkeypatch.setattr(features, "_stream", extracted)
    few, real = digits(tmp_path / "few", 64), digits(tmp_path / "real", 70)
    with pytest.raises(
        ArgumentError, match=r"fd_digits of 64 samples is refused, as the covariance of 64 features is singular"
    ):
        evaluate(few, reference=real, metrics=["fd_digits"])
    with pytest.raises(ArgumentError, match=r"of 64 reference images is refused.*at least 65"):
        evaluate(real, reference=few, metrics=["fd_digits"])
    with pytest.raises(ArgumentError, match=r"of 5 samples is refused"):
        evaluate("digits", num_images=5, metrics=["fd_digits"])
    pictures = write(tmp_path / "pictures", noise(5, 16))
    with pytest.raises(CheckpointError, match=r"vgg16: its weights .* are not here"):
        evaluate(pictures, protocol="folder", metrics=["lpips_diversity"])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another size": (lambda p: Image.new("L", (16, 16)).save(p), "is 16x16; expected 8x8"),
    "colours": (lambda p: Image.new("RGB", (8, 8)).save(p), "is of mode RGB; expected 8-bit greyscale"),
    "transparent": (lambda p: Image.new("RGBA", (8, 8)).save(p), r"is transparent \(RGBA\)"),
    "16 bits": (lambda p: Image.fromarray(np.full((8, 8), 999, np.uint16)).save(p), "has 16 bits a channel"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "cannot be read"),
    "no image": (lambda p: p.write_bytes(b"text"), "is no PNG"),
}


@SMALL
@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_refused_by_name_on_either_side(kind: str, tmp_path: Path) -> None:
    spoil, message = BAD[kind]
    folder, good = digits(tmp_path / "images", 70), digits(tmp_path / "good", 70)
    spoil(folder / "000066.png")
    with pytest.raises(DataError, match=rf"images .*images: .*000066\.png {message}"):
        evaluate(folder, reference=good, metrics=["precision"])
    with pytest.raises(DataError, match=rf"000066\.png {message}"):
        evaluate(good, reference=folder, metrics=["precision"])


def test_greyscale_is_expanded_where_colours_are_measured(tmp_path: Path) -> None:
    grey, prompts = noise(6, 16, channels=1), [prompt.text for prompt in evaluation_prompts()][:6]
    how: dict[str, Any] = {"protocol": "digits-t2i", "metrics": ["clip_digits", "prompt_accuracy"], "device": "cpu"}
    with pytest.warns(UserWarning, match="6 images"):
        results = [
            evaluate(write(tmp_path / str(len(images[0])), images, prompts=prompts), **how)
            for images in (grey, grey.expand(-1, 3, -1, -1))
        ]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert [result["provenance"]["greyscale_expanded"] for result in results] == [6, 0]


@SMALL
def test_lossy_samples_are_warned_of(tmp_path: Path) -> None:
    folder = digits(tmp_path / "images", 70)
    for i in range(3):
        path = folder / f"{i:06d}.png"
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    with pytest.warns(UserWarning, match=r"3 of 70 samples are lossy files.*write PNG"):
        result = evaluate(folder, metrics=["precision"])
    assert result["provenance"]["lossy_files"] == 3


def test_fewer_samples_are_named_and_warned_of(tmp_path: Path) -> None:
    folder = digits(tmp_path / "images", 70)
    with pytest.warns(
        UserWarning, match=r"70 images, and protocol 'digits' wants 1797; the scores' names show the count"
    ):
        result = evaluate(folder, metrics=["fd_digits"], replicates=0)
    assert result["metrics"].keys() == {"fd_digits@70"}
    assert (result["provenance"]["num_samples"], result["provenance"]["protocol_num_samples"]) == (70, 1797)


@SMALL
def test_an_unwritable_cache_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = digits(tmp_path / "images", 70)
    expected = evaluate(folder, metrics=["fd_digits"], replicates=0)["metrics"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="features are not kept: .*set FDISTILL_CACHE"):
        assert evaluate(folder, metrics=["fd_digits"], replicates=0)["metrics"] == expected


@SMALL
def test_images_that_are_not_finite_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    spoilt, output = tmp_path / "spoilt", tmp_path / "scores.json"
    shutil.copytree(tiny_teacher, spoilt)
    path = spoilt / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"].view(-1)[0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(NonFiniteError, match=r"spoilt: image 0 has values that are NaN or infinite"):
        evaluate(spoilt, num_steps=1, num_images=70, output=output)
    assert not output.exists()


# --- the command


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `fdistill`, in this process."""
    monkeypatch.setattr(sys, "argv", ["fdistill", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("name", ["evaluate", "reference", "compare"])
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(monkeypatch, capsys, name, "--help")
    assert status == 0
    assert f"Example: fdistill {name}" in out
    assert "--protocol" in out


@pytest.mark.parametrize("name", ["evaluate", "reference"])
def test_help_names_every_protocol(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = command(monkeypatch, capsys, name, "--help")
    whole = re.sub(r"-\s+", "-", out[out.index("--protocol") : out.index("--metrics")])  # a name may be wrapped
    words = re.split(r"[\s,.]+", whole)
    assert set(PROTOCOLS) - set(words) == set()


def test_several_seeds_give_mean_and_deviation(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.json"
    options = ["--num-images", 70, "--steps", 1, "--replicates", 0, "--metrics", "fd_digits,recall", "--device", "cpu"]
    status, out, err = command(
        monkeypatch, capsys, "evaluate", tiny_teacher, "--seeds", "0,1,5", *options, "--output", output
    )
    assert status == 0, err
    lines = [line for line in err.splitlines() if "wants 1797" in line]
    assert len(lines) == 3
    assert all(line.startswith("warning: ") and "Warning" not in line for line in lines)
    result = json.loads(output.read_text())
    assert out.strip() == describe(result)
    assert re.search(r"^fd_digits@70 +\d+\.\d{4} \+- \d+\.\d{4}  \(3 seeds\)$", out, re.MULTILINE)
    assert result["provenance"]["seeds"] == [0, 1, 5]
    assert result["seeds"].keys() == {"0", "1", "5"}
    with pytest.warns(UserWarning, match="70 images"):
        alone = {
            seed: evaluate(
                tiny_teacher,
                seeds=[seed],
                num_images=70,
                num_steps=1,
                replicates=0,
                metrics=["fd_digits"],
                device="cpu",
            )["metrics"]["fd_digits@70"]
            for seed in (0, 1, 5)
        }
    for seed, value in alone.items():
        assert result["seeds"][str(seed)]["fd_digits@70"] == pytest.approx(value, rel=1e-9)
    assert len(set(alone.values())) == 3
    assert result["metrics"]["fd_digits@70"] == pytest.approx(statistics.fmean(alone.values()), rel=1e-9)
    spread = result["spread"]["fd_digits@70"]
    assert spread == {"value": pytest.approx(statistics.stdev(alone.values()), rel=1e-9), "of": "3 seeds"}


def test_reference_and_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = digits(tmp_path / "real", 75, 500)
    first, second = digits(tmp_path / "first", 70), digits(tmp_path / "second", 70, 100)
    status, out, err = command(
        monkeypatch, capsys, "reference", real, "--metrics", "fd_digits,recall", "--output", tmp_path / "real.npz"
    )
    assert (status, out) == (0, f"reference: {tmp_path / 'real.npz'}\n"), err
    scores: list[dict[str, Any]] = []
    for name, reference in (("images", real), ("file", tmp_path / "real.npz")):
        output = tmp_path / f"{name}.json"
        how = ["--reference", reference, "--metrics", "fd_digits,recall", "--output", output, "--replicates", 0]
        status, _, err = command(monkeypatch, capsys, "evaluate", first, *how)
        assert status == 0, err
        scores.append(json.loads(output.read_text())["metrics"])
    images, file = scores
    assert file == {key.replace("vs real", "vs real.npz"): pytest.approx(v, rel=1e-9) for key, v in images.items()}
    how = ["--reference", real, "--metrics", "fd_digits,recall", "--output", tmp_path / "comparison"]
    status, out, err = command(monkeypatch, capsys, "compare", first, second, *how)
    assert status == 0, err
    assert re.search(r"^first .*\n(.*\n)*?second ", out, re.MULTILINE)
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {
        "comparison.md",
        "comparison.json",
        "comparison.png",
    }


def brightness() -> nn.Module:
    """Class 1 for images of which more than half is bright, and else 0."""

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert -1 <= x.min() <= x.max() <= 1
            level = x.mean((1, 2, 3))
            return torch.stack([-level, level], 1)

    return Bright()


@SMALL
def test_a_classifier_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dark, bright = noise(5, 32) // 3, 255 - noise(5, 32) // 3
    folder = write(tmp_path / "images", torch.cat([dark, bright]), labels=[0] * 4 + [1] * 6)
    how = ["--protocol", "cifar10-fid50k", "--metrics", "class_accuracy", "--output", tmp_path / "scores.json"]
    status, _, err = command(
        monkeypatch, capsys, "evaluate", folder, *how, "--classifier", f"{__name__}:brightness", "--device", "cpu"
    )
    assert status == 0, err
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["metrics"] == {"class_accuracy@10": pytest.approx(0.9)}
    assert result["provenance"]["extractors"]["classifier"]["preparation"].startswith(f"{__name__}:brightness")


@SMALL
def test_of_too_many_images_an_even_part_is_measured(tmp_path: Path) -> None:
    images, labels = load_digits()
    order = labels.argsort(stable=True)
    folder = write(tmp_path / "by class", images[order], labels=labels[order].tolist())
    with pytest.warns(UserWarning, match=r"holds 1,797 images, of which 400, drawn evenly and the same each time, are"):
        result = evaluate(folder, metrics=["fd_digits", "class_accuracy"], num_images=400, replicates=0)
    assert result["metrics"]["fd_digits@400"] < 2  # the first 400, of three classes, are at 100
    assert result["metrics"]["class_accuracy@400"] > 0.95
    with pytest.raises(ArgumentError, match=r"num_images: got 1798, and .* holds 1797; expected at most as many"):
        evaluate(folder, num_images=1798)


@SMALL
def test_samples_of_some_classes_say_so(tmp_path: Path) -> None:
    images, labels = load_digits()
    folder = write(tmp_path / "some", images[labels > 5], labels=labels[labels > 5].tolist())
    few = write(tmp_path / "few", images[labels > 5][:100], labels=labels[labels > 5][:100].tolist())
    how: dict[str, Any] = {"metrics": ["class_accuracy"], "replicates": 0}
    count = int((labels > 5).sum())
    assert list(evaluate(folder, **how)["metrics"]) == [f"class_accuracy@{count} (4 of 10 classes)"]
    assert list(evaluate(few, **how)["metrics"]) == ["class_accuracy@100"]  # that few may lack some by chance


def test_what_is_no_samples_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    cases = [
        (tmp_path / "nowhere.zip", "no such file; expected images"),
        (tmp_path / "notes" / "a.txt", "is a file of another kind; expected images"),
        (tmp_path / "notes", "holds neither images nor a network; expected images"),
    ]
    for where, said in cases:
        with pytest.raises(ArgumentError, match=said):
            evaluate(where)
    (tmp_path / "no.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"no \.npz file, or one with pickled objects"):
        evaluate(tmp_path / "no.npz")


def test_the_command_tells_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = digits(tmp_path / "images", 70)
    cases: list[tuple[list[Any], str]] = [
        (["--weights", tmp_path / "nowhere"], r"weights '.*nowhere': no such file or folder"),
        (["--weights", f"incepton={folder}"], r"unknown network 'incepton'; did you mean 'inception'"),
        (
            ["--protocol", "folder", "--reference", folder, "--metrics", "precision"],
            r"inception: its weights .* put it",
        ),
        (["--prompts", tmp_path / "nowhere.txt"], r"prompts .*nowhere\.txt: cannot be read"),
        (["--seeds", "0,a"], r"seeds: got '0,a', expected whole numbers"),
        (["--seeds", "1"], r"seeds: .* are finished images; these options apply only to generating; leave it out"),
        (
            ["--steps", "4", "--guidance-scale", "2"],
            r"steps, guidance_scale: .* are finished images; .*; leave them out",
        ),
        (["--sampler", "pipeline"], r"sampler: .* are finished images; .*; leave it out"),
        (["--replicates", "1"], r"replicates: got 1; expected 0 for no spread, or at least 2"),
        (["--sampler", "pipeline"], r"sampler: .* are finished images; .*; leave it out"),
        (["--replicates", "1"], r"replicates: got 1; expected 0 for no spread, or at least 2"),
        (["--replicates", "-1"], r"replicates: got -1"),
        (["--classifier", "nowhere:f"], r"classifier: protocol 'digits' has its own"),
        (["--protocol", "cifar10-fid50k", "--classifier", "nowhere:f"], r"classifier 'nowhere:f': ModuleNotFoundError"),
        (["--reference", tmp_path / "nowhere.npz"], r"nowhere\.npz"),
        (["--output", folder / "000000.png" / "s.json"], r"cannot write"),
    ]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for arguments, said in cases:
        status, out, err = command(monkeypatch, capsys, "evaluate", folder, *arguments)
        assert (status, out) == (1, ""), arguments
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        assert re.search(said, errors[0]), errors[0]
        assert "Traceback" not in err


@SMALL
def test_a_pipeline_is_scored_by_a_clip_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An LCM with its own scheduler, by protocol folder, prompts of a file and a small CLIP in place of ViT-L/14."""
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    plain = tiny_pipeline("StableDiffusionPipeline", scheduler=LCMScheduler(**betas))
    parts = {**plain.components, "unet": condition_unet(time_cond_proj_dim=8)}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "lcm")
    (tmp_path / "prompts.txt").write_text("a bold seven\na thin two\na nine\n")
    output = tmp_path / "scores.json"
    how = ["--sampler", "pipeline", "--steps", 2, "--resolution", 16, "--guidance-scale", 4, "--num-images", 5]
    scored = ["--protocol", "folder", "--metrics", "clip", "--prompts", tmp_path / "prompts.txt", "--output", output]
    clip = ["--weights", f"clip-l14={CLIP_DIGITS}", "--batch-size", 2, "--device", "cpu"]
    status, _, err = command(monkeypatch, capsys, "evaluate", tmp_path / "lcm", *how, *scored, *clip)
    assert status == 0, err
    result = json.loads(output.read_text())
    provenance = result["provenance"]
    mark = f"@{provenance['num_samples']} (other weights {provenance['extractors']['clip-l14']['sha256'][:8]})"
    assert result["metrics"].keys() == {name + mark for name in ("clip_cosine", "clip_x100", "clipscore")}
    assert abs(result["metrics"]["clip_cosine" + mark]) <= 1
    assert result["metrics"]["clip_x100" + mark] == pytest.approx(max(0, 100 * result["metrics"]["clip_cosine" + mark]))
    assert (provenance["kind"], provenance["steps"], provenance["guidance"], provenance["evaluations_per_image"]) == (
        "pipeline",
        2,
        4.0,
        2,
    )
    assert provenance["sampler"] == "LatentConsistencyModelPipeline, LCMScheduler"
    prompts = ["a bold seven", "a thin two", "a nine"]
    images = generate(
        tmp_path / "lcm",
        num_images=5,
        output=tmp_path / "images",
        prompts=prompts,
        num_steps=2,
        guidance_scale=4.0,
        resolution=16,
        sampler="pipeline",
        device="cpu",
    )
    again = evaluate(images, protocol="folder", metrics=["clip"], weights={"clip-l14": CLIP_DIGITS}, device="cpu")
    assert again["metrics"] == {name: pytest.approx(v, abs=2e-3) for name, v in result["metrics"].items()}
    assert again["provenance"]["prompts_sha256"] == provenance["prompts_sha256"]
    assert json.loads((images / "manifest.json").read_text())["prompts_given"] == 3
    (tmp_path / "other.txt").write_text("a bold seven\n")
    with pytest.raises(ArgumentError, match=r"prompts: the images of .* were not generated from this list"):
        evaluate(images, protocol="folder", metrics=["clip"], prompts=tmp_path / "other.txt")
