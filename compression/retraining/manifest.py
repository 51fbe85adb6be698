"""What a run's manifest says: where the version comes from, how good it is, how it was made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from compression.evaluation.verdict import Verdict
from compression.releases.provenance import git_revision, libraries
from compression.releases.registry import Manifest
from compression.retraining.runs import RunState
from compression.retraining.settings import RetrainSettings

_LIBRARIES: Final = ("torch", "onnx", "onnxruntime", "numpy", "safetensors")


def describe(settings: RetrainSettings, state: RunState, verdict: Verdict, *, processes: int) -> Manifest:
    """The manifest of what is about to be published; the registry adds the checksums. `state` has the steps
    up to the gate, `processes` is how many trained."""
    said = {name: step.result for name, step in state.steps.items()}
    read, whole, metrics, exported = (said[name] for name in ("read", "train", "evaluate", "export"))
    released = said[("train", *settings.recipe.compression.stages)[-1]]
    compression = exported.get("compression")
    made = {"compression": compression | _kept(verdict)} if compression else {}
    return Manifest.model_validate(
        {
            "schema": 1,
            "version": state.version,
            "created_at": state.created_at,
            "parent": read["parent"],
            "kind": "retrieval" if settings.retrieval else "ranking",
            "model": released["shape"],
            "graphs": exported["graphs"],
            # A run that was begun before there was a fusion has none.
            "fusion": metrics.get("lists", {}).get("weights"),
            "metrics": metrics
            | {"parity": exported["parity"], "gate": verdict.model_dump(mode="json")}
            | made,
            "data": read["data"]
            | {
                "run": state.run,
                "started_from": read["started_from"],
                "split": settings.split,
                "seed": settings.seed,
                "goals": asdict(settings.recipe.goals),
                "precision": settings.recipe.precision,
                "processes": processes,
                "epochs": len(whole["epochs"]),
                "best_epoch": whole["best"],
                "stopped": whole["stopped"],
            }
            | ({"recipe": settings.retrieval.model_dump(mode="json")} if settings.retrieval else {})
            | ({"teacher": whole["shape"]} if released["shape"] != whole["shape"] else {})
            | ({"forced": settings.force} if verdict.forced else {}),
            "git_revision": git_revision(),
            "libraries": libraries(_LIBRARIES),
        }
    )


def _kept(verdict: Verdict) -> dict[str, Any]:
    """NDCG@10 of both heads, before and after, and the interval of the difference."""
    heads = {check.name.removesuffix(" kept"): check for check in verdict.checks if " kept" in check.name}
    return {
        name: {
            "before": check.figures["teacher"],
            "after": check.figures["candidate"],
            "difference": [check.value, check.figures["low"], check.figures["high"]],
        }
        for name, check in heads.items()
    }
