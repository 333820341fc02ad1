"""Files that people and programs expect at the top of a project: citation, changelog, container, CI and issue forms."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import fdistill

ROOT = Path(__file__).parent.parent


def read(name: str) -> Any:
    return YAML(typ="safe").load(ROOT / name)


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction of the Dockerfile, with its further lines."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_citation_has_what_its_format_asks_for() -> None:
    """CFF 1.2.0: the four required keys, values of enumerated keys, and nothing that the format does not know."""
    found = read("CITATION.cff")
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= found.keys()
    assert found.keys() <= {
        *("cff-version", "message", "title", "abstract", "type", "version", "license", "authors", "keywords"),
        "references",
    }
    assert found["type"] == "software"
    assert found["version"] == fdistill.__version__
    assert found["license"] == "Apache-2.0"
    (paper,) = found["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2502.15681"}]
    for author in [*found["authors"], *paper["authors"]]:
        assert author.keys() in ({"name"}, {"family-names", "given-names"})


def test_the_version_is_semantic_and_the_changelog_names_it() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fdistill.__version__)
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert fdistill.__version__ in headings[1:2] or f"This will be {fdistill.__version__}" in text


def test_the_container_copies_what_is_there_and_runs_the_command_as_a_plain_user() -> None:
    words = [word for word, _ in instructions()]
    assert words[:2] == ["ARG", "FROM"]
    assert set(words) <= {"ARG", "FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    sources = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    unignored = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"fdistill", "evaluation", "configs", "pyproject.toml"} <= set(sources) == unignored
    assert all((ROOT / name).exists() for name in sources)
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert ("USER", "fdistill") in instructions()
    assert ("ENTRYPOINT", '["fdistill"]') in instructions()


@pytest.mark.parametrize(("word", "rest"), [found for found in instructions() if found[0] == "RUN"])
def test_the_containers_commands_are_shell(word: str, rest: str) -> None:
    subprocess.run(["sh", "-n", "-c", rest], check=True)
    assert shlex.split(rest)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = {job: [step["run"] for step in facts["steps"] if "run" in step] for job, facts in jobs.items()}
    assert commands["day"][0] == "bash scripts/test.sh"
    assert "tests/report tests/commands/test_demo.py" in commands["day"][1]
    assert jobs["day"]["steps"][-1]["env"] == {"FDISTILL_BROWSER": "1"}
    assert commands["night"][0] == 'bash scripts/test.sh -m ""'
    assert commands["packages"] == ["bash scripts/check_packages.sh"]
    for command in (command for listed in commands.values() for command in listed):
        for path in re.findall(r"(?:scripts|tests)/[\w./]+", command):
            assert (ROOT / path).exists()


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_have_what_forms_need(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    assert len({item["id"] for item in form["body"]}) == len(form["body"])
    assert all(item["type"] == "textarea" and item["attributes"]["label"] for item in form["body"])


def test_a_bug_report_says_on_what_it_was_seen() -> None:
    form = read(".github/ISSUE_TEMPLATE/bug_report.yml")
    (environment,) = (item for item in form["body"] if item["id"] == "environment")
    assert "fdistill --version" in environment["attributes"]["description"]
