"""What of an evaluation is shown, and beside what."""

from compression.evaluation.tables import tables

FIGURES = {"hr@10": 0.5, "ndcg@10": 0.25}
METRICS = {
    "targets": 7,
    "retrieval": FIGURES,
    "item_to_item": {"hr@10": 0.125, "ndcg@10": 0.0625},
    "ranking_50": FIGURES,
    "by_behavior": {
        name: {"targets": count, "retrieval": FIGURES, "ranking_50": FIGURES}
        for name, count in (("pv", 1_000), ("buy", 10))
    },
    "lists": {
        "targets": 1_000,
        "network": {"hr@1": 0.1, "hr@10": 0.2, "ndcg@10": 0.3, "mrr": 0.4},
        "fused": {"hr@1": 0.5, "hr@10": 0.6, "ndcg@10": 0.7, "mrr": 0.8},
    },
}


def test_every_table_that_there_are_figures_for_is_shown_ours_first():
    full, among, behaviors, lists = tables(METRICS)
    assert full.heads == ["predictor", "HR@10", "NDCG@10"]
    assert full.rows == [["retrieval", "0.5000", "0.2500"], ["item-to-item", "0.1250", "0.0625"]]
    assert among.rows == [["ranking", "0.5000", "0.2500"]] and among.ours == 0
    assert behaviors.rows[0] == ["pv", "1,000", "0.5000", "0.2500", "0.5000", "0.2500"]
    assert behaviors.ours is None
    assert [row[:2] for row in lists.rows] == [["with online counts", "0.5000"], ["network alone", "0.1000"]]
    assert "1,000 targets" in lists.title
    assert all(len(row) == len(table.heads) for table in tables(METRICS) for row in table.rows)


def test_a_log_of_one_behavior_and_a_version_without_lists_have_fewer_tables():
    only = METRICS | {"by_behavior": {"pv": METRICS["by_behavior"]["pv"]}, "lists": {"targets": 0}}
    assert [table.title for table in tables(only)] == ["Full catalogue", "Among 50 candidates"]
