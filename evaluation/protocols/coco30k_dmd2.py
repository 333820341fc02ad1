"""`coco30k-dmd2`: one sample for each of 30,000 captions of COCO 2014, against all images of val2014, as DMD2 measures
its students of Stable Diffusion (Yin et al. 2024, arXiv 2405.14867). Both sides are cropped to the central square and
resized to 256 pixels with LANCZOS; Inception sees them after clean-fid's resize, and CLIP sees the 256 pixels.

DMD2 truncates the pixels of samples to whole numbers, lets networks use TF32, and seeds noise by batch. Here samples
are rounded, computed in float32 and seeded by image. Evaluations that compare with the 30,000 images of the captions,
and not with all of val2014, give other numbers.
"""

from __future__ import annotations

from evaluation.metrics.clip_score import clip_metric
from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

COCO30K_DMD2 = Protocol(
    name="coco30k-dmd2",
    metrics=(*photograph_metrics("inception-clean"), clip_metric("clip-g14", "A photo depicts ")),
    default=("fid", "clip_cosine"),
    num_samples=30_000,
    size=256,
    recipe="torchvision-lanczos",
    reference_recipe="torchvision-lanczos",
    reference="all 40,504 images of COCO's val2014, and 30,000 captions of them",
    reference_count=40_504,
    asks_prompts=True,
    facts={
        "clip": "open_clip ViT-g-14 laion2b_s12b_b42k, prefix 'A photo depicts ', mean of raw cosines",
        "published_as": "one set of 30,000 samples",
        "teachers": "Stable Diffusion 1.5 with 50 steps at guidance 3: FID 8.59, CLIP 0.308",
    },
)
