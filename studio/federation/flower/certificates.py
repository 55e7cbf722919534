"""Certificates and keys of a deployment: an authority, the server's certificate, and a key pair for each client.

``authority.crt`` goes to every client, ``server.crt`` and ``server.key`` stay with the server, ``NAME.key`` goes to the
client NAME alone, and the server registers ``NAME.pub``. Keys are elliptic curves (P-384), as Flower expects.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import InputError, MissingDependencyError

AUTHORITY, SERVER, KEY = "authority.crt", "server.crt", "server.key"
DAYS = 365


def make(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """Write certificates and keys into ``folder``; existing ones are kept, so that a client can be added later.

    Args:
        hosts: names and addresses at which clients reach the server.

    Raises:
        InputError: no host, or a folder with the certificates of another host.
        MissingDependencyError: the package cryptography is not installed.
    """
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise MissingDependencyError("cryptography", "federated", "Making certificates") from None
    if not hosts:
        raise InputError("Name the host at which clients reach the server.")
    made = []
    if not (folder / SERVER).is_file():
        made += _server(folder, hosts)
    elif missing := [host for host in hosts if host not in hosts_of(folder / SERVER)]:
        raise InputError(
            f"'{folder / SERVER}' is for {', '.join(hosts_of(folder / SERVER))}, not for '{missing[0]}': name a new "
            "folder."
        )
    for name in clients:
        if not (folder / f"{name}.key").is_file():
            made += _client(folder, name)
    return made


def hosts_of(certificate: Path) -> list[str]:
    """Names and addresses that a certificate is for."""
    from cryptography import x509

    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _server(folder: Path, hosts: Sequence[str]) -> list[Path]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    root, own = _key(), _key()
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    authority = _certificate("Adapter Studio federation", root, root, None, [(constraints, True), (_usage(True), True)])
    names = x509.SubjectAlternativeName([_name(host) for host in hosts])
    extensions = [
        (x509.BasicConstraints(ca=False, path_length=None), True), (names, False), (_usage(False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ]  # fmt: skip
    server = _certificate(hosts[0], own, root, authority, extensions)
    return [
        _write(folder / AUTHORITY, _pem(authority)),
        _write(folder / SERVER, _pem(server)),
        _write(folder / KEY, _private(own), secret=True),
    ]


def _client(folder: Path, name: str) -> list[Path]:
    from cryptography.hazmat.primitives import serialization

    key = _key()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return [_write(folder / f"{name}.key", secret, secret=True), _write(folder / f"{name}.pub", public)]


def _key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _certificate(name: str, key: Any, root: Any, authority: Any, extensions: Sequence[tuple[Any, bool]]) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority is not None else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
    )
    for extension, critical in extensions:
        made = made.add_extension(extension, critical)
    return made.sign(root, hashes.SHA384())


def _usage(authority: bool) -> Any:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=not authority, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    found: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return found


def _private(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    found: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return found


def _write(target: Path, content: bytes, secret: bool = False) -> Path:
    return files.write(target, lambda part: part.write_bytes(content), private=secret)
