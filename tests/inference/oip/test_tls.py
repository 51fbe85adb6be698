"""TLS on both fronts, clients' certificates, and files that cannot be used."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from aiohttp import ClientError, ClientSession
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from compression.releases.registry import Registry
from inference.errors import InferenceError
from inference.oip import tls
from inference.oip.client import Client
from inference.oip.settings import ServeSettings
from tests.inference.oip.conftest import ADMIN_TOKEN, Running, list_inputs

NOW = datetime.now(UTC)


class Authority:
    """Signs certificates of 127.0.0.1."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        basic = x509.BasicConstraints(ca=True, path_length=None)
        made = self._builder(self.name, self.key).add_extension(basic, critical=True)
        self.file.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        starts: datetime = NOW - timedelta(days=1),
        encryption: KeySerializationEncryption | None = None,
    ) -> tuple[Path, Path]:
        """Files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        made = self._builder(subject, key, starts).add_extension(address, critical=False)
        certificate, key_file = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
        )
        key_file.chmod(0o600)
        return certificate, key_file

    def _builder(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        starts: datetime = NOW - timedelta(days=1),
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(starts)
            .not_valid_after(starts + timedelta(days=2))
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


async def rest(running: Running, context: ssl.SSLContext | bool = True, scheme: str = "https") -> int:
    async with (
        ClientSession() as session,
        session.get(f"{scheme}://{running.http}/v2/health/ready", ssl=context) as response,
    ):
        return response.status


async def lists(running: Running, credentials: grpc.ChannelCredentials | None) -> int:
    async with Client(running.grpc, credentials=credentials, timeout_s=3.0) as client:
        answer = await client.infer("tailrace-lists", list_inputs(1, 3))
        return int(answer["counts"][0])


async def test_both_fronts_speak_tls_and_nothing_else(registry: Registry, authority: Authority) -> None:
    certificate, key = authority.issue("server")
    context = ssl.create_default_context(cafile=str(authority.file))
    trusting = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with Running(registry, tls_certificate=certificate, tls_key=key, admin_host="0.0.0.0") as running:
        assert await rest(running, context) == 200
        assert await lists(running, trusting) == 10
        with pytest.raises(ClientError):
            await rest(running, scheme="http")
        with pytest.raises(ClientError):
            await rest(running)  # an authority it does not know
        with pytest.raises(InferenceError):
            await lists(running, None)
        # Beyond loopback the admin listener's token is not sent in the clear either.
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with (
            ClientSession(headers=headers) as session,
            session.get(f"https://{running.admin}/versions", ssl=context) as response,
        ):
            assert response.status == 200


async def test_with_an_authority_for_clients_only_those_it_knows_are_served(
    registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("server")
    own, own_key = authority.issue("client")
    stranger, strangers_key = Authority(tmp_path, "another").issue("stranger")
    root = authority.file.read_bytes()
    context = ssl.create_default_context(cafile=str(authority.file))
    with Running(registry, tls_certificate=certificate, tls_key=key, tls_client_ca=authority.file) as running:
        with pytest.raises(ClientError):
            await rest(running, context)
        with pytest.raises(InferenceError):
            await lists(running, grpc.ssl_channel_credentials(root))
        unknown = grpc.ssl_channel_credentials(root, strangers_key.read_bytes(), stranger.read_bytes())
        with pytest.raises(InferenceError):
            await lists(running, unknown)
        context.load_cert_chain(own, own_key)
        assert await rest(running, context) == 200
        known = grpc.ssl_channel_credentials(root, own_key.read_bytes(), own.read_bytes())
        assert await lists(running, known) == 10


def _settings(certificate: Path | None, key: Path | None, ca: Path | None = None) -> ServeSettings:
    return ServeSettings(tls_certificate=certificate, tls_key=key, tls_client_ca=ca)


def _garbage(authority: Authority) -> Path:
    path = authority.folder / "garbage.pem"
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    return path


def _large(authority: Authority) -> Path:
    path = authority.folder / "large.pem"
    path.write_bytes(b"x" * (tls.MAX_PEM_BYTES + 1))
    return path


WRONG: dict[str, tuple[Callable[[Authority], ServeSettings], str]] = {
    "no key": (lambda a: _settings(a.issue("x")[0], None), "SERVE_TLS_KEY is not set"),
    "no certificate": (lambda a: _settings(None, a.issue("x")[1]), "SERVE_TLS_CERTIFICATE is not set"),
    "only an authority": (lambda a: _settings(None, None, a.file), "SERVE_TLS_CERTIFICATE is not set"),
    "a file that is not there": (
        lambda a: _settings(a.folder / "none", a.issue("x")[1]),
        "none cannot be read: No such file",
    ),
    "a folder": (lambda a: _settings(a.folder, a.issue("x")[1]), "cannot be read: Is a directory"),
    "a certificate that is none": (
        lambda a: _settings(_garbage(a), a.issue("x")[1]),
        "garbage.pem holds no certificate",
    ),
    "a key that is none": (lambda a: _settings(a.issue("x")[0], _garbage(a)), "holds no private key"),
    "a key that is a certificate": (lambda a: _settings(*2 * (a.issue("x")[0],)), "holds no private key"),
    "another's key": (lambda a: _settings(a.issue("x")[0], a.issue("y")[1]), "y.key is not the key of"),
    "an encrypted key": (
        lambda a: _settings(*a.issue("x", encryption=BestAvailableEncryption(b"secret"))),
        "x.key is encrypted",
    ),
    "a certificate of the past": (
        lambda a: _settings(*a.issue("x", starts=NOW - timedelta(days=9))),
        "not now",
    ),
    "one of the future": (lambda a: _settings(*a.issue("x", starts=NOW + timedelta(days=9))), "not now"),
    "an authority that is none": (
        lambda a: _settings(*a.issue("x"), _garbage(a)),
        "garbage.pem holds no certificate",
    ),
    "a file too large": (lambda a: _settings(_large(a), a.issue("x")[1]), "larger than any"),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_cannot_be_used_are_a_sentence_before_anything_listens(
    what: str, authority: Authority
) -> None:
    make, sentence = WRONG[what]
    with pytest.raises(tls.TlsInvalid, match=sentence):
        tls.load(make(authority))


def test_a_key_that_others_can_read_is_used_and_said(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = authority.issue("x")
    assert tls.load(_settings(certificate, key)) is not None
    assert caplog.text == ""
    key.chmod(0o644)
    assert tls.load(_settings(certificate, key)) is not None
    assert "x.key can be read by others" in caplog.text


def test_without_files_there_is_no_tls() -> None:
    assert tls.load(ServeSettings()) is None
