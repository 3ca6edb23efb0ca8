"""Looks before the operator starts: is the API server there, the CRD installed, every permission granted?

Each refusal is one line that names the fix, because the alternative is a watch that fails for ever in the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from pylon_api import names
from pylon_operator.api import Api
from pylon_operator.api_errors import ApiError, Forbidden, NotFound, Unreachable
from pylon_operator.kinds import ACCESS_REVIEWS, PYLON_JOBS
from pylon_operator.permissions import CLUSTER, OWN_NAMESPACE, WORKLOADS, Rule


class PreflightError(Exception):
    """The operator cannot work here. `exit_code` follows sysexits(3)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


UNAVAILABLE, NO_PERMISSION, CONFIG = 69, 77, 78


@dataclass(frozen=True, slots=True)
class Need:
    """One verb that one rule asks for, in one namespace (None: cluster-wide)."""

    rule: Rule
    verb: str
    namespace: str | None


async def check_cluster(api: Api, *, namespaces: Iterable[str | None], own_namespace: str) -> None:
    """Raises PreflightError for the first thing that is missing: server, permissions, CRD."""
    try:
        missing = await _missing(api, _needs(namespaces, own_namespace))
        if missing:
            raise PreflightError(_describe(missing), NO_PERMISSION)
        for namespace in namespaces:
            await api.request("GET", PYLON_JOBS.path(namespace), query={"limit": "1"})
    except NotFound as error:
        raise PreflightError(
            f"the CRD {names.PLURAL}.{names.GROUP} ({names.VERSION}) is not installed: kubectl apply -f crds/", CONFIG
        ) from error
    except Unreachable as error:
        raise PreflightError(f"the API server does not answer: {error}", UNAVAILABLE) from error
    except ApiError as error:
        raise PreflightError(f"the API server refused: {error}", UNAVAILABLE) from error


def _needs(namespaces: Iterable[str | None], own_namespace: str) -> list[Need]:
    scopes: list[tuple[tuple[Rule, ...], str | None]] = [(WORKLOADS, namespace) for namespace in namespaces]
    scopes += [(CLUSTER, None), (OWN_NAMESPACE, own_namespace)]
    return [Need(rule, verb, namespace) for rules, namespace in scopes for rule in rules for verb in rule.verbs]


async def _missing(api: Api, needs: list[Need]) -> list[Need]:
    slots = asyncio.Semaphore(16)

    async def allowed(need: Need) -> bool:
        async with slots:
            return await _allowed(api, need)

    try:
        answers = await asyncio.gather(*map(allowed, needs))
    except Forbidden:  # system:basic-user was taken away; whatever is missing will show when it is needed
        return []
    return [need for need, granted in zip(needs, answers, strict=True) if not granted]


async def _allowed(api: Api, need: Need) -> bool:
    resource, _, subresource = need.rule.resource.partition("/")
    attributes = {
        "group": need.rule.group,
        "resource": resource,
        "subresource": subresource,
        "verb": need.verb,
        "namespace": need.namespace or "",
        "name": need.rule.names[0] if need.rule.names else "",
    }
    body = {
        "apiVersion": ACCESS_REVIEWS.api_version,
        "kind": ACCESS_REVIEWS.kind,
        "spec": {"resourceAttributes": attributes},
    }
    answer = await api.request("POST", ACCESS_REVIEWS.path(), body=body, fenced=False)
    return bool(answer["status"]["allowed"])


def _describe(missing: list[Need]) -> str:
    """One line: what may not be done and the rules that allow it."""
    rules: dict[tuple[Rule, str | None], list[str]] = {}
    for need in missing:
        rules.setdefault((need.rule, need.namespace), []).append(need.verb)
    lines = [
        f"{'/'.join(verbs)} {rule.resource}{f' in namespace {namespace}' if namespace else ''} (add the rule {rule})"
        for (rule, namespace), verbs in rules.items()
    ]
    return f"permissions are missing: {'; '.join(lines)}"
