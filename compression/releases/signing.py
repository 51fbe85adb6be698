"""Who published a version: Ed25519 over the bytes of its manifest, which hold the SHA-256 of every file.

    versions/<version>/manifest.sig    {"algorithm": "ed25519", "key_id": …, "signature": base64}

Trust lies outside the registry, or who can alter a version could alter that too: public keys (PEM) in
the folder or file that TAILRACE_TRUSTED_KEYS names, else in `keys/` of this machine's `.tailrace`. A
signature is required as soon as there is a trusted key; TAILRACE_REQUIRE_SIGNATURE=yes or no says
otherwise. The private key is the file that TAILRACE_SIGNING_KEY names.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from compression.errors import ArtefactInvalid
from compression.files import write_whole
from compression.home import home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

log = logging.getLogger(__name__)

SIGNATURE: Final = "manifest.sig"
MAX_SIGNATURE_BYTES: Final = 4096
MAX_KEY_BYTES: Final = 64 * 1024
ALGORITHM: Final = "ed25519"

_PEM: Final = re.compile(rb"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----", re.DOTALL)
_YES: Final = {"1", "yes", "true", "on"}
_NO: Final = {"0", "no", "false", "off"}


@dataclass(frozen=True, slots=True)
class Trust:
    """Public keys by their id, and whether a version without a signature is refused."""

    keys: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    required: bool = False

    @classmethod
    def from_environment(cls) -> Trust:
        """What this machine trusts. A key that cannot be read is `ArtefactInvalid`, not one key less."""
        told = os.environ.get("TAILRACE_TRUSTED_KEYS")
        keys = _public_keys(trusted_keys_path(), must_exist=bool(told))
        wish = os.environ.get("TAILRACE_REQUIRE_SIGNATURE", "").strip().lower()
        if wish not in _YES | _NO | {""}:
            raise ArtefactInvalid(f"TAILRACE_REQUIRE_SIGNATURE is yes or no, not {wish!r}")
        # Somebody who names a place for keys wants signatures, also while that place is empty.
        return cls(keys, wish in _YES or (wish == "" and bool(keys or told)))

    def check(self, version: str, manifest: bytes, signature: bytes | None) -> str | None:
        """The id of the trusted key that signed these bytes. None where the version is unsigned, or
        nobody is trusted, and that is allowed; else `ArtefactInvalid` with the reason."""
        if signature is None:
            if self.required:
                raise ArtefactInvalid(
                    f"{version}: it is not signed, and only signed versions are used here; "
                    f"`tailrace models sign {version}` signs it with the key that TAILRACE_SIGNING_KEY names"
                )
            _warn("Versions without a signature are used; `tailrace models keygen` makes a key to sign with")
            return None
        key_id, signed = _parse(version, signature)
        key = self.keys.get(key_id)
        if key is None:
            if not self.keys and not self.required:
                _warn("Signatures are not checked: no key is trusted here; TAILRACE_TRUSTED_KEYS names them")
                return None
            raise ArtefactInvalid(
                f"{version}: it is signed by key {key_id[:16]}, which is not trusted here: its public key "
                "belongs where TAILRACE_TRUSTED_KEYS says, or in .tailrace/keys"
            )
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(signed, manifest)
        except InvalidSignature:
            raise ArtefactInvalid(f"{version}: the signature is not of this manifest") from None
        return key_id


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key and the id of its public one."""

    key: Ed25519PrivateKey
    key_id: str

    @classmethod
    def from_environment(cls) -> Signer | None:
        """The key that TAILRACE_SIGNING_KEY names, or None; `ArtefactInvalid` where it is no key."""
        told = os.environ.get("TAILRACE_SIGNING_KEY")
        return cls.load(Path(told)) if told else None

    @classmethod
    def load(cls, path: Path) -> Signer:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        data = _bytes(path)
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ArtefactInvalid(f"{path} is not an Ed25519 private key in PEM; `tailrace models keygen`")
        return cls(key, key_id(key.public_key()))

    def sign(self, manifest: bytes) -> bytes:
        """The content of `manifest.sig` for a manifest."""
        signature = base64.b64encode(self.key.sign(manifest)).decode()
        body = {"algorithm": ALGORITHM, "key_id": self.key_id, "signature": signature}
        return json.dumps(body, indent=1).encode()


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Where a new key pair was written."""

    key_id: str
    private: Path
    public: Path


def generate(private: Path | None = None, trusted: Path | None = None) -> KeyPair:
    """Make a key pair; the public half is trusted from now on. An existing private key is kept.

    Raises `FileExistsError` for it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = private or home() / "signing-key.pem"
    trusted = trusted or trusted_keys_path()
    if private.exists():
        raise FileExistsError(f"{private} exists already and is kept")
    key = Ed25519PrivateKey.generate()
    ours = key_id(key.public_key())
    public = trusted / f"{ours[:16]}.pem" if not trusted.is_file() else trusted
    written = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_whole(
        private,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        mode=0o600,
    )
    before = _bytes(public) if public.is_file() else b""
    write_whole(public, before + written)
    return KeyPair(ours, private, public)


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the 32 bytes of a public key, in hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def trusted_keys_path() -> Path:
    """The folder or file of public keys."""
    told = os.environ.get("TAILRACE_TRUSTED_KEYS")
    return Path(told) if told else home() / "keys"


def _public_keys(path: Path, *, must_exist: bool) -> dict[str, Ed25519PublicKey]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == ".pem")
    elif path.exists() or must_exist:
        files = [path]
    else:
        files = []
    keys: dict[str, Ed25519PublicKey] = {}
    for file in files:
        blocks = _PEM.findall(_bytes(file))
        if not blocks:
            raise ArtefactInvalid(f"{file} holds no key in PEM")
        for block in blocks:
            key = _public_key(block, file)
            keys[key_id(key)] = key
    return keys


def _public_key(block: bytes, file: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(block)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ArtefactInvalid(f"{file} is not an Ed25519 public key in PEM, as every trusted key must be")
    return key


def _parse(version: str, data: bytes) -> tuple[str, bytes]:
    try:
        body = json.loads(data)
        algorithm, key_id_, text = body["algorithm"], body["key_id"], body["signature"]
        signature = base64.b64decode(text, validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise ArtefactInvalid(f"{version}: {SIGNATURE} is not a signature") from None
    if algorithm != ALGORITHM or not isinstance(key_id_, str) or len(signature) != 64:
        raise ArtefactInvalid(f"{version}: {SIGNATURE} is not an {ALGORITHM} signature")
    return key_id_, signature


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise ArtefactInvalid(f"{path} cannot be read: {error.strerror}") from None


@functools.cache
def _warn(sentence: str) -> None:
    """Once per process."""
    log.warning("%s", sentence)
