"""Degraded lists, which are kept as they are written."""

from __future__ import annotations

import numpy as np
import orjson

from features.statistics import ItemWeights
from stream.fallback import Fallback
from stream.replies import Asked, Listed, items_json


class Popular:
    def __init__(self, *items: int) -> None:
        self.now = ItemWeights(np.array(items, np.int64), np.linspace(1, 0.5, len(items), dtype=np.float32))

    def popular(self) -> ItemWeights:
        return self.now


def asked(user: int = 1, k: int = 2, exclude: tuple[int, ...] = (), candidates=None) -> Asked:
    return Asked("id", user, k, 0.0, b"{}", frozenset(exclude), candidates)


def read(listed: Listed) -> tuple[str, list[int]]:
    body = orjson.loads(b"{%b}" % listed.body)
    assert body["degraded"] == listed.degraded
    assert len(body["items"]) == listed.size
    return body["degraded"], [item["item_id"] for item in body["items"]]


def test_what_is_popular_is_written_once_and_anew_when_it_has_changed():
    popular = Popular(5, 6, 7)
    fallback = Fallback(popular, 10)
    first = fallback.list_for(asked(1))
    assert read(first) == ("popular", [5, 6])
    assert fallback.list_for(asked(2)) is first
    assert read(fallback.list_for(asked(2, k=3))) == ("popular", [5, 6, 7])
    popular.now = Popular(8, 9, 5).now
    assert read(fallback.list_for(asked(1))) == ("popular", [8, 9])


def test_what_is_excluded_makes_room_for_what_comes_after_it():
    fallback = Fallback(Popular(5, 6, 7, 8), 10)
    assert read(fallback.list_for(asked(exclude=(5, 7)))) == ("popular", [6, 8])
    fallback.remember(asked(k=3), items_json([1, 2, 3], [0.3, 0.2, 0.1], ["recent"] * 3, "v1", "onnx"), 3)
    assert read(fallback.list_for(asked(exclude=(2,)))) == ("cached", [1, 3])
    assert read(fallback.list_for(asked(k=1))) == ("cached", [1])
    cut = orjson.loads(b"{%b}" % fallback.list_for(asked(k=1)).body)
    assert (cut["items"][0]["score"], cut["model_version"], cut["engine"]) == (0.3, "v1", "onnx")
    assert read(fallback.list_for(asked(k=9))) == ("cached", [1, 2, 3])


def test_given_candidates_keep_their_order_and_are_not_remembered():
    fallback = Fallback(Popular(5), 10)
    assert read(fallback.list_for(asked(candidates=(9, 3, 4), exclude=(3,)))) == ("popular", [9, 4])
    fallback.remember(asked(candidates=(9,)), items_json([9], [1.0], ["request"], "v1", "onnx"), 1)
    assert read(fallback.list_for(asked())) == ("popular", [5])


def test_of_more_users_than_are_remembered_the_one_answered_longest_ago_is_forgotten():
    fallback = Fallback(Popular(5), 2)
    for user in (1, 2, 1, 3):
        fallback.remember(asked(user), items_json([user], [1.0], ["recent"], "v1", "onnx"), 1)
    made = {user: read(fallback.list_for(asked(user)))[1] for user in (1, 2, 3)}
    assert made == {1: [1], 2: [5], 3: [3]}


def test_an_empty_list_is_nothing_to_remember():
    fallback = Fallback(Popular(5), 2)
    fallback.remember(asked(), items_json([], [], [], "v1", "onnx"), 0)
    assert read(fallback.list_for(asked()))[0] == "popular"
