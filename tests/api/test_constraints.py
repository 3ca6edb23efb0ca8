"""The models give the verdict that tests/cluster gets from the API server for the same manifests."""

from __future__ import annotations

import pytest
from constraints import IMMUTABLE, MUTABLE, RULE_CASES, Case, minimal_job, schema_cases

from pylon_api.job import PylonJobSpec
from pylon_api.manifest import ManifestError, parse_job


@pytest.mark.parametrize("case", [*schema_cases(), *RULE_CASES], ids=lambda case: case.name)
def test_models_agree_with_the_schema(case: Case) -> None:
    if case.problem is None:
        parse_job(case.manifest())
    else:
        with pytest.raises(ManifestError) as caught:
            parse_job(case.manifest())
        assert case.problem in str(caught.value)


def test_minimal_job_takes_every_default() -> None:
    job = parse_job(minimal_job())
    assert (job.spec.nodes, job.spec.training.batch.sequences, job.spec.training.checkpoint) == (1, 32, None)


def test_every_field_is_either_immutable_or_mutable() -> None:
    wire_names = {f"spec.{field.alias}" for field in PylonJobSpec.model_fields.values()}
    assert {*IMMUTABLE, *MUTABLE} == wire_names
    assert not {*IMMUTABLE} & {*MUTABLE}


def test_manifest_is_read_back_from_what_it_writes() -> None:
    job = parse_job(minimal_job())
    again = parse_job({**job.to_wire(), "metadata": {"name": "example"}})
    assert again.spec == job.spec


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    manifest = minimal_job()
    manifest["spec"]["training"]["optimizer"] = {"gradientClipNorm": value}
    with pytest.raises(ManifestError, match=r"spec\.training\.optimizer\.gradientClipNorm"):
        parse_job(manifest)


def test_a_refused_password_is_not_repeated() -> None:
    """The operator puts these words into a condition, where more people read them."""
    manifest = minimal_job()
    manifest["spec"]["training"]["checkpoint"] = {"uri": "s3://key:hunter2@bucket"}
    with pytest.raises(ManifestError, match=r"^spec\.training\.checkpoint\.uri: .* from a Secret") as caught:
        parse_job(manifest)
    assert "hunter2" not in str(caught.value)


def test_a_key_without_json_form_is_one_line() -> None:
    manifest = minimal_job()
    manifest["spec"][("a", "b")] = 1
    with pytest.raises(ManifestError, match="no JSON form"):
        parse_job(manifest)
