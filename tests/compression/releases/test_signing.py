"""Only what a trusted key signed is opened; whatever else is said by a signature, a sentence says no."""

import base64
import json
import shutil
import stat

import pytest

from compression.releases.registry import ArtefactInvalid, Registry
from compression.releases.signing import Signer, Trust, generate, trusted_keys_path
from tests.compression.versions import manifest, stage


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A machine of its own: nothing trusted, nothing to sign with."""
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path / "home"))
    for name in ("TAILRACE_TRUSTED_KEYS", "TAILRACE_SIGNING_KEY", "TAILRACE_REQUIRE_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def keys(place, monkeypatch):
    pair = generate()
    monkeypatch.setenv("TAILRACE_SIGNING_KEY", str(pair.private))
    return pair


def published(place, version="v1"):
    registry = Registry(place / "models")
    registry.publish(stage(place / f"staging-{version}"), manifest(version))
    return registry


def signature_of(registry, version="v1"):
    return registry.root / "versions" / version / "manifest.sig"


def test_a_published_version_is_signed_and_opened_with_the_key_made_here(place, keys):
    registry = published(place)
    assert registry.open("v1").version == "v1"
    assert registry.signed_by("v1") == keys.key_id
    assert stat.S_IMODE(keys.private.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        generate()


def test_without_any_key_unsigned_versions_are_used_with_one_warning(place, caplog):
    registry = published(place)
    registry.open("v1")
    registry.open("v1")
    assert registry.signed_by("v1") is None
    assert len([record for record in caplog.records if "keygen" in record.message]) <= 1


def test_with_a_trusted_key_a_missing_signature_is_refused_until_it_is_signed(place, keys, monkeypatch):
    registry = published(place)
    signature_of(registry).unlink()
    with pytest.raises(ArtefactInvalid, match="not signed"):
        registry.open("v1")
    assert registry.sign("v1") == keys.key_id
    registry.open("v1")
    signature_of(registry).unlink()
    monkeypatch.setenv("TAILRACE_REQUIRE_SIGNATURE", "no")
    registry.open("v1")


@pytest.mark.parametrize("change", [b" ", b"\n"])
def test_one_byte_more_in_a_signed_manifest_is_refused(place, keys, change):
    registry = published(place)
    path = registry.root / "versions" / "v1" / "manifest.json"
    path.write_bytes(path.read_bytes() + change)
    with pytest.raises(ArtefactInvalid, match="signature is not of this manifest"):
        registry.open("v1")


def test_a_file_swapped_together_with_its_checksum_is_refused(place, keys):
    registry = published(place)
    folder = registry.root / "versions" / "v1"
    other = Registry(place / "other").publish(stage(place / "another", graph=b"other"), manifest())
    fields = json.loads((folder / "manifest.json").read_text())
    fields["files"]["rank.onnx"] = other.files["rank.onnx"].model_dump()
    shutil.copyfile(place / "other/versions/v1/rank.onnx", folder / "rank.onnx")
    (folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ArtefactInvalid, match="signature is not of this manifest"):
        registry.open("v1")


def test_the_signature_of_another_version_is_refused(place, keys):
    registry = published(place)
    published(place, "v2")
    shutil.copyfile(signature_of(registry, "v2"), signature_of(registry))
    with pytest.raises(ArtefactInvalid, match="signature is not of this manifest"):
        registry.open("v1")


def test_a_signature_of_a_foreign_key_is_refused(place, keys, monkeypatch):
    stranger = generate(place / "stranger.pem", place / "strangers-keys")
    monkeypatch.setenv("TAILRACE_SIGNING_KEY", str(stranger.private))
    registry = published(place)
    with pytest.raises(ArtefactInvalid, match=f"{stranger.key_id[:16]}, which is not trusted"):
        registry.open("v1")
    body = json.loads(signature_of(registry).read_text())
    signature_of(registry).write_text(json.dumps(body | {"key_id": keys.key_id}))
    with pytest.raises(ArtefactInvalid, match="signature is not of this manifest"):
        registry.open("v1")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"algorithm": "ed25519", "key_id": "x", "signature": "???"}',
        b'{"algorithm": "none", "key_id": "x", "signature": ""}',
        b'{"algorithm": "ed25519", "key_id": {}, "signature": "%s"}' % base64.b64encode(b"x" * 64),
        b"[" * 100_000,
        b"\xff" * 10_000,
    ],
    ids=range(10),
)
def test_a_garbled_signature_is_refused(place, keys, data):
    registry = published(place)
    signature_of(registry).write_bytes(data)
    with pytest.raises(ArtefactInvalid, match="signature"):
        registry.open("v1")


def test_a_signature_that_is_a_link_is_refused(place, keys):
    registry = published(place)
    signature_of(registry).rename(place / "elsewhere")
    signature_of(registry).symlink_to(place / "elsewhere")
    with pytest.raises(ArtefactInvalid, match=r"manifest\.sig"):
        registry.open("v1")


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"]
)
def test_a_trusted_key_that_cannot_be_read_trusts_nobody(place, keys, content):
    registry = published(place)
    (trusted_keys_path() / "broken.pem").write_bytes(content)
    with pytest.raises(ArtefactInvalid, match=r"broken\.pem"):
        registry.open("v1")


def test_a_private_key_among_the_trusted_ones_is_refused(place, keys):
    shutil.copyfile(keys.private, trusted_keys_path() / "oops.pem")
    with pytest.raises(ArtefactInvalid, match=r"oops\.pem is not an Ed25519 public key"):
        Trust.from_environment()


def test_a_place_for_keys_that_is_empty_or_missing_trusts_nobody(place, monkeypatch):
    registry = published(place)
    monkeypatch.setenv("TAILRACE_TRUSTED_KEYS", str(place / "keys-of-the-shop"))
    with pytest.raises(ArtefactInvalid, match="keys-of-the-shop"):
        registry.open("v1")
    (place / "keys-of-the-shop").mkdir()
    with pytest.raises(ArtefactInvalid, match="not signed"):
        registry.open("v1")


def test_one_file_may_hold_several_keys(place, keys, monkeypatch):
    second = generate(place / "second.pem", place / "second")
    both = place / "both.pem"
    both.write_bytes(keys.public.read_bytes() + second.public.read_bytes())
    monkeypatch.setenv("TAILRACE_TRUSTED_KEYS", str(both))
    assert set(Trust.from_environment().keys) == {keys.key_id, second.key_id}
    monkeypatch.setenv("TAILRACE_SIGNING_KEY", str(second.private))
    registry = published(place)
    assert registry.signed_by("v1") == second.key_id


def test_training_is_refused_at_once_where_its_result_could_not_be_opened(place, keys, monkeypatch):
    registry = Registry(place / "models")
    registry.check_publishing()
    monkeypatch.delenv("TAILRACE_SIGNING_KEY")
    with pytest.raises(ArtefactInvalid, match="TAILRACE_SIGNING_KEY"):
        registry.check_publishing()
    stranger = generate(place / "stranger.pem", place / "strangers-keys")
    monkeypatch.setenv("TAILRACE_SIGNING_KEY", str(stranger.private))
    with pytest.raises(ArtefactInvalid, match="not among those trusted"):
        registry.check_publishing()


def test_a_signing_key_that_is_none_is_a_sentence(place):
    (place / "key").write_text("no key")
    with pytest.raises(ArtefactInvalid, match="not an Ed25519 private key"):
        Signer.load(place / "key")
    with pytest.raises(ArtefactInvalid, match="cannot be read"):
        Signer.load(place / "nowhere")
