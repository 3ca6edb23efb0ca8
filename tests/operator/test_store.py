"""What is remembered of child objects when the watch and the answers to our own writes overtake each other."""

from __future__ import annotations

from typing import Any

import pytest

from pylon_api import names
from pylon_operator.store import JobKey, Store


def an_object(version: int, *, name: str = "demo-a1", uid: str = "new", job_uid: str = "job") -> dict[str, Any]:
    labels = {names.LABEL_JOB: "demo", names.LABEL_JOB_UID: job_uid}
    place = {"name": name, "namespace": "team"}
    return {"metadata": place | {"uid": uid, "resourceVersion": str(version), "labels": labels}}


@pytest.fixture
def changed() -> list[JobKey]:
    return []


@pytest.fixture
def store(changed: list[JobKey]) -> Store[int]:
    return Store(lambda obj: int(obj["metadata"]["resourceVersion"]), changed.append)


def test_late_news_of_a_predecessors_end_leaves_the_successor(store: Store[int]) -> None:
    store.observe(an_object(5, uid="old", job_uid="earlier job"))
    store.written(an_object(9))
    store.remove(an_object(7, uid="old", job_uid="earlier job"))
    assert store.of("job") == {"demo-a1": 9}
    assert store.of("earlier job") == {}


def test_what_was_made_while_a_list_was_read_stays(store: Store[int]) -> None:
    store.observe(an_object(3, name="vanished", uid="v"))
    store.written(an_object(9))
    store.keep_only(set(), None, "6")
    assert store.of("job") == {"demo-a1": 9}


@pytest.mark.parametrize(("namespace", "left"), [(None, {}), ("team", {}), ("another", {"demo-a1": 5})])
def test_what_a_list_lacks_is_gone_from_its_namespace(store: Store[int], namespace: str | None, left: Any) -> None:
    store.observe(an_object(5))
    store.keep_only(set(), namespace, "6")
    assert store.of("job") == left


def test_an_answer_that_the_watch_is_past_brings_nothing_back(store: Store[int]) -> None:
    store.observe(an_object(5))
    store.remove(an_object(8))
    store.written(an_object(7))
    assert store.of("job") == {}


def test_only_what_differs_marks_the_job(changed: list[JobKey]) -> None:
    store: Store[str] = Store(lambda obj: obj["metadata"]["uid"], changed.append)
    for version in (5, 6):
        store.observe(an_object(version))
    assert changed == [("team", "demo")]
