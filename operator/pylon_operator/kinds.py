"""The resources of the API that the operator touches."""

from __future__ import annotations

from pylon_api import names
from pylon_operator.api import Resource

PYLON_JOBS = Resource(names.API_VERSION, names.PLURAL, names.KIND)
JOBS = Resource("batch/v1", "jobs", "Job")
PODS = Resource("v1", "pods", "Pod")
SERVICES = Resource("v1", "services", "Service")
CONFIG_MAPS = Resource("v1", "configmaps", "ConfigMap")
SECRETS = Resource("v1", "secrets", "Secret")
NODES = Resource("v1", "nodes", "Node")
EVENTS = Resource("events.k8s.io/v1", "events", "Event")
LEASES = Resource("coordination.k8s.io/v1", "leases", "Lease")
ACCESS_REVIEWS = Resource("authorization.k8s.io/v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview")

BY_KIND = {resource.kind: resource for resource in (JOBS, SERVICES, CONFIG_MAPS, SECRETS)}
"""Kinds of an attempt's objects."""
