"""Imports go downward or sideways, never up and never in a cycle; evaluation is called from two files alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"base.errors", "base.files", "config.schema", "config.sections", "ema_profiles", "methods", "assets"},
    {"noise", "divergence", "base.rng", "base.distributed", "base.images", "generation.maker", "formats.unpickle"},
    {"kernels"},
    {
        "training.activation_checkpointing",
        "condition",
        "denoiser",
        "guidance",
        "generator",
        "discriminator",
        "ratio",
        "losses",
        "ema",
        "sampler",
        "networks",
    },
    {
        "adapters",
        "teachers.autoencoder",
        "students.one_step_pipeline",
        "students.lora",
        "formats.lora_file",
        "students.model_card",
        "training.clip_loss",
        "formats.comfy",
        "formats.pipeline_folder",
        "students.export",
        "formats.single_file",
        "teachers.teacher",
        "formats.merged_lora",
        "teachers.text_encoders",
        "students.text_to_image",
        "students.tiue",
        "students.tiue_pipeline",
        "step",
        "data",
        "training.checkpoint",
        "students.folder",
        "generation.network_maker",
        "generation.pipeline_maker",
        "generation.diffusers_pipeline",
        "training.snapshots",
        "teachers.convert",
        "teachers.convert_dit",
        "base.devices",
    },
    {
        "training.build",
        "training.updates",
        "commands.dry_run",
        "training.prompts",
        "training.sample_grids",
        "training.inputs",
        "training.journal",
        "training.curves",
        "generation.generate",
        "commands.inspect",
        "training.cache",
        "commands.ema",
        "commands.smoke",
        "commands.tiny_pipelines",
        "training.loop",
        "commands.cli",
        "commands.evaluation",
        "commands.options",
        "__init__",
        "__main__",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere in it, TYPE_CHECKING blocks apart."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted((ROOT / "fdistill").rglob("*.py"))
NAMES = {module_name(path): path for path in FILES}


def unit(module: str) -> str:
    """fdistill.kernels.reference.matching -> kernels, fdistill.base.files -> base.files: the thing that has a layer."""
    parts = module.split(".")[1:]
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LEVEL), "__init__")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downward(path: Path) -> None:
    own = unit(module_name(path))
    assert own in LEVEL, f"{path} has no layer: name it in LAYERS"
    for imported in imports(path) & NAMES.keys():
        other = unit(imported)
        if other in (own, "__init__"):
            continue
        assert LEVEL[other] <= LEVEL[own], f"{own} (layer {LEVEL[own]}) imports {other} (layer {LEVEL[other]})"


def test_there_is_no_import_cycle() -> None:
    every = NAMES | {module_name(path): path for path in sorted((ROOT / "evaluation").rglob("*.py"))}
    graph = {name: (imports(path) & every.keys()) - {name, "fdistill", "evaluation"} for name, path in every.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_command_line_and_the_loop_call_evaluation() -> None:
    callers = {module_name(p) for p in FILES if any(name.split(".")[0] == "evaluation" for name in imports(p))}
    assert callers <= {"fdistill.commands.evaluation", "fdistill.training.loop"}


@pytest.mark.parametrize(
    "name", [f"fdistill.{unit}" for unit in ("config.schema", "methods", "base.errors", "base.files", "commands.cli")]
)
def test_config_errors_and_command_line_import_without_torch(name: str) -> None:
    code = f"import sys, {name}\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
