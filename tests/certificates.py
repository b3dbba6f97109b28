"""Secret files, and certificates of an authority that exists for one test."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SECRET, OTHER_SECRET = "one-secret-" * 4, "other-secret-" * 4
PEM = serialization.Encoding.PEM
DAY = datetime.timedelta(days=1)


def secret_file(folder, *secrets, name="secret", mode=0o600):
    """Write a file of secrets, in the place of the one that is there, if any."""
    new = folder / f"{name}.new"
    new.write_text("".join(f"{secret}\n" for secret in secrets))
    new.chmod(mode)
    return str(new.rename(folder / name))


def pem_of(key):
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(PEM, *plain)


def forged(certificate):
    """Another key and its certificate with the same names and identifiers, PEM."""
    theirs, key = x509.load_pem_x509_certificate(certificate), Ed25519PrivateKey.generate()
    builder = (
        x509.CertificateBuilder()
        .subject_name(theirs.subject)
        .issuer_name(theirs.issuer)
        .public_key(key.public_key())
        .serial_number(theirs.serial_number)
        .not_valid_before(theirs.not_valid_before_utc)
        .not_valid_after(theirs.not_valid_after_utc)
    )
    for extension in theirs.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return pem_of(key) + builder.sign(key, None).public_bytes(PEM)


class Authority:
    """Signs certificates; `folder` gets the files."""

    def __init__(self, folder, name="authority"):
        self.folder = folder
        self.key = Ed25519PrivateKey.generate()
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca = str(folder / f"{name}.pem")
        self._write(self.ca, self._signed(self.name, self.key, 10, True, []).public_bytes(PEM))

    def files(self, *names, who="peer", days=10):
        """Make a certificate; returns the keys of the configuration, in lower case."""
        key = Ed25519PrivateKey.generate()
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)])
        certificate = self._signed(subject, key, days, False, names or ["127.0.0.1"])
        paths = [str(self.folder / f"{who}{end}") for end in (".crt", ".key")]
        self._write(paths[0], certificate.public_bytes(PEM))
        self._write(paths[1], pem_of(key))
        return {"tls_cert": paths[0], "tls_key": paths[1], "tls_ca": self.ca}

    def _write(self, path, content):
        with open(path, "wb") as file:
            file.write(content)

    def _signed(self, subject, key, days, is_ca, names):
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 20 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(map(_name, names)), False)
        return builder.sign(self.key, None)


def _name(text):
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
