"""Whether spec.training.checkpoint.local.directory would still be there for the next attempt's pods.

Containers have a read-only root and pods take their own volumes along, so the directory must lie on a volume that
outlives the pod. That is a question to the merged pod, which no rule of the schema sees, and one for clusters only: a
local run uses the directory as it is.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath
from typing import Any

from pylon_api import names
from pylon_api.job import PylonJobSpec
from pylon_operator.errors import TemplateError

Object = dict[str, Any]

FIELD = "spec.training.checkpoint.local.directory"
DIE_WITH_THE_POD = frozenset(
    {"emptyDir", "ephemeral", "csi", "gitRepo", "configMap", "secret", "downwardAPI", "projected", "image"}
)
"""Sources of volumes that end with the pod (an inline csi volume does), or that cannot be written to."""


def refuse_lost_copies(spec: PylonJobSpec, batch_job: Object) -> None:
    """Raises TemplateError when checkpoints in the local directory could not be written, or would go with the pod."""
    checkpoint = spec.training.checkpoint
    if checkpoint is None or checkpoint.local is None:
        return
    directory = posixpath.normpath(checkpoint.local.directory)
    pod = batch_job["spec"]["template"]["spec"]
    # The template may have left anything out; what the API server refuses, it refuses in words of its own.
    trainer = _named(names.CONTAINER, pod.get("containers", []))
    mount = _mount_of(directory, trainer.get("volumeMounts", []))
    if mount is None:
        raise TemplateError(
            f"{FIELD}: no volume is mounted at {directory}, and the pod's own file system is read-only: "
            f"mount a hostPath or a PersistentVolumeClaim there by spec.template"
        )
    name, volume = mount.get("name"), _named(mount.get("name"), pod.get("volumes", []))
    if mount.get("readOnly") or any(isinstance(source, dict) and source.get("readOnly") for source in volume.values()):
        raise TemplateError(f"{FIELD}: the volume {name!r} at {mount['mountPath']} is mounted read-only")
    if passing := sorted(DIE_WITH_THE_POD & volume.keys()):
        raise TemplateError(
            f"{FIELD}: the volume {name!r} at {mount['mountPath']} ({passing[0]}) keeps nothing for the next "
            f"attempt: mount a hostPath or a PersistentVolumeClaim there"
        )


def _named(name: str | None, objects: list[Object]) -> Object:
    return next((one for one in objects if one.get("name") == name), {})


def _mount_of(directory: str, mounts: list[Object]) -> Object | None:
    """The innermost mount that the directory is in."""
    covering = [mount for mount in mounts if PurePosixPath(directory).is_relative_to(str(mount["mountPath"]))]
    return max(covering, key=lambda mount: len(PurePosixPath(mount["mountPath"]).parts), default=None)
