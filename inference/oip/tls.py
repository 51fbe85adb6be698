"""The server's certificate and key, looked at before it listens: what is wrong is a sentence."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from inference.oip.settings import ServeSettings

log = logging.getLogger(__name__)

MAX_PEM_BYTES: Final = 2**20

P = TypeVar("P")


class TlsInvalid(ValueError):
    """A certificate, key or authority that cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Tls:
    """What REST speaks, and gRPC, from files that are read once."""

    context: ssl.SSLContext
    h2: ssl.SSLContext


def load(settings: ServeSettings, now: datetime | None = None) -> Tls | None:
    """What the settings name, None where they name nothing. Raises `TlsInvalid`."""
    files = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if not any(files):
        return None
    certificate_file, key_file, ca_file = files
    if certificate_file is None or key_file is None:
        missing = "SERVE_TLS_KEY" if certificate_file else "SERVE_TLS_CERTIFICATE"
        raise TlsInvalid(f"TLS needs a certificate and its key: {missing} is not set")
    certificate, key = _read(certificate_file), _read(key_file)
    (leaf, *_) = _parsed(certificate_file, certificate, x509.load_pem_x509_certificates, "certificate")
    try:
        private = _parsed(key_file, key, lambda data: load_pem_private_key(data, None), "private key")
    except TypeError:
        raise TlsInvalid(f"{key_file} is encrypted: the server has nobody to ask for a passphrase") from None
    spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*spki) != leaf.public_key().public_bytes(*spki):
        raise TlsInvalid(f"{key_file} is not the key of {certificate_file}")
    now = now or datetime.now(UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        span = f"{leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}"
        raise TlsInvalid(f"{certificate_file} is valid from {span}, not now")
    if key_file.stat().st_mode & 0o077:
        log.warning("%s can be read by others on this machine", key_file)
    client_ca = None
    if ca_file is not None:
        client_ca = _read(ca_file)
        _parsed(ca_file, client_ca, x509.load_pem_x509_certificates, "certificate")
    context, h2 = (_context(certificate_file, key_file, client_ca) for _ in range(2))
    h2.set_alpn_protocols(["h2"])
    return Tls(context, h2)


def _context(certificate: Path, key: Path, client_ca: bytes | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(cadata=client_ca.decode("ascii", "replace"))
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError) as error:
        raise TlsInvalid(f"{certificate} cannot be used: {error}") from error
    return context


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise TlsInvalid(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_PEM_BYTES:
        raise TlsInvalid(f"{path} is larger than any certificate or key")
    return data


def _parsed(path: Path, data: bytes, parse: Callable[[bytes], P], what: str) -> P:
    try:
        return parse(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TlsInvalid(f"{path} holds no {what} in PEM") from error
