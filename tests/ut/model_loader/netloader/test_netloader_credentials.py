import contextlib
import errno
import hashlib
import os
import ssl
import sys

import pytest
from cryptography.hazmat.primitives import serialization

from tests.certificates import OTHER_SECRET, SECRET, Authority, secret_file
from vllm_ascend.model_loader.netloader import credentials
from vllm_ascend.model_loader.netloader.credentials import (
    Credentials,
    Files,
    derived_from,
    is_loopback,
    read_secrets,
)
from vllm_ascend.model_loader.netloader.errors import ConfigError

PATHS = {"tls_cert": "a.crt", "tls_key": "a.key", "tls_ca": "ca.pem"}


def presented(known):
    """The certificate that sources of these credentials show, DER."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours, theirs = client.wrap_bio(here, there), known.accepting(there, here)
    for side in (ours, theirs, ours):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ours.getpeercert(binary_form=True)


# What belongs to a secret


def test_both_sides_derive_the_same_whatever_version_they_are():
    # These are not to change: instances of two versions would not know each other.
    derived = derived_from(SECRET)
    digests = [
        hashlib.sha256(part).hexdigest()[:16]
        for part in (derived.key, derived.certificate, derived.token.encode())
    ]
    assert digests == ["76b8475b9ffbac16", "94dfb3053d05e65d", "fbc40ff5a7ce706c"]


def test_a_browser_that_was_told_to_trust_a_source_does_so_after_a_restart(tmp_path):
    known = Credentials(Files(secret_file=secret_file(tmp_path, SECRET)))
    assert hashlib.sha256(presented(known)).hexdigest()[:16] == "8c0d8a26c27a6e49"


def test_other_secrets_have_nothing_in_common():
    one, other = derived_from(SECRET), derived_from(OTHER_SECRET)
    assert one.key != other.key
    assert one.certificate != other.certificate
    assert one.token != other.token


def test_neither_token_nor_certificate_has_the_key_or_the_secret():
    derived = derived_from(SECRET)
    assert SECRET not in derived.token
    assert derived.key.splitlines()[1] not in derived.certificate


# Files of secrets


def test_a_file_has_one_secret_or_two(tmp_path):
    assert read_secrets("SECRET_FILE", secret_file(tmp_path, SECRET)) == [SECRET]
    path = secret_file(tmp_path, f"  {SECRET}", "", OTHER_SECRET)
    assert read_secrets("SECRET_FILE", path) == [SECRET, OTHER_SECRET]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has 0 secrets; allowed: 1 or 2, one a line"),
        (["", " "], "has 0 secrets"),
        ([SECRET] * 3, "has 3 secrets"),
        (["x" * 31], "a secret of 31 characters; allowed: 32 and more"),
        ([SECRET, "short"], "a secret of 5 characters"),
        (["blank " * 8], "blanks or other characters"),
        (["é" * 40], "blanks or other characters"),
        (["x" * 5000], "over 4096 bytes"),
    ],
)
def test_a_bad_secret_is_an_error_that_says_how_to_make_a_good_one(tmp_path, lines, said):
    path = secret_file(tmp_path, *lines)
    with pytest.raises(ConfigError) as caught:
        Credentials(Files(secret_file=path))
    assert f"SECRET_FILE '{path}' " in str(caught.value)
    assert said in str(caught.value)
    assert f"make one with: netloader secret {path}" in str(caught.value)
    assert not any(line.strip() and line.strip() in str(caught.value) for line in lines)


def test_a_secret_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*; make one with"):
        Credentials(Files(secret_file=str(tmp_path / "none")))


def test_a_secret_that_is_there_and_cannot_be_read_needs_no_new_one(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        Credentials(Files(secret_file=str(tmp_path)))


@pytest.mark.parametrize("mode", [0o644, 0o602])
def test_a_secret_that_others_can_read_or_write_is_an_error(tmp_path, mode):
    path = secret_file(tmp_path, SECRET, mode=mode)
    with pytest.raises(ConfigError, match=f"mode 0{mode:o}.*allowed: 0600 or 0640.*chmod o="):
        Credentials(Files(secret_file=path))


def test_a_secret_that_its_group_can_read_is_right(tmp_path):
    Credentials(Files(secret_file=secret_file(tmp_path, SECRET, mode=0o640)))


# What goes together


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tls_cert": "a"}, "TLS_CERT needs TLS_KEY and TLS_CA"),
        ({"tls_cert": "a", "tls_ca": "b"}, "TLS_CERT needs TLS_KEY"),
        ({"secret_file": "s", **PATHS}, "TLS_CERT exclude each other"),
        ({"tls_server_name": "a", "secret_file": "s"}, "TLS_SERVER_NAME needs"),
        ({"token_file": "t"}, "TOKEN_FILE needs TLS"),
    ],
)
def test_keys_that_do_not_go_together_are_an_error(given, said):
    with pytest.raises(ConfigError, match=said):
        Files(**given)


def test_without_files_there_are_no_credentials():
    assert Files().credentials is None


def test_the_same_files_give_the_same_credentials(tmp_path):
    path = secret_file(tmp_path, SECRET)
    assert Files(secret_file=path).credentials is Files(secret_file=path).credentials


@pytest.mark.parametrize(
    ("key", "content", "said"),
    [
        ("tls_cert", None, "TLS_CERT .* cannot be read"),
        ("tls_key", None, "TLS_KEY .* cannot be read"),
        ("tls_ca", None, "TLS_CA .* cannot be read"),
        ("tls_cert", b"nothing", "TLS_CERT .* has no certificate as PEM$"),
        ("tls_key", b"nothing", "TLS_KEY .* has no private key as PEM$"),
        (
            "tls_cert",
            b"-----BEGIN CERTIFICATE-----",
            "are not a certificate and its private key",
        ),
        ("tls_ca", b"nothing", "TLS_CA .* has no certificates"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_an_error(tmp_path, key, content, said):
    files = Authority(tmp_path).files()
    if content is None:
        os.remove(files[key])
    else:
        with open(files[key], "wb") as file:
            file.write(content)
    with pytest.raises(ConfigError, match=said):
        Credentials(Files(**files))


def test_files_that_are_each_others_are_an_error_that_says_so(tmp_path):
    files = Authority(tmp_path).files()
    cert, key = files["tls_cert"], files["tls_key"]
    for swapped, said in (
        ({"tls_cert": key, "tls_key": cert}, "TLS_CERT .* but a private key: TLS_KEY may be"),
        ({"tls_key": cert}, "TLS_KEY .* but a certificate: TLS_CERT may be"),
    ):
        with pytest.raises(ConfigError, match=said):
            Credentials(Files(**files | swapped))


def test_a_key_with_a_password_is_an_error_that_says_so(tmp_path):
    files = Authority(tmp_path).files()
    with open(files["tls_key"], "rb") as file:
        key = serialization.load_pem_private_key(file.read(), None)
    locked = serialization.BestAvailableEncryption(b"password")
    form = serialization.PrivateFormat.PKCS8
    with open(files["tls_key"], "wb") as file:
        file.write(key.private_bytes(serialization.Encoding.PEM, form, locked))
    with pytest.raises(ConfigError, match=r"TLS_KEY .* has a password; allowed: a private"):
        Credentials(Files(**files))


def test_the_key_of_another_certificate_is_an_error(tmp_path):
    authority = Authority(tmp_path)
    files = authority.files() | {"tls_key": authority.files(who="other")["tls_key"]}
    with pytest.raises(ConfigError, match="key values mismatch"):
        Credentials(Files(**files))


# Tokens


def test_the_tokens_are_those_of_the_secrets(tmp_path):
    known = Credentials(Files(secret_file=secret_file(tmp_path, SECRET, OTHER_SECRET)))
    assert known.is_token(derived_from(SECRET).token)
    assert known.is_token(derived_from(OTHER_SECRET).token)
    assert not known.is_token(SECRET)
    assert not known.is_token("")
    assert not known.is_token("é\udc80")


def test_a_file_of_tokens_takes_their_place(tmp_path):
    token = "a-token-" * 4
    path = secret_file(tmp_path, token, name="token")
    known = Credentials(Files(secret_file=secret_file(tmp_path, SECRET), token_file=path))
    assert known.is_token(token)
    assert not known.is_token(derived_from(SECRET).token)
    assert Credentials(Files(**Authority(tmp_path).files(), token_file=path)).is_token(token)


def test_certificates_alone_have_no_token(tmp_path):
    known = Credentials(Files(**Authority(tmp_path).files()))
    assert not known.is_token("")


def test_every_token_is_compared_and_in_constant_time(tmp_path, monkeypatch):
    compared = []

    def compare(said, token):
        compared.append(token)
        return said == token

    monkeypatch.setattr(credentials.hmac, "compare_digest", compare)
    known = Credentials(Files(secret_file=secret_file(tmp_path, SECRET, OTHER_SECRET)))
    assert known.is_token(derived_from(SECRET).token)
    assert len(compared) == 2


def test_a_bad_file_of_tokens_is_an_error_that_names_it(tmp_path):
    path = secret_file(tmp_path, "short", name="token")
    files = Files(secret_file=secret_file(tmp_path, SECRET), token_file=path)
    with pytest.raises(ConfigError, match=r"TOKEN_FILE .* has a token of 5 characters"):
        Credentials(files)


# Files that change


def test_another_secret_counts_from_when_the_file_has_it(tmp_path, log):
    known = Credentials(Files(secret_file=(path := secret_file(tmp_path, SECRET))))
    before = presented(known)
    secret_file(tmp_path, OTHER_SECRET)
    assert known.is_token(derived_from(OTHER_SECRET).token)
    assert not known.is_token(derived_from(SECRET).token)
    assert presented(known) != before
    assert log == [f"NetLoader: read {path} anew"]


def test_a_file_that_is_wrong_for_a_while_leaves_all_as_it_was(tmp_path, log):
    known = Credentials(Files(secret_file=(path := secret_file(tmp_path, SECRET))))
    os.remove(path)
    for _ in range(3):
        assert known.is_token(derived_from(SECRET).token)
    assert len(log) == 1
    assert log[0].startswith("NetLoader: goes on with the secret or certificates from before: ")
    secret_file(tmp_path, OTHER_SECRET)
    assert known.is_token(derived_from(OTHER_SECRET).token)


def test_a_failure_that_passes_loses_no_new_secret(tmp_path, log, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    known = Credentials(Files(secret_file=secret_file(tmp_path, SECRET)))
    secret_file(tmp_path, OTHER_SECRET)
    with monkeypatch.context() as without_descriptors:
        without_descriptors.setattr(os, "memfd_create", fails)
        for _ in range(3):
            assert known.is_token(derived_from(SECRET).token)
    assert len(log) == 1
    assert known.is_token(derived_from(SECRET).token)  # not yet
    known._next_try = 0.0
    assert known.is_token(derived_from(OTHER_SECRET).token)


def test_other_certificates_count_from_when_the_files_have_them(tmp_path, log):
    authority = Authority(tmp_path)
    known = Credentials(Files(**(files := authority.files())))
    before = presented(known)
    os.rename(authority.files(who="new")["tls_cert"], files["tls_cert"])
    assert presented(known) == before  # the key is not there yet
    os.rename(tmp_path / "new.key", files["tls_key"])
    after = presented(known)
    assert after != before
    with open(files["tls_cert"]) as file:
        assert after == ssl.PEM_cert_to_DER_cert(file.read())
    assert ["goes on" in line for line in log] == [True, False]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        (None, False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("some.host", False),
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
    ],
)
def test_addresses_that_only_this_machine_reaches(host, loopback):
    assert is_loopback(host) is loopback


def test_what_shows_credentials_shows_no_key_and_no_token(tmp_path):
    derived = derived_from(SECRET)
    known = Credentials(Files(secret_file=secret_file(tmp_path, SECRET)))
    for shown in (repr(derived), repr(known._read)):
        assert derived.token not in shown
        assert "PRIVATE KEY" not in shown


def test_without_the_package_for_secrets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match="pip install cryptography"):
        derived_from("of no other test, as what is derived is kept")
