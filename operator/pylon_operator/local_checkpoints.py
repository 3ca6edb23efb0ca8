"""Whether spec.training.checkpoint.local.directory would still be there for the next attempt's pods.

Containers have a read-only root and pods take their own volumes along, so the directory must lie on a volume that
outlives the pod. That is a question to the merged pod, which no rule of the schema sees, and one for clusters only: a
local run uses the directory as it is.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from pylon_api import names
from pylon_api.job import PylonJobSpec
from pylon_operator.errors import TemplateError

Object = dict[str, Any]

FIELD = "spec.training.checkpoint.local.directory"
DIE_WITH_THE_POD = frozenset(
    {"emptyDir", "ephemeral", "csi", "configMap", "secret", "downwardAPI", "projected", "image"}
)
"""Sources of volumes that end with the pod (an inline csi volume does), or that cannot be written to."""


def refuse_lost_copies(spec: PylonJobSpec, batch_job: Object) -> None:
    """Raises TemplateError when checkpoints in the local directory could not be written, or would go with the pod."""
    checkpoint = spec.training.checkpoint
    if checkpoint is None or checkpoint.local is None:
        return
    directory = checkpoint.local.directory
    pod = batch_job["spec"]["template"]["spec"]
    trainer = next(container for container in pod["containers"] if container["name"] == names.CONTAINER)
    mount = _mount_of(directory, trainer.get("volumeMounts", []))
    if mount is None:
        raise TemplateError(
            f"{FIELD}: no volume is mounted at {directory}, and the pod's own file system is read-only: "
            f"mount a hostPath or a PersistentVolumeClaim there by spec.template"
        )
    if mount.get("readOnly"):
        raise TemplateError(f"{FIELD}: the volume {mount['name']!r} at {mount['mountPath']} is mounted read-only")
    volume: Object = next((volume for volume in pod.get("volumes", []) if volume["name"] == mount["name"]), {})
    if passing := sorted(DIE_WITH_THE_POD & volume.keys()):
        raise TemplateError(
            f"{FIELD}: the volume {mount['name']!r} at {mount['mountPath']} ({passing[0]}) keeps nothing for the next "
            f"attempt: mount a hostPath or a PersistentVolumeClaim there"
        )


def _mount_of(directory: str, mounts: list[Object]) -> Object | None:
    """The innermost mount that the directory is in."""
    covering = [mount for mount in mounts if PurePosixPath(directory).is_relative_to(mount["mountPath"])]
    return max(covering, key=lambda mount: len(PurePosixPath(mount["mountPath"]).parts), default=None)
