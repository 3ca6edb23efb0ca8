"""The chart as Helm renders it, without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
Render = Callable[..., list[Object]]


@pytest.fixture(scope="session")
def render() -> Render:
    """`render(replicas=2, ...)`: the objects of release `pylon` in namespace `pylon-system` with these values."""
    helm = pytest.importorskip("helm_python", reason="Helm's engine is packaged for Linux only")
    chart = helm.Chart.load(ROOT / "charts" / "pylon")

    def render_objects(**values: Any) -> list[Object]:
        chart.validate_schema(values)
        files = chart.render(values, name="pylon", namespace="pylon-system")
        manifests = [text for name, text in sorted(files.items()) if name.endswith(".yaml")]
        return [obj for text in manifests for obj in yaml.safe_load_all(text) if obj]

    return render_objects
