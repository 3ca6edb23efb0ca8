"""Runs the pods of training jobs on emulated nodes with the code behind `pylon run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from api import Object
from servers import free_port

from pylon_api import names
from pylon_operator.local.pods import PodProcess
from pylon_operator.local.pods import PodRunner as ProcessRunner


@dataclass
class GangRunner:
    """Each gang gets a rendezvous port of its own, because TCPStore listens on every address of the machine."""

    processes: ProcessRunner
    _ports: dict[str, int] = field(default_factory=dict)

    def start(
        self,
        pod: Object,
        *,
        config_maps: Mapping[str, Object],
        secrets: Mapping[str, Object],
        address: str,
        hosts: Mapping[str, str],
    ) -> PodProcess:
        gang = pod["metadata"]["labels"][names.LABEL_BATCH_JOB_UID]
        port = self._ports.setdefault(gang, free_port())
        return self.processes.start(
            pod,
            config_maps=config_maps,
            secrets=secrets,
            address=address,
            hosts=hosts,
            ports={names.PORT_RENDEZVOUS: port},
        )
