"""A version is whole and unaltered, or it is refused with the reason."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from compression.releases.registry import ArtefactInvalid, Registry
from tests.compression.versions import manifest, stage


@pytest.fixture
def staging(tmp_path):
    return stage(tmp_path / "staging")


@pytest.fixture
def registry(tmp_path, staging):
    ours = Registry(tmp_path / "models")
    ours.publish(staging, manifest())
    ours.promote("v1")
    return ours


def test_what_was_published_is_what_is_read(registry, staging):
    artefact = registry.open()
    assert artefact.version == "v1"
    assert artefact.read("rank.onnx") == (staging / "rank.onnx").read_bytes()
    assert artefact.vocabulary().item_ids.tolist() == [10, 20]
    assert artefact.item_table().shape == (5, 4)
    assert set(artefact.manifest.files) == {p.name for p in staging.iterdir()}


def test_an_alias_moves_in_one_step_and_old_versions_stay(registry, staging):
    registry.publish(staging, manifest("v2"))
    assert registry.resolve("serving") == "v1"
    registry.promote("v2")
    assert (registry.resolve("serving"), registry.resolve("v1")) == ("v2", "v1")
    assert registry.versions() == ["v1", "v2"]
    assert registry.open("v1").version == "v1"


def test_a_version_is_never_overwritten(registry, staging):
    with pytest.raises(ArtefactInvalid, match="already published"):
        registry.publish(staging, manifest("v1"))


@pytest.mark.parametrize("name", ["encode.onnx", "vocabulary.npz", "item_table.npy"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lengthen", "remove", "link", "pipe"])
def test_a_harmed_file_is_refused(registry, tmp_path, name, harm):
    path = registry.root / "versions" / "v1" / name
    data = path.read_bytes()
    if harm in {"remove", "link", "pipe"}:
        path.rename(tmp_path / "elsewhere")
    if harm == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif harm == "pipe":
        os.mkfifo(path)
    elif harm != "remove":
        harmed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-5], "lengthen": data + b"\0"}
        path.write_bytes(harmed[harm])
    with pytest.raises(ArtefactInvalid, match=name):
        registry.open()


def test_bytes_altered_after_opening_are_not_handed_out(registry):
    artefact = registry.open()
    (artefact.path / "rank.onnx").write_bytes(b"x" * 4000)
    with pytest.raises(ArtefactInvalid, match=r"rank\.onnx"):
        artefact.read("rank.onnx")


def test_an_altered_manifest_is_refused_through_the_alias(registry):
    path = registry.root / "versions" / "v1" / "manifest.json"
    path.write_text(path.read_text().replace('"dim": 4', '"dim": 8').replace('"dim":4', '"dim":8'))
    with pytest.raises(ArtefactInvalid, match="not the one that was promoted"):
        registry.open()


@pytest.mark.parametrize(
    "files",
    [
        {"../../outside": {"sha256": "0" * 64, "bytes": 1}},
        {"/etc/hostname": {"sha256": "0" * 64, "bytes": 1}},
        {"manifest.json": {"sha256": "0" * 64, "bytes": 1}},
        {f"file{n}": {"sha256": "0" * 64, "bytes": 1} for n in range(100)},
        {"rank.onnx": {"sha256": "0" * 64, "bytes": 2**60}},
        {},
    ],
    ids=["parent", "absolute", "manifest", "many", "huge", "none"],
)
def test_a_manifest_that_names_what_it_should_not_is_refused(registry, files):
    path = registry.root / "versions" / "v1" / "manifest.json"
    fields = json.loads(path.read_text())
    fields["files"] = fields["files"] | files if files else {}
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtefactInvalid):
        registry.open("v1")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"schema": 2}', b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(registry, data):
    (registry.root / "versions" / "v1" / "manifest.json").write_bytes(data)
    with pytest.raises(ArtefactInvalid, match="v1"):
        registry.open("v1")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"version": 3, "manifest_sha256": null}'])
def test_an_alias_that_names_nothing_is_refused(registry, data):
    (registry.root / "aliases" / "serving.json").write_bytes(data)
    with pytest.raises(ArtefactInvalid, match="serving"):
        registry.open()


@pytest.mark.parametrize("name", ["../v1", "/etc", "", ".", "..", "a/b", "v1\n", "x" * 65, ".hidden"])
def test_a_name_that_could_leave_the_folder_is_refused(registry, staging, name):
    with pytest.raises(ArtefactInvalid):
        registry.open(name)
    with pytest.raises(ArtefactInvalid):
        registry.promote("v1", alias=name)
    with pytest.raises(ValueError, match="version"):
        manifest(name)


def test_an_alias_in_the_file_cannot_point_outside(registry):
    alias = registry.root / "aliases" / "serving.json"
    alias.write_text(json.dumps({"version": "../../elsewhere", "manifest_sha256": "0" * 64}))
    with pytest.raises(ArtefactInvalid, match="not a version"):
        registry.open()


def test_no_registry_yet_says_how_to_get_a_model(tmp_path):
    empty = Registry(tmp_path / "nowhere")
    assert empty.versions() == []
    with pytest.raises(ArtefactInvalid, match="tailrace retrain"):
        empty.open()


@pytest.mark.parametrize("harm", ["missing", "link", "folder"])
def test_publishing_that_fails_leaves_nothing_behind(registry, staging, harm):
    path = staging / "item_table.npy"
    path.unlink()
    if harm == "link":
        path.symlink_to("/etc/hostname")
    elif harm == "folder":
        path.mkdir()
    with pytest.raises(ArtefactInvalid, match="item_table"):
        registry.publish(staging, manifest("v2"))
    # Other files were copied before the fault was found; none of them is left.
    assert [path.name for path in (registry.root / "versions").iterdir()] == ["v1"]


@pytest.mark.parametrize(
    "table",
    [np.ones((4, 4), np.float32), np.ones((5, 4)), np.full((5, 4), np.nan, np.float32)],
    ids=["rows", "type", "nan"],
)
def test_an_item_table_that_does_not_fit_the_model_is_refused(registry, staging, table):
    np.save(staging / "item_table.npy", table)
    registry.publish(staging, manifest("v2"))
    with pytest.raises(ArtefactInvalid, match="item_table"):
        registry.open("v2").item_table()


def test_pickles_are_never_loaded(registry, staging):
    np.save(staging / "item_table.npy", np.array([{"a": 1}]), allow_pickle=True)
    registry.publish(staging, manifest("v2"))
    with pytest.raises(ArtefactInvalid, match="item_table"):
        registry.open("v2").item_table()


def test_the_registry_needs_no_torch():
    code = "import sys, compression.releases.registry, features.encoding; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
