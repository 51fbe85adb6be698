"""What is measured many at a time is what would be measured one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram

from inference.releases.metrics import SECONDS
from stream.metrics import Observations

values = st.lists(st.floats(0, 100) | st.sampled_from(SECONDS))


def samples(histogram: Histogram) -> dict[str, float]:
    (metric,) = histogram.collect()
    return {
        f"{sample.name} {sample.labels}": sample.value
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


@given(values)
def test_values_observed_together_are_counted_as_if_one_by_one(observed):
    together = Observations("taken", "", buckets=SECONDS, registry=None)
    one_by_one = Histogram("taken", "", buckets=SECONDS, registry=None)
    together.observe_all(observed)
    for value in observed:
        one_by_one.observe(value)
    expected = samples(one_by_one)
    told = samples(together)
    total = "taken_sum {}"
    assert abs(told.pop(total) - expected.pop(total)) <= 1e-9 * (1 + sum(observed))
    assert told == expected
