"""`coco10k-sdxl`: one sample for each of 10,000 captions of COCO 2014, against 10,000 of its images, as DMD2 measures
students of SDXL (Yin et al. 2024, arXiv 2405.14867): FID at 512 pixels, CLIP at 256 pixels, and patch FID of the
central 299x299 pixels without resizing. These are a twelfth of a 1,024-pixel sample, and more of a photograph of COCO.

As in `coco30k-dmd2`, samples are rounded, computed in float32 and seeded by image.
"""

from __future__ import annotations

from evaluation.metrics.clip_score import clip_metric
from evaluation.metrics.frechet import frechet_metric
from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

COCO10K_SDXL = Protocol(
    name="coco10k-sdxl",
    metrics=(
        *photograph_metrics("inception-clean"),
        frechet_metric("patch_fid", "inception-clean@patch.pool"),
        clip_metric("clip-g14@256", "A photo depicts "),
    ),
    default=("fid", "patch_fid", "clip_cosine"),
    num_samples=10_000,
    size=512,
    recipe="torchvision-lanczos",
    reference_recipe="torchvision-lanczos",
    views={"patch": ("center-patch", 299), "256": ("torchvision-lanczos", 256)},
    reference="the 10,000 images of DMD2's coco10k, and its captions",
    reference_count=10_000,
    asks_prompts=True,
    facts={
        "clip": "open_clip ViT-g-14 laion2b_s12b_b42k at 256 pixels, prefix 'A photo depicts ', mean of raw cosines",
        "published_as": "one set of 10,000 samples; DMD2: FID 19.32 in four steps, 19.01 in one",
    },
)
