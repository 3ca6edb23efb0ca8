"""What the operator remembers of an attempt's objects: one store for each kind, fed by the watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pylon_operator.api import Resource
from pylon_operator.kinds import CONFIG_MAPS, JOBS, PODS, SERVICES
from pylon_operator.observation import AttemptView, PodView
from pylon_operator.store import JobKey, Store
from pylon_operator.views import attempt_view, pod_view


class Children:
    """Pods, Jobs, and the uids of Services and ConfigMaps. `changed` is called with the job of whatever moved."""

    def __init__(self, changed: Callable[[JobKey], None]) -> None:
        self.pods: Store[PodView] = Store(pod_view, changed)
        self.jobs: Store[tuple[AttemptView, int]] = Store(attempt_view, changed)
        self.services: Store[str] = Store(_uid, changed)
        self.config_maps: Store[str] = Store(_uid, changed)
        self.by_resource: dict[Resource, Store[Any]] = {
            PODS: self.pods,
            JOBS: self.jobs,
            SERVICES: self.services,
            CONFIG_MAPS: self.config_maps,
        }


def _uid(obj: dict[str, Any]) -> str:
    return str(obj["metadata"]["uid"])
