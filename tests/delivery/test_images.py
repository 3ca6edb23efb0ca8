"""What the Dockerfiles promise, as far as that can be read without a container engine. `make images` builds them."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from pylon_operator.resources import USER_ID

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "images").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """(INSTRUCTION, arguments) in order, with comments dropped and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last_stage(path: Path) -> list[Instruction]:
    found = instructions(path)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


pytestmark = pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)


def test_base_is_pinned(image: Path) -> None:
    bases = [arguments for word, arguments in instructions(image) if word == "ARG" and arguments.startswith("BASE=")]
    assert len(bases) == 1
    tag = bases[0].rpartition(":")[2]
    assert re.match(r"\d+\.\d+\.\d+", tag), "a tag with the full version, never latest"
    assert {arguments.split()[0] for word, arguments in instructions(image) if word == "FROM"} == {"${BASE}"}


def test_runs_as_nobody(image: Path) -> None:
    stage = last_stage(image)
    users = [arguments for word, arguments in stage if word == "USER"]
    assert users == [f"{USER_ID}:{USER_ID}"]
    assert "RUN" not in [word for word, _ in stage[stage.index(("USER", users[0])) :]]


def test_what_is_copied_exists_and_is_not_ignored(image: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[1] == "*"
    for word, arguments in instructions(image):
        if word != "COPY" or arguments.startswith("--from"):
            continue
        *sources, _ = arguments.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is in .dockerignore"


def test_holds_every_package_that_the_build_needs(image: Path) -> None:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = {source for word, rest in instructions(image) if word == "COPY" for source in rest.split()[:-1]}
    assert {*tree, "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_no_installer_is_left(image: Path) -> None:
    commands = [arguments for word, arguments in last_stage(image) if word == "RUN"]
    assert any("pip uninstall --yes pip" in command for command in commands)
    assert not any("pip install" in command for command in commands)


def test_version_is_the_projects(image: Path) -> None:
    assert ("ARG", f"VERSION={PROJECT['version']}") in last_stage(image)
    labels = next(arguments for word, arguments in last_stage(image) if word == "LABEL")
    assert 'licenses="Apache-2.0"' in labels


def test_torch_is_in_the_trainer_alone(image: Path) -> None:
    extras = set(re.findall(r"\[([a-z,]+)\]|EXTRAS=([a-z0-9,]+)", image.read_text()))
    chosen = {extra for group in extras for names in group for extra in names.split(",") if extra}
    needs_torch = any(need.startswith("torch") for extra in chosen for need in PROJECT["optional-dependencies"][extra])
    assert needs_torch == (image.stem == "trainer")
