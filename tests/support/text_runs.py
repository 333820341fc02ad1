"""Settings of short runs of text-to-image teachers."""

from __future__ import annotations

from typing import Any

PROMPTS = ["a cat", "a dog on a mat", "the moon", "an old house"]


SETTINGS: dict[str, Any] = {
    "data": "teacher-samples",
    "teacher_samples.count": 8,
    "teacher_samples.num_steps": 2,
    "guidance_scale": 2.0,
    "condition_dropout": 0.25,
    "batch_size": 4,
    "iterations": 5,
    "critic_steps": 1,
    "student_level": None,
    "generator.lr": 1e-3,
    "log.tracker": "none",
    "log.samples_every": 0,
    "log.checkpoint_every": 0,
}


LORA: dict[str, Any] = {
    "student.lora_rank": 4,
    "student.lora_targets": ["to_q", "to_k", "to_v", "to_out.0"],
    "fake_score.lora_rank": 4,
    "fake_score.lora_alpha": 8.0,
    "gradient_checkpointing": True,
}
