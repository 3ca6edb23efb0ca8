"""The generated CRD is structural, bounded and explained; the files in the tree are what the models say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from pylon_api.crd import SchemaError, build_crd, render_crd, root_schema, structural_schema
from pylon_api.generated import FILES, find_stale, write_files
from pylon_operator.commands.crds import command

ROOT = Path(__file__).parents[2]
Node = dict[str, Any]


def nodes_of(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes_of(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes_of(node["items"], f"{path}[]")


SPEC = list(nodes_of(root_schema()["properties"]["spec"], "spec"))
STATUS = list(nodes_of(root_schema()["properties"]["status"], "status"))
FIELDS = [(path, node) for path, node in SPEC + STATUS if not path.endswith("[]")]


def find(fields: list[tuple[str, Node]], wanted: str) -> Node:
    return next(node for path, node in fields if path == wanted)


def test_no_node_holds_what_the_api_server_refuses() -> None:
    refused = {"$ref", "$defs", "title", "anyOf", "oneOf", "allOf", "additionalProperties", "nullable", "const"}
    assert [path for path, node in SPEC + STATUS if refused & node.keys()] == []
    assert [path for path, node in SPEC + STATUS if "type" not in node] == []


@pytest.mark.parametrize(("path", "node"), FIELDS, ids=[path for path, _ in FIELDS])
def test_field_is_explained_in_sentences(path: str, node: Node) -> None:
    assert node["description"].rstrip(")")[-1] == "."
    if path.endswith("Seconds"):
        assert any(word in node["description"].lower() for word in ("second", "running time")), "name the unit"


@pytest.mark.parametrize(("path", "node"), SPEC, ids=[path for path, _ in SPEC])
def test_spec_is_bounded(path: str, node: Node) -> None:
    """The cost that the API server allots to a rule is computed from the largest value that could come."""
    needed = {
        "integer": {"minimum", "maximum"},
        "number": {"minimum"},
        "string": set() if "enum" in node else {"maxLength"},
        "array": {"maxItems"},
    }.get(node["type"], set())
    assert needed <= node.keys()


def test_exclusive_bounds_become_flags() -> None:
    rate = find(SPEC, "spec.training.optimizer.learningRate")
    assert (rate["minimum"], rate["exclusiveMinimum"], rate["maximum"]) == (0, True, 10)


def test_optional_field_has_neither_default_nor_null() -> None:
    assert find(SPEC, "spec.processesPerNode") == {
        "type": "integer",
        "format": "int64",
        "minimum": 1,
        "maximum": 256,
        "description": find(SPEC, "spec.processesPerNode")["description"],
    }


def test_object_default_is_spelt_out() -> None:
    assert find(SPEC, "spec.training.data.tokenizer")["default"] == {"kind": "Bytes"}


def test_status_has_no_defaults() -> None:
    assert [path for path, node in STATUS if "default" in node] == []


def test_enum_values_survive_yaml_unquoted() -> None:
    """`Off` and `Yes` are booleans in the YAML that kubectl reads."""
    values = [value for _, node in SPEC for value in node.get("enum", [])]
    assert values
    assert [value for value in values if yaml.safe_load(value) != value] == []


def test_text_and_object_are_the_same() -> None:
    assert yaml.safe_load(render_crd()) == build_crd()


class Union(BaseModel):
    either: int | str


class Tree(BaseModel):
    children: list[Tree]


class Table(BaseModel):
    rows: dict[str, int]


@pytest.mark.parametrize("model", [Union, Tree, Table])
def test_untranslatable_model_is_refused(model: type[BaseModel]) -> None:
    with pytest.raises(SchemaError, match=model.__name__):
        structural_schema(model)


def test_generated_files_are_up_to_date() -> None:
    assert find_stale(ROOT) == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "crds" / "pylon_api").mkdir(parents=True)
    return tmp_path


def test_command_writes_then_finds_nothing_stale(checkout: Path) -> None:
    first = CliRunner().invoke(command, ["--root", str(checkout)])
    assert first.output.splitlines() == [f"wrote {path}" for path in FILES]
    assert CliRunner().invoke(command, ["--root", str(checkout), "--check"]).exit_code == 0


def test_command_names_an_edited_file_and_leaves_it(checkout: Path) -> None:
    write_files(checkout)
    edited = checkout / "docs" / "api.md"
    edited.write_text("edited")
    result = CliRunner().invoke(command, ["--root", str(checkout), "--check"])
    assert result.exit_code == 1
    assert "docs/api.md" in result.output
    assert "pylon crds" in result.output
    assert edited.read_text() == "edited"


def test_command_outside_a_checkout_says_where_to_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--root", str(tmp_path)])
    assert result.exit_code == 2
    assert "no checkout of Pylon" in result.output
