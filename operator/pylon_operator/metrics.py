"""What the operator tells Prometheus about itself.

Labels are drawn from small fixed sets. There is no label for a job, pod or namespace: a cluster has thousands, and
their state is on the resources themselves.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RECONCILES = Counter("pylon_reconciles_total", "Reconciles by result.", ["result"])
RECONCILE_SECONDS = Histogram(
    "pylon_reconcile_seconds",
    "Time one reconcile took.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
QUEUE_DEPTH = Gauge("pylon_queue_depth", "Jobs that are due and not yet taken up.")
JOBS = Gauge("pylon_jobs", "PylonJobs by phase.", ["phase"])
API_REQUESTS = Counter(
    "pylon_api_requests_total", "Requests to the API server by verb and code (none: no answer).", ["verb", "code"]
)
WATCH_RESTARTS = Counter("pylon_watch_restarts_total", "Watches that began anew, by cause.", ["resource", "cause"])
WATCH_AGE = Gauge("pylon_watch_age_seconds", "Time since a watch last heard from the server.", ["resource"])
POLLS = Counter("pylon_polls_total", "Questions to rank 0 by result.", ["result"])
LEADER = Gauge("pylon_leader", "1 while this process holds the lease.")
