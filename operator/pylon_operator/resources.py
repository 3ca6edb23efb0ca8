"""Builds the Kubernetes objects of one attempt. Pure: same job and attempt, same objects, and nothing is looked up.

One attempt is a headless Service (stable names for the rendezvous), a ConfigMap (the run's configuration) and one
Indexed Job, all named `<job>-a<attempt>`; a Secret (the token that guards POST /checkpoint) is shared by all
attempts. All are owned by the PylonJob. The Job comes last, so that whoever sees a Job knows that the rest was
created before it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from pylon_api import names
from pylon_api.job import PylonJob, PylonJobSpec
from pylon_api.run import RunConfig
from pylon_operator.merge import merge_template

Object = dict[str, Any]

MIN_GRACE_SECONDS = 30
"""Kubernetes' own default; below it even a small save would be cut off."""
SHM_GIB = 1
SHM_GIB_PER_GPU = 2
"""NCCL and data loaders exchange through /dev/shm; container runtimes give 64 MiB. Used pages count against memory."""
USER_ID = 65532
"""The `nonroot` of distroless images: any user but root does, since the pod writes only to its own volumes."""


def attempt_name(job_name: str, attempt: int) -> str:
    """Name of the attempt's Job, Service and ConfigMap."""
    return f"{job_name}-a{attempt}"


def token_secret_name(job: PylonJob) -> str:
    """Name of the Secret that all attempts of this very job share.

    The uid is in it because the operator may not read Secrets: it could not tell its own from a leftover of an earlier
    job of the same name that is about to be collected.
    """
    return f"{job.metadata.name}-{job.metadata.uid[:8]}"


def token_for(key: bytes, uid: str) -> str:
    """The job's token, derived from the operator's key so that it never has to read a Secret back."""
    return hmac.new(key, uid.encode(), hashlib.sha256).hexdigest()


def labels_for(job: PylonJob, attempt: int) -> dict[str, str]:
    """Labels of every object of the attempt, its pods included."""
    return {
        names.LABEL_APP: names.APP,
        names.LABEL_JOB: job.metadata.name,
        names.LABEL_JOB_UID: job.metadata.uid,
        names.LABEL_ATTEMPT: str(attempt),
    }


def grace_seconds(spec: PylonJobSpec) -> int:
    """How long a pod may take to save and leave after SIGTERM; the trainer is told the same."""
    pod_spec = spec.template.get("spec")
    own = pod_spec.get("terminationGracePeriodSeconds") if isinstance(pod_spec, dict) else None
    return own if isinstance(own, int) else max(MIN_GRACE_SECONDS, spec.checkpoint_timeout_seconds)


def run_config(job: PylonJob, attempt: int) -> RunConfig:
    """What the attempt's trainers read from PYLON_CONFIG."""
    return RunConfig(
        job=job.metadata.name,
        namespace=job.metadata.namespace,
        uid=job.metadata.uid,
        attempt=attempt,
        nodes=job.spec.nodes,
        processes_per_node=job.spec.processes,
        gpus_per_node=job.spec.gpus_per_node,
        topology_levels=job.spec.topology.levels,
        failures=job.status.restarts,
        run_seconds=job.status.active_seconds,
        training=job.spec.training,
    )


def build_attempt(job: PylonJob, attempt: int, *, default_image: str, token: str) -> list[Object]:
    """All objects of an attempt in the order of their creation: Service, ConfigMap, Secret, Job.

    Raises TemplateError when spec.template cannot be merged.
    """
    config = json.dumps(run_config(job, attempt).to_wire(), indent=2, sort_keys=True)
    token_data = {names.TOKEN_FILE: base64.b64encode(token.encode()).decode()}
    template = _pod_template(job, attempt, default_image)
    return [
        _object(job, attempt, "v1", "Service", spec=_service_spec(job, attempt)),
        _object(job, attempt, "v1", "ConfigMap", immutable=True, data={names.CONFIG_FILE: config}),
        _object(
            job, attempt, "v1", "Secret", name=token_secret_name(job), immutable=True, type="Opaque", data=token_data
        ),
        _object(job, attempt, "batch/v1", "Job", spec=_job_spec(job.spec, template)),
    ]


def _object(
    job: PylonJob, attempt: int, api_version: str, kind: str, *, name: str | None = None, **content: Any
) -> Object:
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        # true would need the permission to update finalizers wherever OwnerReferencesPermissionEnforcement is on.
        "blockOwnerDeletion": False,
    }
    metadata = {
        "name": name or attempt_name(job.metadata.name, attempt),
        "namespace": job.metadata.namespace,
        "labels": labels_for(job, attempt),
        "ownerReferences": [owner],
    }
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **content}


def _service_spec(job: PylonJob, attempt: int) -> Object:
    return {
        "clusterIP": "None",
        # The rendezvous needs the names before any pod can be ready.
        "publishNotReadyAddresses": True,
        "selector": {names.LABEL_JOB_UID: job.metadata.uid, names.LABEL_ATTEMPT: str(attempt)},
        "ports": [
            {"name": "rendezvous", "port": names.PORT_RENDEZVOUS, "protocol": "TCP"},
            {"name": "status", "port": names.PORT_STATUS, "protocol": "TCP"},
        ],
    }


def _job_spec(spec: PylonJobSpec, template: Object) -> Object:
    return {
        "completionMode": "Indexed",
        "parallelism": spec.nodes,
        "completions": spec.nodes,
        # A gang stands and falls together: the Job never replaces one pod, the operator starts the next attempt.
        "backoffLimit": 0,
        # A terminating pod still holds its GPUs and its place in the gang.
        "podReplacementPolicy": "Failed",
        "template": template,
    }


def _pod_template(job: PylonJob, attempt: int, default_image: str) -> Object:
    """Generated template, then the user's over it, then what the fencing and the rendezvous rest on over both."""
    fixed = {
        "metadata": {"labels": labels_for(job, attempt)},
        "spec": {"restartPolicy": "Never", "subdomain": attempt_name(job.metadata.name, attempt)},
    }
    # Sidecars may stand first; `kubectl logs` and `exec` should mean the trainer all the same.
    annotations = {"kubectl.kubernetes.io/default-container": names.CONTAINER}
    generated = {"metadata": {"annotations": annotations}, "spec": _pod_spec(job, attempt, default_image)}
    return merge_template(merge_template(generated, job.spec.template), fixed)


def _pod_spec(job: PylonJob, attempt: int, default_image: str) -> Object:
    spec = job.spec
    name = attempt_name(job.metadata.name, attempt)
    shm_gib = SHM_GIB + SHM_GIB_PER_GPU * spec.gpus_per_node
    token_secret = token_secret_name(job)
    priority = spec.scheduling.priority_class_name
    topology = {
        "path": names.TOPOLOGY_FILE,
        "fieldRef": {"fieldPath": f"metadata.annotations['{names.ANNOTATION_TOPOLOGY}']"},
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds(spec),
        **({"priorityClassName": priority} if priority else {}),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, name, spec.image or default_image)],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {"name": "token", "secret": {"secretName": token_secret}},
            # A volume, because env is fixed before the operator knows the node; never a subPath, which is not updated.
            {"name": "topology", "downwardAPI": {"items": [topology]}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }


def _container(spec: PylonJobSpec, name: str, image: str) -> Object:
    gpus = {"resources": {"limits": {spec.gpu_resource_name: str(spec.gpus_per_node)}}}
    return {
        "name": names.CONTAINER,
        "image": image,
        "command": ["python", "-m", "pylon_trainer.launcher"],
        "env": _environment(spec, name),
        "ports": [
            {"name": "rendezvous", "containerPort": names.PORT_RENDEZVOUS, "protocol": "TCP"},
            {"name": "status", "containerPort": names.PORT_STATUS, "protocol": "TCP"},
        ],
        **(gpus if spec.gpus_per_node else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_MESSAGE_PATH,
        # A process that dies before it can explain itself (bad image, import error) still leaves its last words.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": names.CONFIG_DIRECTORY, "readOnly": True},
            {"name": "token", "mountPath": names.TOKEN_DIRECTORY, "readOnly": True},
            {"name": "topology", "mountPath": names.TOPOLOGY_DIRECTORY, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "scratch", "mountPath": names.SCRATCH_DIRECTORY},
        ],
    }


def _environment(spec: PylonJobSpec, name: str) -> list[Object]:
    """torchrun's own variables for a static rendezvous at pod 0, then ours."""
    values = {
        "PET_NNODES": str(spec.nodes),
        "PET_NPROC_PER_NODE": str(spec.processes),
        # An Indexed Job's pods are called <job>-<index>; the subdomain is the Service of the same name.
        "PET_MASTER_ADDR": f"{name}-0.{name}",
        "PET_MASTER_PORT": str(names.PORT_RENDEZVOUS),
        names.ENV_CONFIG: names.CONFIG_PATH,
        names.ENV_TOKEN_FILE: f"{names.TOKEN_DIRECTORY}/{names.TOKEN_FILE}",
        names.ENV_TOPOLOGY_FILE: f"{names.TOPOLOGY_DIRECTORY}/{names.TOPOLOGY_FILE}",
        names.ENV_STATUS_HOST: "0.0.0.0",  # noqa: S104  the operator polls it from outside of the pod
        names.ENV_STATUS_PORT: str(names.PORT_STATUS),
        names.ENV_SCRATCH: names.SCRATCH_DIRECTORY,
        names.ENV_TERMINATION_LOG: names.TERMINATION_MESSAGE_PATH,
        names.ENV_GRACE_SECONDS: str(grace_seconds(spec)),
        # Compilers and libraries cache in these; the root file system is read-only.
        "HOME": names.SCRATCH_DIRECTORY,
        "TMPDIR": names.SCRATCH_DIRECTORY,
    }
    rank = {"fieldRef": {"fieldPath": f"metadata.labels['{names.LABEL_COMPLETION_INDEX}']"}}
    return [
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        *({"name": key, "value": value} for key, value in values.items()),
    ]
