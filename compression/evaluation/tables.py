"""What an evaluation found, as tables: the same for a terminal and for a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

FULL: Final = ("retrieval", "popularity", "item_to_item", "recent", "transitions", "fusion")
"""Predictors that rank the whole catalogue, ours first."""
_AMONG: Final = ("ranking_50", "popularity_50", "item_to_item_50", "recent_50")
_OF_LISTS: Final = ("hr@1", "hr@10", "ndcg@10", "mrr")


@dataclass(frozen=True, slots=True)
class Table:
    """Words and figures; what is first in a row says whose they are."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    ours: int | None = 0  # the row that the others are beside


def tables(metrics: dict[str, Any]) -> list[Table]:
    """Of the metrics of `evaluate`, and of what `fuse` says of served lists (`lists`): those tables for which
    there is anything to show."""
    made = []
    for title, names in (("Full catalogue", FULL), ("Among 50 candidates", _AMONG)):
        found = {name.removesuffix("_50"): metrics[name] for name in names if name in metrics}
        if found:
            heads = [cut.upper() for cut in next(iter(found.values()))]
            rows = [_row(name.replace("_", "-"), figures.values()) for name, figures in found.items()]
            made.append(Table(title, ["predictor", *heads], rows))
    by_behavior = metrics.get("by_behavior", {})
    # Of one kind are all targets of logs that know only one.
    if len(by_behavior) > 1:
        made.append(_by_behavior(by_behavior))
    lists = metrics.get("lists", {})
    # Of what was trained only: an evaluation of a version does not weigh counts anew.
    if lists.get("targets"):
        made.append(_of_lists(lists))
    return made


def _by_behavior(found: dict[str, Any]) -> Table:
    heads = ["target", "targets", "HR@10", "NDCG@10", "HR@10 of 50", "NDCG@10 of 50"]
    rows = []
    for name, figures in found.items():
        shown = [figures[head][cut] for head in ("retrieval", "ranking_50") for cut in ("hr@10", "ndcg@10")]
        who, *values = _row(name, shown)
        rows.append([who, f"{figures['targets']:,}", *values])
    return Table("By what the user did", heads, rows, ours=None)


def _of_lists(found: dict[str, Any]) -> Table:
    """The list that would be served, by the network alone and with what is counted online."""
    rows = [
        _row(words, [found[name][cut] for cut in _OF_LISTS])
        for words, name in (("with online counts", "fused"), ("network alone", "network"))
    ]
    title = f"As served, of 50 candidates; a miss counts: {found['targets']:,} targets"
    return Table(title, ["score", *(cut.upper() for cut in _OF_LISTS)], rows)


def _row(name: str, figures: Any) -> list[str]:
    return [name, *(f"{figure:.4f}" for figure in figures)]
