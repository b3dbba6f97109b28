"""How the operator's commands are called."""

import errno
import json
import os
import socket
import ssl
import stat
import sys
import threading
import time
import tracemalloc
import types
import urllib.error
import urllib.request

import msgspec
import pytest
import torch

from tests.certificates import SECRET, Authority, secret_file
from tests.identity import IDENTITY
from tests.ut.model_loader.netloader.support import HOST, PATIENCE, settings, source
from vllm_ascend.model_loader.netloader import cli, copies, model_files
from vllm_ascend.model_loader.netloader.errors import (
    NetLoaderError,
    ProtocolError,
    SourceLost,
    SourceUnreachable,
)
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import TensorEntry
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.utils import Address


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


def test_a_key_that_nobody_knows_is_one_of_the_option_that_was_given(capsys):
    assert cli.main(["status", "127.0.0.1:1", "--config", '{"source": "a:1"}']) == cli.USAGE
    said = capsys.readouterr().err
    assert said.startswith("netloader: --config has unknown keys 'source' (should be 'SOURCE'); ")


@pytest.mark.parametrize("config", ["[1]", "null", "7"])
def test_a_config_that_is_no_object_is_wrong_usage(config, capsys):
    assert cli.main(["status", "127.0.0.1:1", "--config", config]) == cli.USAGE
    assert "--config is " in capsys.readouterr().err


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
    assert f"{file} exists already: remove it, or name another" in capsys.readouterr().err
    assert file.read_text() == made


def test_commands_get_into_instances_with_the_same_secret(tmp_path, capsys, monkeypatch):
    file = tmp_path / "secret"
    cli.main(["secret", str(file)])
    with source({"w": torch.ones(3)}, config=settings(secret_file=str(file))) as there:
        address = there.address
        assert cli.main(["status", str(address)]) == cli.NO
        monkeypatch.setenv("NETLOADER_SECRET_FILE", str(file))
        assert cli.main(["status", str(address)]) == cli.OK
        assert cli.main(["probe", str(address), "--seconds", "1"]) == cli.OK
        capsys.readouterr()
        assert cli.main(["token", "--json"]) == cli.OK
        token = json.loads(capsys.readouterr().out)["token"]
        for path, start in ((api.METRICS, b"# HELP"), (api.PAGE, b"<!DOCTYPE html>")):
            assert body_of(address, path, token).startswith(start)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            body_of(address, api.METRICS, "x" * len(token))
        failures = b'netloader_authentication_failures_total{reason="token"} '
        assert failures in body_of(address, api.METRICS, token)


def test_the_token_is_one_that_instances_with_a_file_of_tokens_take(tmp_path, capsys):
    keys = {
        "SECRET_FILE": secret_file(tmp_path, SECRET),
        "TOKEN_FILE": secret_file(tmp_path, "first-token-" * 3, "second-token-" * 3, name="token"),
    }
    assert cli.main(["token", "--config", json.dumps(keys)]) == cli.OK
    token = capsys.readouterr().out.strip()
    assert token == "first-token-" * 3
    config = settings(secret_file=keys["SECRET_FILE"], token_file=keys["TOKEN_FILE"])
    with source({"w": torch.ones(3)}, config=config) as there:
        assert body_of(there.address, api.METRICS, token).startswith(b"# HELP")
    certificates = {key.upper(): path for key, path in Authority(tmp_path).files().items()}
    keys = json.dumps(certificates | {"TOKEN_FILE": keys["TOKEN_FILE"]})
    assert cli.main(["token", "--config", keys]) == cli.OK
    assert capsys.readouterr().out.strip() == token


def body_of(address, path, token):
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    asked = urllib.request.Request(
        f"https://{address}{path}", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(asked, context=trusting) as answer:
        return answer.read()


def test_with_the_pem_files_of_a_secret_other_tools_are_peers(tmp_path, monkeypatch):
    assert cli.main(["certificate", str(tmp_path / "pem")]) == cli.USAGE  # of which secret?
    monkeypatch.setenv("NETLOADER_SECRET_FILE", str(tmp_path / "secret"))
    cli.main(["secret", str(tmp_path / "secret")])
    assert cli.main(["certificate", str(tmp_path / "pem")]) == cli.OK
    with source(
        {"w": torch.ones(3)}, config=settings(secret_file=str(tmp_path / "secret"))
    ) as there:
        at = there.address
        context = ssl.create_default_context(cafile=tmp_path / "pem/tls.crt")
        context.check_hostname = False
        context.load_cert_chain(tmp_path / "pem/tls.crt", tmp_path / "pem/tls.key")
        with (
            socket.create_connection((at.host, at.port)) as plain,
            context.wrap_socket(plain) as inside,
        ):
            inside.sendall(b"GET /status HTTP/1.1\r\nHost: h\r\n\r\n")
            assert inside.recv(100).startswith(b"HTTP/1.1 200 ")
    assert cli.main(["certificate", str(tmp_path / "pem")]) == cli.NO  # they are there already


# What is written


def test_a_file_in_use_keeps_what_it_has_when_others_take_its_place(tmp_path):
    file = tmp_path / "netloader-rank-0.safetensors"
    with source({"w": torch.arange(3000)}) as one, source({"w": torch.ones(3)}) as other:
        assert cli.main(["pull", str(one.address), str(tmp_path)]) == cli.OK
        before = file.read_bytes()
        with file.open("rb") as in_use:
            assert cli.main(["pull", str(other.address), str(tmp_path)]) == cli.OK
            assert in_use.read() == before
    assert file.read_bytes() != before


def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch, capsys):
    def full(descriptor, offset, nbytes):
        assert nbytes > 24000
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with source({"w": torch.arange(3000)}) as there:
        assert cli.main(["pull", str(there.address), str(tmp_path)]) == cli.NO
    assert "No space left on device" in capsys.readouterr().err


def test_what_is_to_be_a_folder_and_is_a_file_is_wrong_usage(tmp_path, capsys):
    (tmp_path / "file").touch()
    file, at = str(tmp_path / "file"), f"{HOST}:1"
    for command in (
        ["fetch", at, file],
        ["pull", at, file],
        ["certificate", file],
        ["hold", at, "--folder", file],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == cli.USAGE
        assert f"{file!r} is a file; it must be a folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_looked_at_is_an_error_and_no_crash(capsys):
    assert cli.main(["fetch", f"{HOST}:1", "x" * 300]) == cli.NO
    assert "File name too long" in capsys.readouterr().err


def test_the_last_instance_of_a_pull_is_not_taken_for_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["pull", f"{HOST}:1", f"{HOST}:2"])
    assert end.value.code == cli.USAGE
    assert "'127.0.0.1:2' is an address; the last argument is a folder" in capsys.readouterr().err
    (tmp_path / f"{HOST}:2").mkdir()
    with source({"w": torch.ones(3)}) as there:
        assert cli.main(["pull", str(there.address), f"{HOST}:2"]) == cli.OK


# Where a holder listens


@pytest.mark.parametrize("port", [0, 80])
@pytest.mark.parametrize("what", [[f"{HOST}:1"], ["--checkpoint", "/"]])
def test_a_holder_needs_a_port_and_says_so_before_it_pulls(port, what, capsys):
    assert cli.main(["hold", *what, "--config", json.dumps({"LISTEN_PORT": port})]) == cli.USAGE
    assert capsys.readouterr().err == (
        f"netloader: LISTEN_PORT is {port}; allowed: 1024 to 65535 less the rank, or leave it out\n"
    )


def test_a_holder_that_cannot_listen_names_the_key_and_its_value(capsys):
    with source({"w": torch.ones(3)}) as there:
        port = there.address.port
        for keys, said in (
            ({"LISTEN_HOST": HOST, "LISTEN_PORT": port}, f"LISTEN_PORT is {port}, and port {port}"),
            ({"LISTEN_HOST": "192.0.2.1"}, "LISTEN_HOST is '192.0.2.1', which is no address of"),
            ({"LISTEN_HOST": "a.invalid"}, "LISTEN_HOST is 'a.invalid', which is no address of"),
        ):
            hold = ["hold", str(there.address), "--json", "--config", json.dumps(keys)]
            assert cli.main(hold) == cli.NO
            words = capsys.readouterr().err
            assert words.startswith(f"netloader: {said}")
            assert "Errno" not in words


def test_a_folder_that_is_not_there_is_not_held(capsys):
    assert cli.main(["hold", "--checkpoint", "/nope"]) == cli.USAGE
    assert capsys.readouterr().err == "netloader: /nope: no such folder\n"


# What peers say


@pytest.mark.parametrize("name", ["torch.onnx", "onnx", "torch.nn", "float32x", ""])
def test_a_dtype_of_a_peer_imports_nothing(name, monkeypatch):
    monkeypatch.delattr(torch, "onnx", raising=False)
    monkeypatch.delitem(sys.modules, "torch.onnx", raising=False)
    with pytest.raises(ProtocolError, match="x has the dtype"):
        copies._dtype(TensorEntry("x", name, (1,)))
    assert "torch.onnx" not in sys.modules


def test_a_dtype_of_a_peer_is_shown_as_one_printable_line():
    with pytest.raises(ProtocolError) as failure:
        copies._dtype(TensorEntry("x", "\x1b[1m\r\n" + "y" * 5000, (1,)))
    assert str(failure.value).isprintable()
    assert len(str(failure.value)) < 300


@pytest.mark.parametrize("name", ["torch.bfloat16", "bfloat16"])
def test_a_dtype_of_torch_is_known(name):
    assert copies._dtype(TensorEntry("x", name, (1,))) is torch.bfloat16


@pytest.mark.parametrize(
    "shape",
    [(-1,), (-2, -3), (1 << 60,), (1 << 40, 1 << 40), (1,) * 65, (2**63 - 1,) * 400_000],
    ids=["negative", "two negative", "large", "large product", "axes", "product that takes long"],
)
def test_a_shape_that_no_tensor_has_is_refused_by_its_name(shape):
    with pytest.raises(ProtocolError, match=r"some\.weight has the shape"):
        copies._nbytes(TensorEntry("some.weight", "torch.float32", shape))


def test_text_of_peers_does_not_reach_the_terminal_as_it_is(capsys):
    who = msgspec.structs.replace(IDENTITY, model="m\x1b]0;owned\x07\x9b2J")
    with source({"w": torch.ones(3)}, who=who) as there:
        assert cli.main(["status", str(there.address)]) == cli.OK
    shown = "".join(capsys.readouterr())
    assert "owned" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)
    cli._complain([SourceLost("a\x1b[2Jb\nc")])
    assert capsys.readouterr().err == "netloader: a [2Jb c\n"


@pytest.fixture
def trickling():
    """Where each answer has 1,000 bytes, which come one by one."""
    over = threading.Event()

    def answer(sock):
        with sock:
            sock.recv(1 << 16)
            sock.sendall(
                b"HTTP/1.1 200 OK\r\nServer: NetLoader\r\nContent-Type: a/b\r\n"
                b"Content-Length: 1000\r\n\r\n"
            )
            try:
                while not over.wait(0.02):
                    sock.sendall(b"x")
            except OSError:
                pass

    def accept(listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(sock,), daemon=True).start()

    with socket.create_server((HOST, 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield Address(*listener.getsockname()[:2])
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_file_that_trickles_in_is_given_up(trickling):
    with copies.connect(trickling, settings(handshake_timeout=0.3)) as asks:
        began = time.monotonic()
        with pytest.raises(SourceLost, match=r"not all came within 0\.301 s"):
            asks.file("netloader", api.ModelFile("config.json", 1000, "0" * 64))
        assert time.monotonic() - began < PATIENCE / 2


def test_blocks_that_trickle_in_are_given_up(trickling):
    tensors = {"w": torch.zeros(1000, dtype=torch.uint8)}
    with source(tensors) as there, copies.connect(there.address, settings()) as asks:
        what = copies.describe(asks, IDENTITY)
    measured = copies.measure(trickling, what, 1, 0.1, settings(progress_timeout=0.3))
    assert measured.nbytes == 0
    assert measured.failures == [f"{trickling}: not all came within 0.4 s"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (b'["a","torch.int8",[%d]]' % (1 << 40), "digests came for 1048576 blocks; expected"),
        (b",".join([b'["","",[]]'] * 1_500_000), "values; allowed: up to 4194304"),
    ],
)
def test_what_a_source_says_of_its_weights_takes_little_memory(tensors, said):
    raw = b'{"layout":"raw","tensors":[%b],"attributes":{}}' % tensors
    joined = api.Joined("xxh3_128:" + "0" * 32, 1, "i", manifest=msgspec.Raw(raw), blocks=bytes(16))
    client = types.SimpleNamespace(address=Address(HOST, 1), join=lambda join: joined)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"{HOST}:1: .* {said}"):
            copies.describe(client, IDENTITY)
        assert tracemalloc.get_traced_memory()[1] < len(raw) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_instances_are_asked_for_their_status_at_the_same_time(monkeypatch):
    both = threading.Barrier(2)

    def status_of(address, config):
        both.wait(PATIENCE)
        raise SourceUnreachable(str(address))

    monkeypatch.setattr(copies, "status_of", status_of)
    found, problems = copies.statuses([Address("10.0.0.1", 1), Address("10.0.0.2", 1)], settings())
    assert not found and [str(one) for one in problems] == ["10.0.0.1:1", "10.0.0.2:1"]


def test_weights_that_do_not_fit_into_memory_are_an_error():
    large = types.SimpleNamespace(
        blocks=types.SimpleNamespace(sizes=[1 << 60]),
        entries=[TensorEntry("w", "torch.uint8", (1 << 60,))],
    )
    with pytest.raises(NetLoaderError, match=r"out of memory: the weights have 1152921504\.61 GB"):
        copies._memory(large, None, None)


def test_of_what_a_rank_names_only_ip_addresses_are_asked():
    with source({"w": torch.ones(3)}) as there:
        status = copies.status_of(there.address, settings())
    ends = {
        0: api.Endpoint("10.0.0.9:80", status.instance),
        1: api.Endpoint("somewhere.example:80", "a"),
        2: api.Endpoint("10.0.0.1:80", "b"),
        3: api.Endpoint("[::1]:80", "c"),
        4: api.Endpoint("10.0.0.2:80", "known"),
        5: api.Endpoint("10.0.0.9:81", "on the same host, whatever that is called here"),
    }
    model = msgspec.structs.replace(status.models[0], endpoints=ends)
    status = msgspec.structs.replace(status, models=[model])
    named = copies._named(Address("node", 80), status, {status.instance, "known"})
    assert [*map(str, named)] == ["10.0.0.1:80", "[::1]:80", "node:81"]


# What a source hears


def test_who_only_looks_is_not_logged_as_complete(log):
    with source({"w": torch.ones(3)}) as one, source({"w": torch.zeros(3)}) as other:
        assert cli.main(["diff", str(one.address), str(other.address)]) == cli.NO
    sent = [line for line in log if ": sent 0.0 MB" in line]
    assert len(sent) == 2
    assert all(line.endswith(": only looked") for line in sent)


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    digest = model_files._digest

    def fails(path, *arguments):
        if path.name == "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return digest(path, *arguments)

    monkeypatch.setattr(model_files, "_digest", fails)
    assert [one.name for one in model_files.files_of(tmp_path)] == ["config.json"]


def test_a_watch_survives_a_look_up_that_fails(monkeypatch, capsys):
    def look_up(name, seconds):
        raise SourceUnreachable(f"{name}: not known")

    looks = iter([None, KeyboardInterrupt()])

    def sleep(seconds):
        if (end := next(looks)) is not None:
            raise end

    monkeypatch.setattr(cli, "addresses_of", look_up)
    monkeypatch.setattr(cli.time, "sleep", sleep)
    assert cli.main(["status", "here.example:80", "--watch"]) == 130
    assert capsys.readouterr().err.count("netloader: here.example:80: not known") == 2
