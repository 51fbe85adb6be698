"""Whether the list that a user had held what the user clicked next."""

from infra.online import online_hits
from topics.messages import BehaviorEvent


def click(user, item):
    return BehaviorEvent(
        event_id="x", user_id=user, item_id=item, category_id=1, behavior="pv", timestamp=1_511_600_000
    )


def test_a_click_is_judged_by_the_list_before_it_and_never_by_its_own():
    clicks = [("0", click(1, 10)), ("1", click(2, 11)), ("2", click(1, 11)), ("3", click(1, 12))]
    lists = {"0": [99, 11], "1": [11], "2": [11, 13], "3": [12]}
    found = online_hits(clicks, lists, k=50)
    assert (found.asked, found.hits, found.rate) == (2, 1, 0.5)
    assert online_hits(clicks, lists, k=1).hits == 0


def test_a_click_whose_user_had_no_list_is_not_asked_for():
    found = online_hits([("0", click(1, 10)), ("1", click(2, 11))], {}, k=50)
    assert (found.asked, found.rate) == (0, 0.0)
