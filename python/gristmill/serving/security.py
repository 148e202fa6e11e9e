"""Who may ask, and where the server may listen."""

import hashlib
import hmac
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path

from gristmill.errors import ServingError

log = logging.getLogger("gristmill.serving")

CREDENTIALS = ("authorization", "x-api-key")  # header and metadata names that may carry the key
Tls = tuple[str | os.PathLike[str], str | os.PathLike[str]]  # certificate chain and private key, PEM files


class ApiKey:
    """A secret that is compared in constant time and never shown.

    Only its hash is kept, so that neither a traceback nor a dump of this object reveals it.

    Raises:
        ServingError: the key is empty, blank, or holds characters that a header cannot carry.

    Example:
        >>> key = ApiKey("a long random string")
        >>> key, key.admits([("x-api-key", "guess")]), key.admits([("authorization", "Bearer a long random string")])
        (ApiKey(***), False, True)
    """

    __slots__ = ("_digest",)

    def __init__(self, key: str) -> None:
        if not isinstance(key, str):
            raise ServingError(f"api_key must be a text, got {type(key).__name__}")
        if not key.strip():
            raise ServingError("api_key is empty; give a long random string, or None to serve without a key")
        if key != key.strip() or not key.isascii() or not key.isprintable():
            raise ServingError("api_key must be printable ASCII without spaces at its ends")
        self._digest = hashlib.sha256(key.encode()).digest()

    def admits(self, credentials: Iterable[tuple[str, str | bytes]]) -> bool:
        """Say whether a header or metadata entry carries the key: `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Args:
            credentials: (lower-case name, value) pairs; other names are ignored.
        """
        admitted = False
        for name, value in credentials:
            if name in CREDENTIALS:
                given = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
                if name == "authorization":
                    scheme, _, given = given.partition(b" ")
                    given = given.strip() if scheme.lower() == b"bearer" else b""
                admitted |= hmac.compare_digest(hashlib.sha256(given).digest(), self._digest)
        return admitted

    def __repr__(self) -> str:
        return "ApiKey(***)"


def check_exposure(host: str, key: ApiKey | None, tls: Tls | None, insecure: bool) -> None:
    """Refuse to listen beyond this machine without both a key and TLS.

    Raises:
        ServingError: the address is not a loopback address and neither (key and TLS) nor `insecure` is given.
    """
    if is_loopback(host):
        return
    missing = [name for name, given in (("api_key", key), ("tls", tls)) if given is None]
    if not missing:
        return
    if not insecure:
        raise ServingError(
            f"host {host!r} is reachable from other machines, and {' and '.join(missing)} would be missing: give both api_key and"
            " tls=(certificate, private key), or pass insecure=True if a proxy in front does the work"
        )
    log.warning("serving on %s without %s because insecure=True", host, " and ".join(missing))


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address. Names other than localhost are taken as reachable."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_address(host: str) -> str:
    """Resolve a host to the one numeric address that both servers bind.

    Raises:
        ServingError: it is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ServingError(f"host {host!r} cannot be resolved: {error}") from error
    return str(found[0][4][0])


def read_tls(tls: Tls) -> tuple[bytes, bytes]:
    """Return the certificate chain and the private key after checking that they belong together.

    Raises:
        ServingError: a file is missing, is not PEM, or the two do not match.
    """
    if not isinstance(tls, tuple) or len(tls) != 2 or not all(isinstance(file, (str, os.PathLike)) for file in tls):
        raise ServingError("tls must be a pair of file names: (certificate, private key)")
    try:
        # An empty password keeps OpenSSL from asking for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls[0], tls[1], password="")
        return Path(tls[0]).read_bytes(), Path(tls[1]).read_bytes()
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ServingError(f"tls: cannot use {os.fspath(tls[0])!r} and {os.fspath(tls[1])!r}: {error}") from error
