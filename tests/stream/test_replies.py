"""The plain JSON that leaves the worker is the message type, field by field."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference.types import RankedList
from stream.replies import Answer, recommendation_id, reply
from topics.codec import decode_recommendation, encode
from topics.messages import AnsweredClick, RankedItem, Recommendation, Trigger

ids = st.integers(0, 2**63 - 1)
names = st.text(min_size=1, max_size=20)
scores = st.floats(-1e6, 1e6, width=32)
rows = st.lists(st.tuples(ids, scores, st.sampled_from(["retrieval", "recent", "popular"])), max_size=5)
clicks = st.lists(
    st.builds(AnsweredClick, event_id=names, item_id=ids, topic=names, partition=ids, offset=ids), max_size=3
)


@given(ids, rows, clicks, st.sampled_from([None, "cached", "popular"]), st.floats(0, 1e4), st.none() | names)
def test_a_reply_decodes_to_the_recommendation_it_stands_for(user, items, answered, degraded, ms, request_id):
    answer = Answer(
        recommendation_id=recommendation_id("clicks", 7, 3, 99),
        user_id=user,
        k=5,
        asked_at_s=0.0,
        clicks=tuple(answered),
        request_id=request_id,
    ).ranked(
        RankedList(
            items=[row[0] for row in items],
            scores=[row[1] for row in items],
            sources=[row[2] for row in items],
            model_version="v1",
            engine="onnx",
            timings_ms={"rank": ms},
        ),
        wait_ms=ms,
    )
    if degraded:
        answer = type(answer)(**{**_fields(answer), "degraded": degraded})
    message = Recommendation(
        recommendation_id="clicks-00000007-3-99",
        user_id=user,
        trigger=Trigger(kind="request" if request_id else "click", clicks=answered, request_id=request_id),
        items=[RankedItem(item_id=i, score=s, source=name) for i, s, name in items],
        model_version="v1",
        engine="onnx",
        degraded=degraded,
        timings_ms={"wait": round(ms, 3), "rank": round(ms, 3)},
        generated_at=12.5,
    )
    record = reply(answer, 12.5)
    assert decode_recommendation(record.value, record.headers) == message
    assert list(record.headers) == encode(message)[1]
    assert record.key == str(user).encode()


def _fields(answer: Answer) -> dict:
    return {name: getattr(answer, name) for name in Answer.__dataclass_fields__}
