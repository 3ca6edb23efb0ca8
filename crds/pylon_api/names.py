"""Every name that two programs, or a program and a person, must agree on.

Nothing here decides anything: labels, paths, ports, exit codes, condition types and reasons, each defined once.
"""

from __future__ import annotations

import enum

GROUP = "pylon.dev"
VERSION = "v1alpha1"
KIND = "PylonJob"
PLURAL = "pylonjobs"
API_VERSION = f"{GROUP}/{VERSION}"

FIELD_MANAGER = "pylon-operator"
MANAGED_BY = f"{GROUP}/operator"
"""`spec.managedBy` of the jobs that this operator acts on (the default); any other value names another controller."""

# Labels on every child object and pod.
LABEL_JOB = f"{GROUP}/job"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_APP = "app.kubernetes.io/managed-by"
APP = "pylon"

# Kubernetes' own, set by the Job controller on pods of an Indexed Job.
LABEL_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
LABEL_BATCH_JOB = "batch.kubernetes.io/job-name"
LABEL_BATCH_JOB_UID = "batch.kubernetes.io/controller-uid"

ANNOTATION_TOPOLOGY = f"{GROUP}/topology"
"""JSON list of the pod's topology domains, outermost first; set by the operator once the pod has a node."""

MAX_JOB_NAME_LENGTH = 52
"""A pod's hostname is `<name>-a<attempt>-<index>` and must fit a 63-character DNS label: 52 leaves room for both."""
JOB_NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""A job's Service is named after it, so the name is a DNS label that starts with a letter (RFC 1035)."""

CONTAINER = "trainer"
PORT_RENDEZVOUS = 29400
PORT_STATUS = 9400

CONFIG_DIRECTORY = "/etc/pylon/config"
CONFIG_FILE = "run.json"
CONFIG_PATH = f"{CONFIG_DIRECTORY}/{CONFIG_FILE}"
TOKEN_DIRECTORY = "/etc/pylon/token"  # noqa: S105  a path, not a token
TOKEN_FILE = "token"  # noqa: S105
TOPOLOGY_DIRECTORY = "/etc/pylon/topology"
TOPOLOGY_FILE = "topology"
SCRATCH_DIRECTORY = "/tmp/pylon"  # noqa: S108  an emptyDir of the pod's own
TERMINATION_MESSAGE_PATH = "/dev/termination-log"

# Environment of the trainer's container, beside torchrun's own PET_*.
ENV_CONFIG = "PYLON_CONFIG"
ENV_TOKEN_FILE = "PYLON_TOKEN_FILE"  # noqa: S105
ENV_STATUS_HOST = "PYLON_STATUS_HOST"
ENV_STATUS_PORT = "PYLON_STATUS_PORT"
ENV_SCRATCH = "PYLON_SCRATCH"
ENV_TERMINATION_LOG = "PYLON_TERMINATION_LOG"
ENV_GRACE_SECONDS = "PYLON_GRACE_SECONDS"
ENV_TOPOLOGY_FILE = "PYLON_TOPOLOGY_FILE"
ENV_COLLECTIVE_TIMEOUT_SECONDS = "PYLON_COLLECTIVE_TIMEOUT_SECONDS"


class ExitCode(enum.IntEnum):
    """How a trainer's pod ends. Numbers follow sysexits(3) where one fits, and stay clear of 1, 2 and 128 + signal."""

    SUCCEEDED = 0
    BAD_DATA = 65
    """The data cannot be read or is empty; a restart would meet the same data."""
    INTERNAL = 70
    """A worker raised something nobody foresaw; worth a restart."""
    OUT_OF_MEMORY = 71
    """The device ran out of memory."""
    STORAGE = 74
    """A store or disk refused a write or a read after retries; worth a restart."""
    STOPPED = 75
    """Asked to stop (SIGTERM): saved at an agreed step, and left."""
    PEER_LOST = 76
    """A peer died or fell silent: left at once, so that the gang can restart."""
    BAD_CONFIG = 78
    """The configuration cannot work; a restart would not help."""

    @property
    def reason(self) -> str:
        """The name in CamelCase, as conditions and failure records have it."""
        return "".join(word.capitalize() for word in self.name.split("_"))


USER_ERRORS = frozenset({ExitCode.BAD_CONFIG, ExitCode.BAD_DATA})
"""Fail the job at once with the trainer's own message: only a person can mend them."""

SECONDARY = frozenset({ExitCode.PEER_LOST, ExitCode.STOPPED})
"""Consequences, not causes: never the exit that explains an attempt while another is at hand."""


class ConditionType(enum.StrEnum):
    SUSPENDED = "Suspended"
    PODS_READY = "PodsReady"
    RUNNING = "Running"
    CHECKPOINT_READY = "CheckpointReady"
    SUCCEEDED = "Succeeded"


class Reason(enum.StrEnum):
    """Reasons of conditions and events, each in CamelCase as Kubernetes has it."""

    # Running
    CREATED = "Created"
    WAITING_FOR_PODS = "WaitingForPods"
    TRAINING = "Training"
    RESTARTING = "Restarting"
    BACKING_OFF = "BackingOff"
    SAVING_BEFORE_SUSPEND = "SavingBeforeSuspend"
    STOPPING = "Stopping"
    # Suspended
    SUSPENDED_BY_USER = "SuspendedByUser"
    RESUMED = "Resumed"
    NOT_SUSPENDED = "NotSuspended"
    # PodsReady
    ALL_PODS_READY = "AllPodsReady"
    PODS_NOT_READY = "PodsNotReady"
    # CheckpointReady
    COMMITTED = "Committed"
    NONE_YET = "NoneYet"
    CHECKPOINTS_OFF = "CheckpointsOff"
    CHECKPOINT_TIMED_OUT = "CheckpointTimedOut"
    SAVES_FAIL = "SavesFail"
    # Succeeded
    IN_PROGRESS = "InProgress"
    COMPLETED = "Completed"
    INVALID_SPEC = "InvalidSpec"
    USER_ERROR = "UserError"
    FAILED_BY_RULE = "FailedByRule"
    NO_PROGRESS = "NoProgress"
    RESTARTS_EXHAUSTED = "RestartsExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    FORBIDDEN = "Forbidden"
    # An event only
    NOTICE = "Notice"
    # Causes of a failed attempt, beside the names of ExitCode
    POD_FAILED = "PodFailed"
    POD_EVICTED = "PodEvicted"
    POD_DELETED = "PodDeleted"
    NODE_LOST = "NodeLost"
    PREEMPTED = "Preempted"
    OOM_KILLED = "OOMKilled"
    JOB_DELETED = "JobDeleted"
