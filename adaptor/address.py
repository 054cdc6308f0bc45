"""Where a broker is, who we are to it, and what keeps the connection private.

Owns broker URLs, TLS settings, and the files that credentials and certificates are read from: anew
for every connection, so that a renewed token or certificate needs no restart. Every error says
which file or which part of the URL is at fault and what to do. Knows nothing of sessions.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_PATH = "/mqtt"
"""Of a websocket whose URL has none; what most brokers and their proxies use."""

LONGEST_CREDENTIAL = 65_535
"""Bytes that an MQTT string can hold."""


class BrokerError(Exception):
    """The broker can't be used right now; str() says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class Broker:
    """`str()` never shows the password. `path`: of a websocket, None for plain TCP or TLS.

    `certificate` and `key`: ours, PEM (the key may be in the certificate's file). `server_name`:
    for SNI and the check of the broker's certificate, when it is not the host.
    """

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: Path | None = None
    path: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    username_file: Path | None = None
    password_file: Path | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        ca: Path | None = None,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        server_name: str | None = None,
        alpn: tuple[str, ...] = (),
        username_file: Path | None = None,
        password_file: Path | None = None,
    ) -> Broker:
        """From mqtt://user:password@host:1883, mqtts://host:8883, ws://host/path or wss://...

        Raises ValueError.
        """
        parts = urlsplit(url)
        if parts.scheme not in _PORTS:
            raise ValueError(
                f"broker `{parts.scheme or url}`: write mqtt://host:port, mqtts:// for TLS, "
                "or ws:// and wss:// for websockets"
            )
        websocket, tls = parts.scheme in ("ws", "wss"), parts.scheme in ("mqtts", "wss")
        behind = parts.path.strip("/") or parts.query
        if not parts.hostname or parts.fragment or (behind and not websocket):
            raise ValueError("the broker URL has a host and a port and nothing after them")
        if not tls and (certificate or key or ca or server_name or alpn):
            raise ValueError(
                f"{parts.scheme}:// has no TLS, so a CA, certificate, key, server name or ALPN has "
                f"no effect; write {'wss' if websocket else 'mqtts'}://, or leave them out"
            )
        if key and not certificate:
            raise ValueError("a key needs the certificate that it belongs to; give both")
        if (parts.username and username_file) or (parts.password and password_file):
            raise ValueError("the broker URL has what a file is named for; leave out one of them")
        path = None
        if websocket:
            path = (parts.path if parts.path.strip("/") else DEFAULT_PATH) + (
                f"?{parts.query}" if parts.query else ""
            )
        return cls(
            parts.hostname,
            parts.port or _PORTS[parts.scheme],
            tls,
            None if parts.username is None else unquote(parts.username),
            None if parts.password is None else unquote(parts.password),
            *(ca, path, certificate, key, server_name, tuple(alpn), username_file, password_file),
        )

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        scheme = "mqtt" if self.path is None else "ws"
        return f"{scheme}{'s' if self.tls else ''}://{self.address}{self.path or ''}"

    # --- credentials ---

    def credentials(self) -> tuple[str | None, str | None]:
        """User and password as they are now. Raises BrokerError."""
        username, password = self.username, self.password
        if self.username_file is not None:
            username = self._secret(self.username_file, "user name")
        if self.password_file is not None:
            password = self._secret(self.password_file, "password or token")
        return username, password

    def _secret(self, path: Path, what: str) -> str:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BrokerError(
                f"can't read the {what} for the broker {self} from {path}: {_said(error)}; "
                "check that the file is there and readable"
            ) from error
        text = text.removesuffix("\n").removesuffix("\r")
        if not text or "\0" in text or len(text.encode()) > LONGEST_CREDENTIAL:
            raise BrokerError(
                f"the {what} for the broker {self} in {path} is empty, too long or binary; "
                "the file must hold it and nothing else"
            )
        return text

    @property
    def credentials_are(self) -> str:
        """Where to look when the broker refuses them."""
        files = [str(each) for each in (self.username_file, self.password_file) if each]
        return f"in {' and '.join(files)}" if files else "in the broker URL"

    # --- TLS ---

    @property
    def expected_name(self) -> str:
        return self.server_name or self.host

    def ssl_context(self) -> ssl.SSLContext | None:
        """Reads the CA, or the system's, and our certificate. Raises BrokerError."""
        if not self.tls:
            return None
        context = _Named(ssl.PROTOCOL_TLS_CLIENT)
        context.server_name = self.expected_name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca is None:
            context.load_default_certs()
        else:
            self._load(self.ca, "CA", lambda: context.load_verify_locations(cafile=str(self.ca)))
        if self.certificate is not None:
            files = " and ".join(str(each) for each in (self.certificate, self.key) if each)
            self._load(
                Path(files),
                "client certificate",
                lambda: context.load_cert_chain(
                    str(self.certificate), None if self.key is None else str(self.key), _no_password
                ),
            )
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        return context

    def _load(self, path: Path, what: str, load: Any) -> None:
        try:
            load()
        except ssl.SSLError as error:
            advice = "it must be PEM (-----BEGIN ...)"
            if "MISMATCH" in str(error):
                advice = "the key does not belong to the certificate; give the pair"
            raise BrokerError(
                f"can't use the {what} for the broker {self} from {path}: {_said(error)}; {advice}"
            ) from error
        except OSError as error:
            raise BrokerError(
                f"can't read the {what} for the broker {self} from {path}: {_said(error)}; "
                "check that the file is there and readable"
            ) from error
        except _EncryptedKey as error:
            raise BrokerError(
                f"the key of the {what} for the broker {self} in {path} is encrypted; "
                "store it without a passphrase and guard it by file permissions"
            ) from error

    def unreachable(self, error: BaseException) -> BrokerError:
        """No connection, in words."""
        why, advice = _why_unreachable(error, self)
        return BrokerError(f"can't reach the broker {self}: {why}; {advice}")


class _Named(ssl.SSLContext):
    """Checks one name, whatever name its user dials: paho has no setting for that."""

    server_name: str

    def wrap_socket(self, *args: Any, **more: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*args, **more | {"server_hostname": self.server_name})


class _EncryptedKey(Exception):
    """OpenSSL wants a passphrase, which it would ask the terminal for."""


def _no_password() -> str:
    raise _EncryptedKey


def _said(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).replace("_", " ").lower()
    return str(getattr(error, "strerror", None) or error or "it does not answer")


def _why_unreachable(error: BaseException, broker: Broker) -> tuple[str, str]:
    """What happened, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"certificate verify failed: {error.verify_message}"
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
            return why, "use a name that its certificate has, or say it with --broker-server-name"
        if error.verify_code in (9, 10):  # not yet valid, expired
            return why, "renew the broker's certificate, or set this machine's clock"
        given = f"is {broker.ca} the right CA?" if broker.ca else "give its CA with --broker-ca"
        return why, given
    if isinstance(error, ssl.SSLError):
        why = f"TLS failed: {_said(error)}"
        if "certificate required" in why or "handshake failure" in why:
            return why, "it wants a client certificate: --broker-cert and --broker-key"
        return why, "check that this port speaks TLS"
    if isinstance(error, socket.gaierror):
        return f"its name does not resolve: {_said(error)}", "check the host in the broker URL"
    return _said(error), "check the broker URL and that the broker runs"
