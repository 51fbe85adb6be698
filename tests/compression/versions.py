"""Versions of a model that computes nothing: files, a vocabulary, an item table, a manifest."""

import numpy as np

from compression.releases.registry import Manifest, Registry
from features.encoding import Vocabulary


def manifest(version="v1", **changes):
    fields = {
        "schema": 1,
        "version": version,
        "created_at": "2017-12-03T10:15:00+00:00",
        "model": {"dim": 4, "item_rows": 5, "category_rows": 4},
        "graphs": {"encode": "encode.onnx", "score": "score.onnx", "rank": "rank.onnx"},
    }
    return Manifest.model_validate(fields | changes)


def stage(folder, graph=b""):
    """The files of a version; its graphs are what `graph` says."""
    folder.mkdir()
    for name in ("encode", "score", "rank"):
        (folder / f"{name}.onnx").write_bytes((graph or name.encode()) * 1000)
    ids = np.array([10, 20])
    Vocabulary(ids, np.array([1, 1], np.int32), np.array([7]), 2, 2).save(folder / "vocabulary.npz")
    np.save(folder / "item_table.npy", np.ones((5, 4), np.float32))
    return folder


def registry_of(folder, *versions):
    """A registry that holds these versions; nobody serves."""
    ours = Registry(folder / "models")
    for version in versions:
        ours.publish(stage(folder / f"staging-{version}"), manifest(version))
    return ours
