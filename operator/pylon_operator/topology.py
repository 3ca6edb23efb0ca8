"""Looks up where a node stands in the cluster, by its labels. They hardly ever change, so they are cached."""

from __future__ import annotations

import time

from pylon_operator.api import Api
from pylon_operator.api_errors import NotFound
from pylon_operator.kinds import NODES

NODE_LABELS_SECONDS = 600
"""How long a node's labels are taken as known."""


class NodeLabels:
    """Labels of nodes, asked for one node at a time: watching all nodes would cost an update per node every minute."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, tuple[float, dict[str, str]]] = {}

    async def domains(self, node: str, levels: list[str]) -> list[str]:
        """The node's value of each level, outermost first ("" where it has no such label), then the node's name."""
        labels = await self._labels(node) if levels else {}
        return [labels.get(level, "") for level in levels] + [node]

    async def _labels(self, node: str) -> dict[str, str]:
        read, labels = self._known.get(node, (float("-inf"), {}))
        if time.monotonic() - read < NODE_LABELS_SECONDS:
            return labels
        try:
            found = await self._api.request("GET", NODES.path(name=node))
        except NotFound:  # removed since the pod was bound to it
            found = {"metadata": {}}
        labels, now = found["metadata"].get("labels") or {}, time.monotonic()
        # Autoscalers bring ever new names: what would be asked for again anyway is not kept.
        self._known = {name: known for name, known in self._known.items() if now - known[0] < NODE_LABELS_SECONDS}
        self._known[node] = (now, labels)
        return labels
