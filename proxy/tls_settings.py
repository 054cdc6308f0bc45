"""How a TLS port negotiates, as the environment says it (contract section 1.1).

Owns the names of versions, suites and groups, Go's and OpenSSL's. Which variables there are is the
business of `environment`. No ssl is imported here: a sidecar without TLS does not load it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

TLS_VERSIONS = ("1.2", "1.3")
TLS12_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
}
"""TLS 1.2 suites by the names of IANA and Go, with OpenSSL's: those Go counts as secure."""
TLS13_SUITES = frozenset(
    {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
)
"""May be listed, changes nothing: these are always on, in Go as in OpenSSL."""
TLS_CURVES = {
    "X25519": "X25519",
    "X25519MLKEM768": "X25519MLKEM768",
    "CurveP256": "P-256",
    "P-256": "P-256",
    "CurveP384": "P-384",
    "P-384": "P-384",
    "CurveP521": "P-521",
    "P-521": "P-521",
}
"""Key exchange groups by the names that may be given, with OpenSSL's."""


class TlsSettings(NamedTuple):
    """How the TLS port negotiates. Versions are "1.2" or "1.3", `max_version` may be empty.

    Suites and curves have OpenSSL's names, in order of preference; none given is OpenSSL's choice.
    """

    min_version: str = "1.3"
    max_version: str = ""
    cipher_suites: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()


def tls_settings(
    text: Callable[[str], str],
    choices: Callable[[str, Mapping[str, str]], tuple[str, ...]],
    prefix: str,
) -> TlsSettings:
    """From the variables that begin with `prefix`. Raises ValueError.

    `text` gives a variable, `choices` those of a list that are known.
    """
    versions = {}
    for name, default in (("MIN", "1.3"), ("MAX", "")):
        variable = f"{prefix}_TLS_{name}_VERSION"
        value = text(variable) or default
        if value and value not in TLS_VERSIONS:
            raise ValueError(f"{variable}: {value!r} is unknown; allowed: 1.2, 1.3")
        versions[name] = value
    if versions["MAX"] and versions["MAX"] < versions["MIN"]:
        raise ValueError(
            f"{prefix}_TLS_MAX_VERSION: {versions['MAX']!r} is below"
            f" {prefix}_TLS_MIN_VERSION, which is {versions['MIN']!r}"
        )
    known = TLS12_SUITES | dict.fromkeys(sorted(TLS13_SUITES), "")
    suites = choices(f"{prefix}_TLS_CIPHER_SUITES", known)
    return TlsSettings(
        min_version=versions["MIN"],
        max_version=versions["MAX"],
        cipher_suites=tuple(filter(None, suites)),
        curves=choices(f"{prefix}_TLS_CURVE_PREFERENCES", TLS_CURVES),
    )
