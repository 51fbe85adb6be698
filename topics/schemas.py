"""JSON Schemas and an AsyncAPI document, generated from the types.

    python -m topics.schemas

writes them to topics/schemas/, for producers and consumers in other languages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson

from topics.catalog import TOPICS, Topic
from topics.codec import SCHEMA_HEADER, SCHEMA_VERSION
from topics.messages import Message

FOLDER = Path(__file__).resolve().parent / "schemas"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def documents() -> dict[str, bytes]:
    """Every generated file, by name."""
    types = {topic.value for topic in TOPICS if topic.value is not None}
    found: dict[str, dict[str, Any]] = {_file_name(message): _json_schema(message) for message in types}
    found["asyncapi.json"] = _asyncapi()
    return {name: _bytes(document) for name, document in sorted(found.items())}


def _json_schema(message: type[Message]) -> dict[str, Any]:
    # What one may send: fields with a default may be left out, unknown ones are ignored.
    return {"$schema": _DIALECT, "$id": _file_name(message), **message.model_json_schema(mode="validation")}


def _asyncapi() -> dict[str, Any]:
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tailrace",
            "version": str(SCHEMA_VERSION),
            "description": "Clicks in, ranked lists out. Records are JSON; keys are decimal in ASCII; "
            "partitioning is murmur2, as Java, aiokafka and kafka-python do it.",
        },
        "defaultContentType": "application/json",
        "channels": {_id(topic): _channel(topic) for topic in TOPICS},
        "operations": {
            "sendClicks": _operation("send", "clicks", "Tell what a user did."),
            "sendRequests": _operation("send", "recommendation-requests", "Ask for a list without a click."),
            "receiveRecommendations": _operation("receive", "recommendations", "Take the ranked lists."),
        },
        "components": {
            "schemas": {
                _file_name(topic.value).removesuffix(".schema.json"): {"$ref": f"./{_file_name(topic.value)}"}
                for topic in TOPICS
                if topic.value is not None
            }
        },
    }


def _channel(topic: Topic) -> dict[str, Any]:
    if topic.value is None:
        name = "OriginalBytes"
        payload: dict[str, Any] = {"description": "the bytes of the original record, untouched"}
        headers = {
            name: {"type": "string"} for name in ("reason", "topic", "partition", "offset", "attempts")
        }
        content_type = "application/octet-stream"
    else:
        name = topic.value.__name__
        payload = {"$ref": f"./{_file_name(topic.value)}"}
        headers = {SCHEMA_HEADER: {"type": "string", "const": str(SCHEMA_VERSION)}}
        content_type = "application/json"
    message = {
        "name": name,
        "contentType": content_type,
        "headers": {"type": "object", "properties": headers},
        "payload": payload,
        "bindings": {"kafka": {"key": {"type": "string", "description": topic.key}}},
    }
    kafka = {"topic": topic.name, "partitions": topic.partitions, "topicConfiguration": _settings(topic)}
    return {
        "address": topic.name,
        "description": topic.about,
        "messages": {name: message},
        "bindings": {"kafka": kafka},
    }


def _settings(topic: Topic) -> dict[str, Any]:
    """Kafka's settings in the types that AsyncAPI's Kafka binding gives them."""
    typed: dict[str, Any] = {}
    for name, value in topic.config.items():
        typed[name] = value.split(",") if name == "cleanup.policy" else int(value)
    return typed


def _operation(action: str, topic_name: str, summary: str) -> dict[str, Any]:
    topic = next(topic for topic in TOPICS if topic.name == topic_name)
    return {"action": action, "channel": {"$ref": f"#/channels/{_id(topic)}"}, "summary": summary}


def _id(topic: Topic) -> str:
    return re.sub(r"[^a-z]+(\w)", lambda found: found[1].upper(), topic.name)


def _file_name(message: type[Message]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", message.__name__).lower() + ".schema.json"


def _bytes(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in documents().items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    main()
