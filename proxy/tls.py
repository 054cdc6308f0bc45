"""The TLS port: certificates from disk, kept fresh, and how connections negotiate (contract 3.9).

Owns the server's SSL context and its renewal when the certificate changes. What is spoken inside
TLS is the business of the protocol that `TlsPort.secure` wraps. This module imports ssl, so it is
to be imported only where there are certificates.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from weir.proxy import contract
from weir.proxy.environment import CERTIFICATES
from weir.proxy.tls_settings import TlsSettings
from weir.proxy.wire.clients import Clients
from weir.proxy.wire.secure import SecureServer

_log = logging.getLogger(__name__)

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# Python's ssl wants OpenSSL's short names where a TLS handshake has the standard's
_CURVE_NAMES = {"P-256": "prime256v1", "P-384": "secp384r1", "P-521": "secp521r1"}


class TlsFault(Exception):
    """The certificate or a setting can't be used. `str()` is one line that says which and why."""


class TlsPort:
    """Serves TLS with a certificate and its key, which are watched from `watch` on.

    They are `tls.crt` and `tls.key` of a folder, or two `files`. Raises TlsFault when there is no
    usable pair to begin with. Later a pair that can't be used leaves the one before in place.
    `http2` offers HTTP/2 to clients that negotiate; `client_ca` is a file with the roots of
    clients' certificates, which they have to show if `required`. A handshake has `patience`
    seconds, like a head on that port.
    """

    def __init__(
        self,
        settings: TlsSettings | None = None,
        folder: str | Path = CERTIFICATES,
        *,
        files: tuple[str, str] | None = None,
        http2: bool = True,
        client_ca: str = "",
        required: bool = False,
        patience: float | None = None,
        period: float = contract.CERTIFICATE_SECONDS,
    ) -> None:
        self._settings = settings or TlsSettings()
        certificate, key = files or (Path(folder, "tls.crt"), Path(folder, "tls.key"))
        self._certificate, self._key = Path(certificate), Path(key)
        self._client_ca, self._required = client_ca, required
        self._http2 = http2
        self._patience = patience
        self._period = period
        self._timer: asyncio.TimerHandle | None = None
        self.young: Clients[SecureServer] = Clients()
        """Connections that have no TLS yet."""
        self._loaded = self._on_disk()
        self.context = self._load()

    def secure(self, make: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """The factory of protocols for `loop.create_server`; `make` is that of what is inside.

        A certificate that is loaded later is shown to the connections that come after it.
        """

        def protocol() -> asyncio.Protocol:
            connection = SecureServer(
                self.context, make, self.young.discard, self._patience, self.young.turns
            )
            self.young.add(connection)
            return connection

        return protocol

    def watch(self) -> None:
        """From now on look for a new certificate, once a minute. `close` ends it."""
        self._timer = asyncio.get_running_loop().call_later(self._period, self._look)

    def close(self) -> None:
        """Stop watching, and drop connections whose handshake is not over. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in self.young:
            connection.abort()

    def reload(self) -> bool:
        """Take the pair on disk if it is another one, and say whether it was."""
        try:
            found = self._on_disk()
            if found == self._loaded:
                return False
            self.context = self._load()
        except TlsFault as error:
            _log.error("%s; the certificate loaded before stays in use", error)
            return False
        self._loaded = found
        _log.info(contract.CERTIFICATE_RELOADED)
        return True

    def _look(self) -> None:
        self.watch()
        self.reload()

    def _on_disk(self) -> tuple[bytes, bytes]:
        try:
            return self._certificate.read_bytes(), self._key.read_bytes()
        except OSError as error:
            raise TlsFault(f"{error.filename}: {error.strerror}") from None

    def _load(self) -> ssl.SSLContext:
        context = _context(self._settings)
        context.set_alpn_protocols(["h2", "http/1.1"] if self._http2 else ["http/1.1"])
        try:
            # asking for a password on a terminal would wait for ever
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            pair = f"{self._certificate} and {self._key}"
            raise TlsFault(f"{pair} are no certificate and its key: {error}") from None
        if self._client_ca:
            try:
                context.load_verify_locations(self._client_ca)
            except (OSError, ValueError) as error:
                raise TlsFault(f"{self._client_ca} has no certificates: {error}") from None
            context.verify_mode = ssl.CERT_REQUIRED if self._required else ssl.CERT_OPTIONAL
        return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _context(settings: TlsSettings) -> ssl.SSLContext:
    """The context without its certificate. Raises TlsFault for what this OpenSSL can't do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.minimum_version = _VERSIONS[settings.min_version]
    if settings.max_version:
        context.maximum_version = _VERSIONS[settings.max_version]
    if settings.cipher_suites:
        try:
            context.set_ciphers(":".join(settings.cipher_suites))
        except ssl.SSLError as error:
            raise TlsFault(f"QUEUE_PROXY_TLS_CIPHER_SUITES: {error}") from None
    if settings.curves:
        _restrict_curves(context, settings.curves)
    return context


def _restrict_curves(context: ssl.SSLContext, curves: tuple[str, ...]) -> None:
    """Python's ssl takes one curve, so it is the first one that this OpenSSL knows.

    That allows nothing that was not asked for; a client that knows only one of the others is
    turned away, where Go's server would have taken it.
    """
    for curve in curves:
        try:
            context.set_ecdh_curve(_CURVE_NAMES.get(curve, curve))
        except (ValueError, ssl.SSLError):
            continue
        if curves != (curve,):
            _log.warning(
                "QUEUE_PROXY_TLS_CURVE_PREFERENCES: only %s is offered, of %s",
                curve,
                ", ".join(curves),
            )
        return
    raise TlsFault(
        f"QUEUE_PROXY_TLS_CURVE_PREFERENCES: {ssl.OPENSSL_VERSION} knows none of"
        f" {', '.join(curves)}"
    )
