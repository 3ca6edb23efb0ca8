"""Merge patches by RFC 7396."""

from __future__ import annotations

from typing import Any

from fake_api_server import merged
from hypothesis import given
from hypothesis import strategies as st

from pylon_operator.merge_patch import merge_patch

json_objects = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        st.integers(0, 3) | st.sampled_from(["", "x"]) | st.lists(st.integers(0, 3), max_size=2),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
)


@given(json_objects, json_objects)
def test_a_merge_patch_makes_the_one_out_of_the_other(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert merged(old, merge_patch(old, new)) == new
    assert merge_patch(new, new) == {}
