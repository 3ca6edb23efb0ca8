"""Finds the API server and proves who we are, by the `kubernetes` package's own loaders.

They know kubeconfig's many forms (exec plugins, inline certificates, token files) and re-read what expires. Nothing
else of that package is used while the operator runs: its generated clients cost several times the CPU.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from kubernetes.client import Configuration
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config


class CredentialsError(Exception):
    """No usable way to the API server; the message is one line that names the fix."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where the API server is, whom to trust and who we are."""

    configuration: Configuration

    @property
    def server(self) -> str:
        """URL without a trailing slash."""
        return str(self.configuration.host).rstrip("/")

    def authorization(self) -> str | None:
        """The Authorization header, or None with client certificates. Re-reads a token that has expired."""
        bearer = self.configuration.auth_settings().get("BearerToken")
        if bearer is not None:
            return str(bearer["value"])
        if self.configuration.username:
            return str(self.configuration.get_basic_auth_token())
        return None

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS trust and client certificate, or None for plain http."""
        if self.server.startswith("http://"):
            return None
        context = ssl.create_default_context(cafile=self.configuration.ssl_ca_cert)
        if not self.configuration.verify_ssl:  # the user's own insecure-skip-tls-verify
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.configuration.cert_file:
            context.load_cert_chain(self.configuration.cert_file, self.configuration.key_file)
        return context


def load_credentials(kubeconfig: Path | None = None) -> Credentials:
    """From `kubeconfig` if given, else the pod's service account, else $KUBECONFIG or ~/.kube/config.

    Raises CredentialsError.
    """
    configuration = Configuration()
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            path = str(kubeconfig) if kubeconfig else None
            load_kube_config(  # type: ignore[no-untyped-call]
                config_file=path, client_configuration=configuration, persist_config=False
            )
    except (ConfigException, OSError) as error:
        reason = " ".join(str(error).split())
        raise CredentialsError(f"no way to a cluster: {reason}; give --kubeconfig or set KUBECONFIG") from error
    return Credentials(configuration)
