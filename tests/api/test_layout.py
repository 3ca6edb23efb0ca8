"""What must hold for the three packages to be installed apart. `make check` runs import-linter for the rest."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

ALLOWED = ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "yaml")

IMPORT_ALL = """
import importlib, pkgutil, pylon_api
for module in pkgutil.iter_modules(pylon_api.__path__):
    importlib.import_module(f"pylon_api.{module.name}")
    print(module.name)
"""


def test_contract_imports_only_pydantic_and_yaml(tmp_path: Path) -> None:
    """In a Python that has nothing else installed."""
    for name in ALLOWED:
        origin = Path(str(importlib.import_module(name).__file__))
        target = origin.parent if origin.stem == "__init__" else origin
        (tmp_path / target.name).symlink_to(target)
    done = subprocess.run(
        [sys.executable, "-S", "-c", IMPORT_ALL],
        env={"PYTHONPATH": f"{ROOT / 'crds'}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {"job", "training", "run", "crd"} <= set(done.stdout.split())


def test_operator_folder_is_no_package() -> None:
    """It would shadow the standard library's `operator` for every Python started at the root."""
    assert not (ROOT / "operator" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import operator; print(operator.__name__, operator.add(1, 1))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["operator", "2"], done.stderr


def test_test_folders_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
