"""Which files of the project are generated from the models, and whether they are up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pylon_api.crd import render_crd
from pylon_api.reference import render_reference

FILES: dict[str, Callable[[], str]] = {
    "crds/pylon.dev_pylonjobs.yaml": render_crd,
    "charts/pylon/crds/pylon.dev_pylonjobs.yaml": render_crd,
    "docs/api.md": render_reference,
}
"""Path below the project's root, and what renders it."""


def find_stale(root: Path) -> list[str]:
    """Paths below `root` that are missing or differ from what the models say now."""
    return [path for path, render in FILES.items() if _read(root / path) != render()]


def write_files(root: Path) -> list[str]:
    """Write what is stale below `root`; the paths that changed."""
    stale = find_stale(root)
    for path in stale:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(FILES[path](), encoding="utf-8")
    return stale


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
