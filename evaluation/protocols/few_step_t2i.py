"""`few-step-t2i`: a text-to-image student as people judge one. Preference and agreement with the prompt, which alone
would reward saturated images; beside them the distance to the teacher's own images of the same prompts (FID-T) and the
diversity within a prompt, which such images lose (SenseFlow, arXiv 2506.00523; DP-DMD, arXiv 2602.03139).

The reference is a folder of the teacher's images. Measure the teacher by the same protocol, prompts and seed.
"""

from __future__ import annotations

from evaluation.metrics.clip_score import clip_metric
from evaluation.metrics.diversity import feature_diversity_metric, lpips_diversity_metric
from evaluation.metrics.frechet import frechet_metric
from evaluation.metrics.preference import image_reward_metric, preference_metric
from evaluation.protocols.protocol import Protocol

FEW_STEP_T2I = Protocol(
    name="few-step-t2i",
    metrics=(
        preference_metric("hpsv2.1", "hps21"),
        preference_metric("pickscore", "pickscore"),
        image_reward_metric(),
        clip_metric("clip-l14"),
        frechet_metric("fid_t", "inception-clean.pool"),
        frechet_metric("patch_fid_t", "inception-clean@patch.pool"),
        feature_diversity_metric("diversity_dinov2", "dinov2.cls"),
        lpips_diversity_metric(),
    ),
    default=(
        "hpsv2.1",
        "pickscore",
        "imagereward",
        "clip_x100",
        "fid_t",
        "patch_fid_t",
        "diversity_dinov2",
        "lpips_diversity",
    ),
    num_samples=None,
    views={"patch": ("center-patch", 299)},
    reference="the teacher's images of the same prompts",
    asks_prompts=True,
    facts={
        "hpsv2.1": "100 times the cosine",
        "pickscore": "exp(logit_scale) times the cosine",
        "imagereward": "minus its authors' mean, over their standard deviation",
    },
)
