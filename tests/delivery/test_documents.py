"""What the documents show to a reader is there and works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pylon_api import names
from pylon_api.manifest import load_manifest, parse_job

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "charts/pylon/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_jobs_are_valid(page: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    for document in (document for block in blocks for document in yaml.safe_load_all(block)):
        if document.get("kind") == names.KIND:
            parse_job(document)


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(example: Path) -> None:
    load_manifest(example)


def test_every_variable_of_ours_is_explained() -> None:
    sources = [
        path for folder in ("crds", "operator", "trainer", "tests/cluster") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    named = {name for path in sources for name in re.findall(r'"(PYLON_[A-Z_]+)"', path.read_text())}
    assert len(named) > 8
    explained = set(re.findall(r"`(PYLON_[A-Z_]+)`", (ROOT / "docs" / "development.md").read_text()))
    assert named == explained


def test_commands_of_the_readme_are_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"^make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets
