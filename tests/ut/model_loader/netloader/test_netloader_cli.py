"""How the operator's commands are called."""

import json
import socket
import ssl
import stat
import urllib.error
import urllib.request

import pytest
import torch

from tests.ut.model_loader.netloader.support import settings, source
from vllm_ascend.model_loader.netloader import cli
from vllm_ascend.model_loader.netloader.interaction import api


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "nonsense"],
        ["probe", "127.0.0.1:1", "--connections", "0"],
        ["probe", "127.0.0.1:1", "--seconds", "0"],
        ["pull", "127.0.0.1:1"],
        ["diff", "127.0.0.1:1"],
        ["nothing"],
        [],
    ],
)
def test_wrong_usage_has_a_status_of_its_own(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == cli.USAGE


def test_a_wrong_key_is_wrong_usage(capsys):
    assert cli.main(["status", "127.0.0.1:1", "--config", '{"PROGRESS_TIMEOUT": 0}']) == cli.USAGE
    assert "PROGRESS_TIMEOUT is 0" in capsys.readouterr().err


COMMANDS = ("status", "probe", "pull", "fetch", "hold", "diff", "secret", "token", "certificate")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: netloader" in capsys.readouterr().out


def test_a_secret_is_made_once_and_nobody_else_may_read_it(tmp_path, capsys):
    file = tmp_path / "secret"
    assert cli.main(["secret", str(file)]) == cli.OK
    made = file.read_text()
    assert len(made) == 65 and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert made.strip() not in "".join(capsys.readouterr())
    assert cli.main(["secret", str(file)]) == cli.NO
    assert file.read_text() == made


def test_commands_get_into_instances_with_the_same_secret(tmp_path, capsys, monkeypatch):
    file = tmp_path / "secret"
    cli.main(["secret", str(file)])
    with source({"w": torch.ones(3)}, config=settings(secret_file=str(file))) as there:
        address = there.address
        assert cli.main(["status", str(address)]) == cli.NO
        monkeypatch.setenv("NETLOADER_SECRET_FILE", str(file))
        assert cli.main(["status", str(address)]) == cli.OK
        assert cli.main(["probe", str(address), "--seconds", "0.1"]) == cli.OK
        capsys.readouterr()
        assert cli.main(["token", "--json"]) == cli.OK
        token = json.loads(capsys.readouterr().out)["token"]
        for path, start in ((api.METRICS, b"# HELP"), (api.PAGE, b"<!DOCTYPE html>")):
            assert body_of(address, path, token).startswith(start)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            body_of(address, api.METRICS, "x" * len(token))
        failures = b'netloader_authentication_failures_total{reason="token"} '
        assert failures in body_of(address, api.METRICS, token)


def body_of(address, path, token):
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    asked = urllib.request.Request(
        f"https://{address}{path}", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(asked, context=trusting) as answer:
        return answer.read()


def test_the_pem_files_of_a_secret_are_those_that_its_instances_show(tmp_path, monkeypatch):
    assert cli.main(["certificate", str(tmp_path / "pem")]) == cli.USAGE  # of which secret?
    monkeypatch.setenv("NETLOADER_SECRET_FILE", str(tmp_path / "secret"))
    cli.main(["secret", str(tmp_path / "secret")])
    assert cli.main(["certificate", str(tmp_path / "pem")]) == cli.OK
    shown = (tmp_path / "pem/tls.crt").read_text()
    with source(
        {"w": torch.ones(3)}, config=settings(secret_file=str(tmp_path / "secret"))
    ) as there:
        at = there.address
        context = ssl.create_default_context(cadata=shown)
        context.check_hostname = False
        context.load_cert_chain(tmp_path / "pem/tls.crt", tmp_path / "pem/tls.key")
        with (
            socket.create_connection((at.host, at.port)) as plain,
            context.wrap_socket(plain) as inside,
        ):
            assert ssl.DER_cert_to_PEM_cert(inside.getpeercert(binary_form=True)) == shown
    assert cli.main(["certificate", str(tmp_path / "pem")]) == cli.NO  # they are there already
