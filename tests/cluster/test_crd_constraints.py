"""The API server gives the verdict that tests/api gets from the models for the same manifests, and names the field."""

from __future__ import annotations

import pytest
from api import MERGE_PATCH, ApiError, BlockingApi
from constraints import IMMUTABLE, MUTABLE, RULE_CASES, Case, Json, full_job, minimal_job, put, schema_cases

from pylon_api import names

pytestmark = pytest.mark.usefixtures("crd")

JOBS = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
DRY_RUN = "dryRun=All&fieldValidation=Strict"  # what kubectl asks for by default is Strict, too


@pytest.mark.parametrize("case", [*schema_cases(), *RULE_CASES], ids=lambda case: case.name)
def test_server_agrees_with_the_models(api: BlockingApi, case: Case) -> None:
    if case.problem is None:
        api.create(f"{JOBS}?{DRY_RUN}", case.manifest())
    else:
        with pytest.raises(ApiError) as caught:
            api.create(f"{JOBS}?{DRY_RUN}", case.manifest())
        assert case.problem in str(caught.value)


@pytest.fixture
def stored(api: BlockingApi, namespace: str, request: pytest.FixtureRequest) -> tuple[str, Json]:
    """A job that sets the field of `request.param` to its first value, and its path at the API server."""
    field, value = request.param
    job = full_job()
    put(job, field, value)
    job["metadata"]["namespace"] = namespace
    path = JOBS.replace("default", namespace)
    return f"{path}/{job['metadata']['name']}", api.create(path, job)


def replacing(table: dict[str, tuple[object, object]]) -> list[object]:
    return [
        pytest.param((field, old), field, new, id=field.removeprefix("spec.")) for field, (old, new) in table.items()
    ]


@pytest.mark.parametrize(("stored", "field", "new"), replacing(IMMUTABLE), indirect=["stored"])
def test_immutable_field_cannot_change(api: BlockingApi, stored: tuple[str, Json], field: str, new: object) -> None:
    path, _ = stored
    change: Json = {}
    put(change, field, new)
    with pytest.raises(ApiError, match=f"{field}: Invalid value.*immutable"):
        api.patch(f"{path}?{DRY_RUN}", change, MERGE_PATCH)


@pytest.mark.parametrize(("stored", "field", "new"), replacing(MUTABLE), indirect=["stored"])
def test_mutable_field_can_change(api: BlockingApi, stored: tuple[str, Json], field: str, new: object) -> None:
    path, _ = stored
    change: Json = {}
    put(change, field, new)
    changed = api.patch(f"{path}?{DRY_RUN}", change, MERGE_PATCH)
    assert changed["spec"][field.removeprefix("spec.")] != stored[1]["spec"].get(field.removeprefix("spec."))


@pytest.mark.parametrize(("old", "new"), [(2, None), (None, 2)], ids=["taken away", "added"])
def test_optional_immutable_field_can_neither_come_nor_go(
    api: BlockingApi, namespace: str, old: int | None, new: int | None
) -> None:
    path = JOBS.replace("default", namespace)
    job = minimal_job()
    job["metadata"]["namespace"] = namespace
    job["spec"]["processesPerNode"] = old
    api.create(path, job)
    with pytest.raises(ApiError, match=r"spec\.processesPerNode: Invalid value.*immutable"):
        api.patch(f"{path}/example?{DRY_RUN}", {"spec": {"processesPerNode": new}}, MERGE_PATCH)
