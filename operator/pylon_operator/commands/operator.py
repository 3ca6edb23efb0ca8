"""`pylon operator`: runs the operator in the foreground."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

import click

from pylon_operator.logs import LogFormat, configure_logs
from pylon_operator.serve import Options, default_namespace, serve


@click.command("operator")
@click.option(
    "--kubeconfig",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Cluster to work on. Default: the pod's service account, else $KUBECONFIG or ~/.kube/config.",
)
@click.option("--namespace", "namespaces", multiple=True, help="Serve only this namespace; repeatable. Default: all.")
@click.option("--image", required=True, help="Trainer image of jobs that name none.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: off.")
@click.option("--health-port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="0: off.")
@click.option(
    "--lease-namespace",
    default=default_namespace,
    help="Namespace of the Lease and of the token key. Default: $POD_NAMESPACE, else the pod's own, else `default`.",
)
@click.option("--no-lease", is_flag=True, help="Do not elect a leader: only for a single operator, for development.")
@click.option(
    "--poll-seconds",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Time between two questions to rank 0 of a running job.",
)
@click.option(
    "--token-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Key that job tokens are derived from. Default: a Secret in the lease's namespace, made if missing.",
)
@click.option("--log-format", type=click.Choice(["json", "text"]), default="text", show_default=True)
def operator_command(
    kubeconfig: Path | None,
    namespaces: tuple[str, ...],
    image: str,
    metrics_port: int,
    health_port: int,
    lease_namespace: str,
    no_lease: bool,
    poll_seconds: float,
    token_key_file: Path | None,
    log_format: str,
) -> None:
    """Run the operator until SIGTERM.

    Exit codes: 0 stopped, 69 API server unreachable, 75 lease lost, 77 permission missing, 78 CRD missing or bad
    option.
    """
    configure_logs(cast(LogFormat, log_format))
    options = Options(
        kubeconfig=kubeconfig,
        namespaces=namespaces,
        image=image,
        health_port=health_port,
        metrics_port=metrics_port,
        own_namespace=lease_namespace,
        use_lease=not no_lease,
        poll_seconds=poll_seconds,
        token_key_file=token_key_file,
    )
    sys.exit(asyncio.run(serve(options)))


command = operator_command

if __name__ == "__main__":
    operator_command()
