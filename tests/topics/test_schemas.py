"""The checked-in schemas are those of the types, and say what the codec accepts."""

from __future__ import annotations

from typing import Any

import jsonschema
import orjson
import pytest
from referencing import Registry, Resource

from topics import schemas
from topics.catalog import TOPICS
from topics.codec import encode
from topics.messages import BehaviorEvent, RecommendRequest

CLICK: dict[str, Any] = {
    "event_id": "e",
    "user_id": 1,
    "item_id": 2,
    "category_id": 3,
    "behavior": "pv",
    "timestamp": 4,
}


def load(name: str) -> Any:
    return orjson.loads((schemas.FOLDER / name).read_bytes())


def test_the_checked_in_files_are_what_the_types_give() -> None:
    present = {path.name: path.read_bytes() for path in schemas.FOLDER.iterdir()}
    assert present == schemas.documents(), "run: python -m topics.schemas"


@pytest.mark.parametrize("name", [name for name in schemas.documents() if name.endswith(".schema.json")])
def test_each_schema_is_a_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(load(name))


def test_what_the_codec_writes_is_valid() -> None:
    click, _ = encode(BehaviorEvent(**CLICK))
    jsonschema.validate(orjson.loads(click), load("behavior-event.schema.json"))
    request, _ = encode(RecommendRequest(request_id="r", user_id=1, candidates=[2]))
    jsonschema.validate(orjson.loads(request), load("recommend-request.schema.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": -1},
        {"item_id": 2**63},
        {"behavior": "purchase"},
        {"timestamp": 0},
        {"user_id": "1"},
        {"event_id": ""},
    ],
)
def test_what_the_codec_refuses_is_invalid(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**CLICK, **change}, load("behavior-event.schema.json"))


def test_asyncapi_has_every_topic_and_no_dangling_reference() -> None:
    document = load("asyncapi.json")
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(document["info"])
    assert {channel["address"] for channel in document["channels"].values()} == {t.name for t in TOPICS}
    assert {operation["action"] for operation in document["operations"].values()} == {"send", "receive"}
    files = {name: load(name) for name in schemas.documents()}
    registry: Registry[Any] = Registry().with_resources(
        (f"file:///schemas/{name}", Resource.opaque(content)) for name, content in files.items()
    )
    resolver = registry.resolver("file:///schemas/asyncapi.json")
    found = list(references(document))
    assert len(found) >= len(TOPICS)
    for reference in found:
        assert resolver.lookup(reference).contents


def references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [reference for item in node for reference in references(item)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"]] if "$ref" in node else []
    return own + [reference for value in node.values() for reference in references(value)]
