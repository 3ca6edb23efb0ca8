"""A Kubernetes control plane on loopback that lives as long as its owner: for tests, and by hand with `up`.

It is the real etcd, API server, controller manager and scheduler with RBAC on. It has no kubelet; `nodes.py`
stands in for that. Nothing is reachable from other machines or readable by other users: etcd listens on a
socket in a private directory, the API server on 127.0.0.1 with TLS and tokens.

    python tests/cluster/control_plane.py build    find or build the programs
    python tests/cluster/control_plane.py up       run one until Ctrl-C; prints its KUBECONFIG
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from programs import ProgramsError, build, find_kubectl, find_programs
from servers import Servers, StartError, free_port

# Sockets in the working directory; etcd insists on the form host:port.
ETCD, ETCD_PEER = "unix://etcd:0", "unix://etcd-peer:0"

# A dead node must be noticed within a test's patience; nodes.py renews its leases every two seconds.
NODE_GRACE_SECONDS = 12


class KubectlError(RuntimeError):
    """kubectl left with an error; the message is the command and what kubectl said."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that can be talked to: ours, or any other by its kubeconfig."""

    kubeconfig: Path
    kubectl_command: tuple[str, ...]
    is_emulated: bool  # pods run only through nodes.py

    def kubectl(self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """What `kubectl ARGUMENTS` prints; raises `KubectlError` with what it said when it fails."""
        command = [*self.kubectl_command, "--kubeconfig", str(kubeconfig or self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def kubeconfig_for(self, namespace: str, service_account: str, path: Path) -> Path:
        """Writes to `path` a kubeconfig that acts as this ServiceAccount, by a token of one hour."""
        token = self.kubectl("create", "token", service_account, "--namespace", namespace, "--duration", "1h")
        view = json.loads(self.kubectl("config", "view", "--minify", "--flatten", "--raw", "--output", "json"))
        return write_kubeconfig(path, view["clusters"][0]["cluster"], token.strip(), namespace)


def write_kubeconfig(path: Path, cluster: dict[str, Any], token: str, namespace: str = "default") -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
    }
    _write_private(path, yaml.safe_dump(config))
    return path


def existing_cluster(kubeconfig: Path) -> Cluster:
    """A cluster that somebody else runs, kind included."""
    return Cluster(kubeconfig, find_kubectl(), is_emulated=False)


@contextmanager
def control_plane() -> Iterator[Cluster]:
    """A fresh control plane, ready; gone with all that it wrote when the block ends or this process dies."""
    programs = find_programs()
    with Servers(programs) as servers:
        directory = servers.directory
        token, url = secrets.token_hex(32), f"https://127.0.0.1:{free_port()}"
        certificate = directory / "certificates" / "apiserver.crt"
        _write_private(directory / "tokens.csv", f'{token},admin,admin,"system:masters"\n')

        servers.start("etcd", *_etcd_flags(directory))
        servers.start("kube-apiserver", *_apiserver_flags(directory, url))
        servers.wait_until(lambda: _answers(f"{url}/readyz", token, certificate))

        server = {"server": url, "certificate-authority": str(certificate)}
        kubeconfig = write_kubeconfig(directory / "kubeconfig", server, token)
        servers.start("kube-controller-manager", *_controller_flags(directory))
        servers.start("kube-scheduler", *_scheduler_flags(directory))
        # The first thing that shows controllers at work, and what every pod needs.
        account = f"{url}/api/v1/namespaces/default/serviceaccounts/default"
        servers.wait_until(lambda: _answers(account, token, certificate))
        yield Cluster(kubeconfig, programs["kubectl"], is_emulated=True)


def _etcd_flags(directory: Path) -> list[str]:
    return [
        f"--data-dir={directory}/etcd",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        f"--listen-peer-urls={ETCD_PEER}",
        f"--initial-advertise-peer-urls={ETCD_PEER}",
        f"--initial-cluster=default={ETCD_PEER}",
        "--unsafe-no-fsync",  # nothing here outlives the process
        "--log-level=warn",
    ]


def _apiserver_flags(directory: Path, url: str) -> list[str]:
    certificates = directory / "certificates"
    # The server makes its serving certificate there at its start; the key also signs ServiceAccount tokens.
    return [
        f"--cert-dir={certificates}",
        f"--service-account-key-file={certificates}/apiserver.key",
        f"--service-account-signing-key-file={certificates}/apiserver.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--etcd-servers={ETCD}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",  # endpoints may not be loopback addresses
        f"--secure-port={urlsplit(url).port}",
        f"--token-auth-file={directory}/tokens.csv",
        "--anonymous-auth=false",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--allow-privileged=true",
        "--profiling=false",
    ]


def _controller_flags(directory: Path) -> list[str]:
    return [
        *_client_flags(directory),
        f"--service-account-private-key-file={directory}/certificates/apiserver.key",
        f"--root-ca-file={directory}/certificates/apiserver.crt",
        "--concurrent-job-syncs=20",
        f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
        "--node-monitor-period=1s",
        "--node-eviction-rate=10",
        "--profiling=false",
    ]


def _scheduler_flags(directory: Path) -> list[str]:
    return [*_client_flags(directory), "--profiling=false"]


def _client_flags(directory: Path) -> list[str]:
    return [
        f"--kubeconfig={directory}/kubeconfig",
        "--leader-elect=false",
        "--secure-port=0",
        # With the default of 20 requests a second the Job controller makes 16 pods a second.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
    ]


def _answers(url: str, token: str, certificate: Path) -> bool:
    if not certificate.exists():
        return False
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        with urllib.request.urlopen(request, context=context, timeout=5):
            return True
    except OSError:  # refused, not yet ready, or not yet there
        return False


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _run_in_foreground() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    started = time.monotonic()
    with control_plane() as cluster:
        print(f"KUBECONFIG={cluster.kubeconfig}", flush=True)
        print(
            f"Ready after {time.monotonic() - started:.1f} s; Ctrl-C stops it. "
            f"kubectl: {' '.join(cluster.kubectl_command)}",
            file=sys.stderr,
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            signal.pause()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Kubernetes control plane for tests and development.")
    parser.add_argument("command", choices=["build", "up"])
    try:
        if parser.parse_args().command == "build":
            print(build())
        else:
            _run_in_foreground()
    except (ProgramsError, StartError) as error:
        sys.exit(f"control plane: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


if __name__ == "__main__":
    main()
