"""Who may pull: a shared secret or certificates, and tokens; re-read when their files change.

Whoever has the secret, or a certificate of the authority, can be either side of a session. A secret
is no key by itself: both sides derive the same key pair and the same certificate from it, and trust
those, what they have signed, and nothing else.
"""

import contextlib
import datetime
import functools
import hashlib
import hmac
import os
import ssl
import stat
import threading
import time
from dataclasses import dataclass, field, fields
from ipaddress import ip_address

from .errors import ConfigError
from .utils import logger, one_line, words_of

MIN_CHARACTERS = 32  # of a secret, or of a token
_MAX_FILE = 4 << 10  # bytes of a file with secrets or tokens
_MAX_PEM = 1 << 20  # bytes of a file in which the markers of PEM are looked for
_CERTIFICATE, _KEY, _ENCRYPTED = b"CERTIFICATE-----", b"PRIVATE KEY-----", b"ENCRYPTED"
_SALT = b"netloader mutual TLS v1"
_AGAIN = 10.0  # seconds until files that could not be read are read again, unless they change
_HOW = "make one with: netloader secret {}"


@dataclass(frozen=True, kw_only=True)
class Files:
    """What an operator has chosen. Each field is the configuration key of its name in capitals.

    Attributes:
        secret_file: one or two secrets, one a line: the first is presented, both are accepted.
        tls_cert: PEM, this instance's certificate, and what leads to its authority.
        tls_key: PEM, the private key of that.
        tls_ca: PEM, the authorities whose certificates peers may have.
        tls_server_name: what a source's certificate has to be for; None: the address connected to.
        token_file: one or two bearer tokens, one a line; None: those of the secrets.
    """

    secret_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_server_name: str | None = None
    token_file: str | None = None

    def __post_init__(self) -> None:
        """Check that they go together.

        Raises:
            ConfigError: says which key is missing, or which one excludes another.
        """
        of_tls = {"TLS_CERT": self.tls_cert, "TLS_KEY": self.tls_key, "TLS_CA": self.tls_ca}
        given = [key for key, path in of_tls.items() if path is not None]
        missing = [key for key in of_tls if key not in given]
        if given and self.secret_file is not None:
            raise ConfigError(
                f"SECRET_FILE (or NETLOADER_SECRET_FILE) and {given[0]} exclude each other: "
                "give a secret or certificates"
            )
        if given and missing:
            raise ConfigError(
                f"{given[0]} needs {' and '.join(missing)}: give all of {', '.join(of_tls)}, "
                "or none"
            )
        if self.tls_server_name is not None and not given:
            raise ConfigError("TLS_SERVER_NAME needs TLS_CERT, TLS_KEY and TLS_CA")
        if self.token_file is not None and not given and self.secret_file is None:
            raise ConfigError(
                "TOKEN_FILE needs TLS: give SECRET_FILE, or TLS_CERT, TLS_KEY and TLS_CA"
            )

    def paths(self) -> list[str]:
        """Return the paths that are given."""
        every = (self.secret_file, self.tls_cert, self.tls_key, self.tls_ca, self.token_file)
        return [path for path in every if path is not None]

    @property
    def credentials(self) -> "Credentials | None":
        """Who may pull, and by what sources know this instance; None: everybody, without TLS.

        Raises:
            ConfigError: a file is not as it should be.
        """
        mine = {each.name: getattr(self, each.name) for each in fields(Files)}
        return _credentials_of(Files(**mine))


@dataclass(frozen=True)
class Derived:
    """What belongs to a secret: the same wherever the secret is the same.

    Attributes:
        key: the private key, PEM.
        certificate: its certificate, PEM, which is its own authority.
        shown: what a source shows, PEM: another key, and a certificate of that authority for it.
        token: the bearer token.
    """

    key: bytes = field(repr=False)
    certificate: bytes
    shown: bytes = field(repr=False)
    token: str = field(repr=False)


@functools.lru_cache(maxsize=8)
def derived_from(secret: str) -> Derived:
    """Derive a key pair, its certificate and a token from a secret.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise ConfigError(
            f"SECRET_FILE needs the package cryptography, which cannot be imported ({error}): "
            "pip install cryptography, or give TLS_CERT, TLS_KEY and TLS_CA"
        ) from None

    # Whoever connects is shown what its key has signed, and can try secrets on that at leisure.
    root = hashlib.scrypt(secret.encode(), salt=_SALT, n=1 << 15, r=8, p=1, maxmem=64 << 20)
    # Ed25519, as both sides have to make the same signature.
    key = Ed25519PrivateKey.from_private_bytes(_labelled(root, b"key"))
    public = key.public_key()
    known_by = x509.SubjectKeyIdentifier.from_public_key(public)
    named = x509.NameAttribute(x509.NameOID.COMMON_NAME, f"netloader {known_by.digest.hex()}")
    name = x509.Name([named])
    usage = {
        field: field in ("digital_signature", "key_cert_sign")
        for field in (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        )
    }
    anything = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .not_valid_before(datetime.datetime(1970, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
    )
    certificate = (
        anything.subject_name(name)
        .public_key(public)
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(known_by, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, None)
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    # Browsers do not know Ed25519. They remember the certificate that a user has accepted, so it is
    # the same after a restart. Any number of 255 bits is a private key.
    number = int.from_bytes(_labelled(root, b"shown")) >> 1
    own = ec.derive_private_key(number, ec.SECP256R1())
    subject = x509.NameAttribute(x509.NameOID.COMMON_NAME, "netloader source")
    signed = (
        anything.subject_name(x509.Name([subject]))
        .public_key(own.public_key())
        .serial_number(2)
        .sign(key, None)
    )
    return Derived(
        key.private_bytes(pem, *plain),
        certificate.public_bytes(pem),
        # Twice, as OpenSSL adds the authority to a certificate alone: browsers go no further then.
        own.private_bytes(pem, *plain) + 2 * signed.public_bytes(pem),
        _labelled(root, b"token").hex(),
    )


def _labelled(root: bytes, label: bytes) -> bytes:
    return hmac.digest(root, label, "sha256")


def read_secrets(key: str, path: str) -> list[str]:
    """Read a file with one or two secrets or tokens.

    Args:
        key: the configuration key that names the file, for errors.
        path: of the file.

    Raises:
        ConfigError: says what is wrong, without any of the content.
    """
    where, what = f"{key} {path!r}", "token" if key == "TOKEN_FILE" else "secret"
    how = _HOW.format(path)
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        after = f"; {how}" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{where} cannot be read: {words_of(error)}{after}") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(
            f"{where} has mode {stat.S_IMODE(mode):04o}, so that others than its owner and group "
            f"can read or write it; allowed: 0600 or 0640, as after: chmod o= {path}"
        )
    if len(content) > _MAX_FILE:
        raise ConfigError(f"{where} has over {_MAX_FILE} bytes; {how}")
    lines = [line.strip() for line in content.decode("latin-1").splitlines() if line.strip()]
    if not 1 <= len(lines) <= 2:
        raise ConfigError(f"{where} has {len(lines)} {what}s; allowed: 1 or 2, one a line; {how}")
    for line in lines:
        if not line.isascii() or not line.isprintable() or " " in line:
            raise ConfigError(
                f"{where} has a {what} with blanks or other characters than ASCII's; {how}"
            )
        if len(line) < MIN_CHARACTERS:
            raise ConfigError(
                f"{where} has a {what} of {len(line)} characters; allowed: {MIN_CHARACTERS} and "
                f"more; {how}"
            )
    return lines


@dataclass(frozen=True)
class _Read:
    """What the files say."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    tokens: tuple[bytes, ...] = field(repr=False)


class Credentials:
    """By what peers know this instance, and by what it knows them.

    Args:
        files: what an operator has chosen.

    Attributes:
        by_secret: whether a secret says who is a peer, and not an authority.

    Raises:
        ConfigError: says which file is wrong, and in what.
    """

    def __init__(self, files: Files) -> None:
        self.by_secret = files.secret_file is not None
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._failed = _state(files)
        self._next_try = 0.0
        self._read = _read(files)

    def accepting(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        """Begin TLS with whoever has connected."""
        return self._now().server.wrap_bio(incoming, outgoing, server_side=True)

    def connecting(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, host: str
    ) -> ssl.SSLObject:
        """Begin TLS with a source that was found at an address."""
        if self.by_secret:
            return self._now().client.wrap_bio(incoming, outgoing)
        name = self._files.tls_server_name or host.partition("%")[0].removesuffix(".")
        return self._now().client.wrap_bio(incoming, outgoing, server_hostname=name)

    def is_token(self, text: str) -> bool:
        """Return whether this is one of the tokens, in the same time whatever it is."""
        said = text.encode("utf-8", "replace")
        return any([hmac.compare_digest(said, token) for token in self._now().tokens])

    def _now(self) -> _Read:
        """Return what the files say now, or said when they last were right."""
        with self._lock:
            state = _state(self._files)
            if state == self._seen:
                return self._read
            if state != self._failed or time.monotonic() >= self._next_try:
                try:
                    self._read = _read(self._files)
                except (ConfigError, OSError) as error:  # also out of descriptors, say
                    if state != self._failed:
                        logger.warning(
                            "NetLoader: goes on with the secret or certificates from before: %s",
                            one_line(error),
                        )
                    self._failed, self._next_try = state, time.monotonic() + _AGAIN
                else:
                    self._seen = self._failed = state
                    logger.info("NetLoader: read %s anew", ", ".join(self._files.paths()))
            return self._read


@functools.cache  # one for each choice in this process
def _credentials_of(files: Files) -> Credentials | None:
    return Credentials(files) if files.paths() else None


def _state(files: Files) -> list[tuple[int, ...] | None]:
    """Return what differs once a file has changed, or another one is in its place."""

    def of(path: str) -> tuple[int, ...] | None:
        try:
            now = os.stat(path)
        except (OSError, ValueError):
            return None
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns

    return [of(path) for path in files.paths()]


def _read(files: Files) -> _Read:
    server = _context(ssl.PROTOCOL_TLS_SERVER)
    client = _context(ssl.PROTOCOL_TLS_CLIENT)
    # Whoever asks for `/healthz`, or brings a token, need not have a certificate.
    server.verify_mode = ssl.CERT_OPTIONAL
    # Without them nothing comes after a handshake but what was asked for.
    server.num_tickets = 0
    tokens: list[str] = []
    if files.secret_file is not None:
        derived = [
            derived_from(secret) for secret in read_secrets("SECRET_FILE", files.secret_file)
        ]
        tokens = [each.token for each in derived]
        client.check_hostname = False  # whoever has the secret is a peer, wherever it is
        trusted = "".join(each.certificate.decode() for each in derived)
        _use_chain(server, derived[0].shown)
        _use_chain(client, derived[0].key + derived[0].certificate)
        for context in (server, client):
            context.load_verify_locations(cadata=trusted)
    else:
        for context in (server, client):
            _use_files(context, files)
    if files.token_file is not None:
        tokens = read_secrets("TOKEN_FILE", files.token_file)
    return _Read(server, client, tuple(token.encode() for token in tokens))


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _use_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """Present a key and a certificate, which `ssl` takes from files only."""
    descriptor = os.memfd_create("netloader", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _use_files(context: ssl.SSLContext, files: Files) -> None:
    cert, key, ca = files.tls_cert, files.tls_key, files.tls_ca
    assert cert is not None and key is not None and ca is not None
    contents = {}
    for name, path in (("TLS_CERT", cert), ("TLS_KEY", key), ("TLS_CA", ca)):
        try:
            with open(path, "rb") as file:
                contents[name] = file.read(_MAX_PEM)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name} {path!r} cannot be read: {words_of(error)}") from None
    try:
        # A password would be asked for at the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        if wrong := _wrong_certificate(contents["TLS_CERT"]):
            raise ConfigError(f"TLS_CERT {cert!r} {wrong}") from None
        if wrong := _wrong_key(contents["TLS_KEY"]):
            raise ConfigError(f"TLS_KEY {key!r} {wrong}") from None
        raise ConfigError(
            f"TLS_CERT {cert!r} and TLS_KEY {key!r} are not a certificate and its private key "
            f"without a password, as PEM: {_ssl_words(error)}"
        ) from None
    try:
        context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"TLS_CA {ca!r} has no certificates as PEM: {_ssl_words(error)}"
        ) from None


def _wrong_certificate(pem: bytes) -> str:
    """Return what is wrong with a certificate, as far as the markers of PEM tell."""
    if _CERTIFICATE in pem:
        return ""
    instead = ", but a private key: TLS_KEY may be the other file" if _KEY in pem else ""
    return f"has no certificate as PEM{instead}"


def _wrong_key(pem: bytes) -> str:
    if _KEY in pem:
        return "has a password; allowed: a private key without one" if _ENCRYPTED in pem else ""
    instead = ", but a certificate: TLS_CERT may be the other file" if _CERTIFICATE in pem else ""
    return f"has no private key as PEM{instead}"


def _ssl_words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) else one_line(error)


def is_loopback(host: str | None) -> bool:
    """Return whether nobody but this machine reaches an address to listen on; None: all of them."""
    with contextlib.suppress(ValueError):
        return ip_address(host or "::").is_loopback
    return host == "localhost"
