"""The bytes that leave the worker are the message type, field by field."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from stream.replies import (
    AnsweredClick,
    Asked,
    click_trigger,
    degraded,
    items_json,
    ranked,
    recommendation_id,
    replies,
    request_trigger,
)
from topics import messages
from topics.codec import decode_recommendation, encode
from topics.messages import RankedItem, Recommendation, Trigger

ids = st.integers(0, 2**63 - 1)
names = st.text(min_size=1, max_size=20)
scores = st.floats(-1e6, 1e6, width=32)
rows = st.lists(st.tuples(ids, scores, st.sampled_from(["retrieval", "recent", "popular"])), max_size=5)
clicks = st.lists(st.builds(AnsweredClick, names, ids, names, ids, ids), max_size=3)


@given(ids, rows, clicks, st.sampled_from([None, "cached", "popular"]), st.floats(0, 1e4), st.none() | names)
def test_a_reply_decodes_to_the_recommendation_it_stands_for(user, items, answered, how, ms, request_id):
    trigger = request_trigger(request_id) if request_id else click_trigger(answered)
    asked = Asked(recommendation_id("clicks", 7, 3, 99), user, 5, 0.0, trigger)
    columns = [[row[column] for row in items] for column in range(3)]
    written = items_json(*columns, "v1", "onnx")
    listed = (
        degraded(written, len(items), how)
        if how
        else ranked(written, len(items), orjson.dumps({"wait": ms, "rank": ms}))
    )
    message = Recommendation(
        recommendation_id="clicks-00000007-3-99",
        user_id=user,
        trigger=Trigger(
            kind="request" if request_id else "click",
            clicks=[] if request_id else [messages.AnsweredClick(**click._asdict()) for click in answered],
            request_id=request_id,
        ),
        items=[RankedItem(item_id=i, score=s, source=name) for i, s, name in items],
        model_version="v1",
        engine="onnx",
        degraded=how,
        timings_ms={} if how else {"wait": ms, "rank": ms},
        generated_at=12.5,
    )
    (record,) = replies([asked], [listed], 12.5)
    assert decode_recommendation(record.value, record.headers) == message
    assert list(record.headers) == encode(message)[1]
    assert record.key == str(user).encode()
