"""The operator's commands against real sources."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.checkpoints import read_regions
from vllm_ascend.model_loader.netloader import cli, copies, model_files
from vllm_ascend.model_loader.netloader.config import parse_config
from vllm_ascend.model_loader.netloader.errors import LoadFailed, SourceError, SourceRefused
from vllm_ascend.model_loader.netloader.executor.memory import host_view
from vllm_ascend.model_loader.netloader.executor.view.records import decode, dtype_of
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import parse_address

from . import sides
from .faults import closed_port
from .models import ROW, assorted, many_rows, nothing, only_empty, rows, tied
from .sides import HOST, PATIENCE, expected, identity, plain_bytes, settings, store_of
from .test_relays import ALL, dial
from .ways import Way

pytestmark = pytest.mark.ways(Way.HTTP)

ROOT = Path(__file__).parents[2]
FILE = "netloader-rank-0.safetensors"


def source(way, model=many_rows, **config):
    return sides.source(way, model, **config)


@contextlib.contextmanager
def two_ranks(way, model=many_rows):
    """The ranks of one instance, which know of each other."""
    with contextlib.ExitStack() as stack:
        servers = [WeightServer(settings(way), rank, HOST) for rank in range(2)]
        for rank, server in enumerate(servers):
            server.process = f"process of rank {rank}"
            stack.callback(server.stop)
            server.start(0)
        stores = [sides.fresh(store_of(way, model, rank)) for rank in range(2)]
        ranks = {rank: store.digests.weights for rank, store in enumerate(stores)}
        ends = {rank: server.endpoint for rank, server in enumerate(servers)}
        for rank, server in enumerate(servers):
            who = identity(way, rank=rank, tp=2)
            offer = Offer(who, stores[rank], ranks=lambda: ranks, endpoints=lambda: ends)
            server.offer(offer)
        yield [parse_address(end.address) for end in ends.values()]


def run(*arguments):
    return cli.main([*map(str, arguments)])


def answer(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# status


def test_a_status_shows_all_ranks_of_an_instance_if_one_is_named(way, capsys):
    with two_ranks(way) as addresses:
        assert run("status", addresses[1]) == cli.OK
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines[1:]} == {*map(str, addresses)}
        assert all(" serving " in line and f" {ALL}/{ALL} " in line for line in lines[1:])
        assert run("status", "--json", addresses[0]) == cli.OK
        assert answer(capsys)["ranks"].keys() == {*map(str, addresses)}


def test_a_status_says_who_does_not_answer(way, capsys):
    gone = closed_port()
    with source(way) as seed:
        assert run("status", seed.address, gone) == cli.NO
        said = capsys.readouterr()
        assert str(seed.address) in said.out
        assert f"{gone}: cannot connect" in said.err


def test_a_rank_that_cannot_serve_is_no_good_answer(way):
    with sides.source(way, None, reason="no copy was kept") as seed:
        assert run("status", seed.address) == cli.NO


# probe


def test_a_probe_measures_each_number_of_connections(way, capsys):
    with source(way) as seed:
        arguments = ("--connections", 1, 3, "--seconds", 0.1, "--json")
        assert run("probe", seed.address, *arguments) == cli.OK
        told = answer(capsys)
    assert 0 < told["latency_s"] < PATIENCE
    assert [one["connections"] for one in told["measured"]] == [1, 3]
    assert all(one["nbytes"] > 0 and one["wrong"] == 0 for one in told["measured"])


def test_a_probe_notices_wrong_blocks(way, capsys):
    with source(way) as seed:
        seed.store.tensors[3].view(torch.uint8).flatten()[7] ^= 1
        try:
            assert run("probe", seed.address, "--connections", 1, "--seconds", 0.1) == cli.NO
        finally:
            seed.store.tensors[3].view(torch.uint8).flatten()[7] ^= 1
    assert "blocks wrong" in capsys.readouterr().out


def test_a_probe_says_that_places_are_missing(way, capsys):
    with source(way, max_sessions=2) as seed:
        assert run("probe", seed.address, "--connections", 4, "--seconds", 0.1) == cli.NO
    assert "busy" in capsys.readouterr().out


# pull


def same(path, way, model, seed=0):
    got, wanted = load_file(path), expected(way, model, seed)
    assert got.keys() <= wanted.keys()
    missing = {wanted[name].data_ptr() for name in wanted.keys() - got.keys()}
    assert missing <= {wanted[name].data_ptr() for name in got}  # as they are tied
    return all(
        torch.equal(plain_bytes(way, got[name]), plain_bytes(way, wanted[name]))
        and got[name].dtype in (wanted[name].dtype, torch.uint8)
        for name in got
    )


@pytest.mark.parametrize("model", [many_rows, assorted, tied, nothing, only_empty])
def test_what_is_pulled_is_a_file_of_safetensors(way, tmp_path, model):
    with source(way, model) as seed:
        assert run("pull", seed.address, tmp_path) == cli.OK
        digest = seed.store.digests.weights
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert same(tmp_path / FILE, way, model)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata()["weights"] == digest
        assert json.loads(file.metadata()["attributes"]) == {}


def test_all_ranks_of_an_instance_are_pulled(way, tmp_path, capsys):
    with two_ranks(way) as addresses:
        assert run("pull", addresses[0], tmp_path, "--json") == cli.OK
    assert len(answer(capsys)) == 2
    for rank in range(2):
        assert same(tmp_path / f"netloader-rank-{rank}.safetensors", way, many_rows, rank)


def test_a_pull_goes_on_where_an_earlier_one_has_ended(way, tmp_path):
    path = tmp_path / FILE
    with source(way) as seed:
        assert run("pull", seed.address, tmp_path) == cli.OK
        sent = seed.status.bytes_sent
        # The last byte is wrong, and the file has been left as one that is not complete.
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink()
        path.with_name(f"{FILE}.part").write_bytes(data)
        in_small_chunks = ("--config", '{"CHUNK_MIB": 1}')
        assert run("pull", seed.address, tmp_path, *in_small_chunks) == cli.OK
        sides.until(lambda: not seed.status.sessions)
        assert 0 < seed.status.bytes_sent - sent < ALL * ROW
        before = seed.status.bytes_sent
        assert run("pull", seed.address, tmp_path) == cli.OK
        sides.until(lambda: not seed.status.sessions)
        assert seed.status.bytes_sent == before
    assert same(path, way, many_rows)


def test_of_other_weights_nothing_is_kept(way, tmp_path):
    with sides.source(way, rows, 1) as seed:
        assert run("pull", seed.address, tmp_path) == cli.OK
    with source(way) as seed:
        assert run("pull", seed.address, tmp_path) == cli.OK
    assert same(tmp_path / FILE, way, many_rows)


def test_what_was_pulled_before_stays_until_other_weights_are_there(way, tmp_path, monkeypatch):
    with sides.source(way, rows, 1) as seed:
        assert run("pull", seed.address, tmp_path) == cli.OK
    before = (tmp_path / FILE).read_bytes()

    def fail(*_, **options):
        raise LoadFailed("no source is left")

    monkeypatch.setattr(copies, "elastic_load", fail)
    with source(way) as seed:
        assert run("pull", seed.address, tmp_path) == cli.NO
    assert (tmp_path / FILE).read_bytes() == before


def test_a_pull_from_nobody_fails_and_says_why(way, tmp_path, capsys):
    gone = closed_port()
    assert run("pull", gone, tmp_path) == cli.NO
    said = capsys.readouterr().err
    assert f"{gone}: cannot connect" in said
    assert "no instance answers" in said


def test_instances_with_different_weights_are_not_mixed(way, tmp_path, capsys):
    with source(way) as one, sides.source(way, many_rows, 1) as other:
        other.server.process = "another process"
        assert run("pull", one.address, other.address, tmp_path) == cli.NO
    assert "different weights for rank 0" in capsys.readouterr().err


# hold


@contextlib.contextmanager
def holding(cwd, *arguments):
    """A process that holds weights, its address, and their digest."""
    command = [sys.executable, "-m", "vllm_ascend.model_loader.netloader", "hold", "--json"]
    holder = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with holder:
        try:
            line = holder.stdout.readline()
            assert line, holder.stderr.read()
            [(address, digest)] = json.loads(line).items()
            yield holder, parse_address(address), digest
        finally:
            holder.kill()


def test_what_is_held_in_files_outlives_the_instance(way, tmp_path):
    with source(way) as seed:
        held = ("--folder", str(tmp_path / "held"), str(seed.address))
        with holding(tmp_path, *held) as (holder, address, digest):
            seed.server.stop()
            assert digest == seed.store.digests.weights
            got = sides.load_here(way, [address], many_rows).check()
            assert got.digest == digest
            holder.send_signal(signal.SIGTERM)
            assert holder.wait(PATIENCE) == 0


def test_what_came_unchecked_is_not_held_if_it_is_something_else(way, monkeypatch, capsys):
    pull = copies.pull

    def spoilt(*arguments, **options):
        store = pull(*arguments, **options)
        store.tensors[0][0] ^= 1
        return store

    monkeypatch.setattr(copies, "pull", spoilt)
    with source(way) as seed:
        assert run("hold", seed.address, "--config", '{"VERIFY": false}') == cli.NO
        assert f"other weights came than {seed.store.digests.weights}" in capsys.readouterr().err


def test_what_is_held_in_memory_is_that_of_all_ranks(way):
    config = settings(way)
    with two_ranks(way) as addresses:
        held = []
        for address in addresses:
            model = copies.status_of(address, config).models[0]
            with copies.connect(address, config) as client:
                what = copies.describe(client, model.identity)
            store = copies.pull([address], what, None, config)
            held.append((what, store, copies.view_of(store, [address], config), "an instance"))
    with copies.holding(held, config, HOST) as addresses:
        for rank, address in enumerate(addresses):
            model = copies.status_of(address, config).models[0]
            assert (model.state, model.loaded_from) == ("serving", "an instance")
            assert model.ranks == {each.identity.rank: s.digests.weights for each, s, *_ in held}
            assert [end.address for end in model.endpoints.values()] == [*map(str, addresses)]
            who = identity(way, rank=rank, tp=2)
            sides.load_here(way, [address], many_rows, rank, who=who).check()


def test_what_accelerators_serve_is_held_as_well(way):
    device = Way.STREAM  # another layout, strides, and digests that devices compute
    config = settings(device)
    with sides.source(device, assorted) as seed:
        model = copies.status_of(seed.address, config).models[0]
        with copies.connect(seed.address, config) as client:
            what = copies.describe(client, model.identity)
        store = copies.pull([seed.address], what, None, config)
    assert store.digests.weights == seed.store.digests.weights
    with copies.holding([(what, store, None, "an instance")], config, HOST) as [address]:
        got = sides.load_here(device, [address], assorted).check()
    assert got.said("no process group, so the weights come over HTTP")


# hold --checkpoint


def holding_folder(folder, *more):
    return holding(folder.parent, "--checkpoint", str(folder), "--host", HOST, *more)


@pytest.fixture
def files(tmp_path):
    """A checkpoint of two files."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    torch.manual_seed(0)
    save_file(
        {
            "large": torch.randn(700, 1024).to(torch.bfloat16),
            "scale": torch.tensor(0.5),
            "none": torch.empty(0, 3),
        },
        made / "model-1.safetensors",
    )
    save_file({"fp8": torch.randn(9, 5).to(torch.float8_e4m3fn)}, made / "model-2.safetensors")
    (made / "config.json").write_text('{"hidden_size": 4}')
    return made


def checkpoint_in(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_every_region_of_a_checkpoint_that_is_held_is_that_of_its_files(way, files, tmp_path):
    who = {"MODEL": "small"}
    with holding_folder(files, "--config", json.dumps(who)) as (holder, address, digest):
        assert run("status", address) == cli.OK
        assert run("fetch", address, tmp_path / "got") == cli.OK
        status = copies.status_of(address, parse_config({}))
        [model] = status.models
        assert (model.loaded_from, model.ranks) == ("a checkpoint folder", {0: digest})
        assert (model.state, model.reason) == ("serving", "")
        assert model.identity.model == "small"
        client_of_eight = msgspec.structs.replace(
            model.identity, tp=8, rank=7, dtype="torch.bfloat16", layout="raw"
        )
        with copies.connect(address, parse_config({})) as client:
            assert client.join(api.Join(client_of_eight, view=True)).weights == digest
            records = decode(client.records(digest))
            rows, columns = {}, {}
            for seen in records.tensors:
                whole = columns[seen.name] = torch.empty(seen.shape, dtype=dtype_of(seen.dtype))
                rows[seen.name] = torch.empty_like(whole)
                for one in seen.copies:
                    region = api.Region(one.parameter, one.offset, [*one.size], [*one.stride])
                    read_regions(client, digest, [region], host_view(rows[seen.name]))
                    turned = torch.empty(seen.shape[::-1], dtype=whole.dtype)
                    region = api.Region(
                        one.parameter, one.offset, [*one.size[::-1]], [*one.stride[::-1]]
                    )
                    read_regions(client, digest, [region], host_view(turned))
                    whole.copy_(turned.permute([*range(turned.dim())[::-1]]))
        wanted = checkpoint_in(files)
        for found in (rows, columns):
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                same_kind = found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
                assert same_kind and torch.equal(
                    found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
                )
        assert run("pull", address, tmp_path / "copy") == cli.OK
        copy = load_file(tmp_path / "copy" / FILE)
        assert copy.keys() == wanted.keys()
        assert all(torch.equal(copy[name].float(), wanted[name].float()) for name in wanted)
        assert (tmp_path / "got/config.json").read_text() == '{"hidden_size": 4}'
        holder.send_signal(signal.SIGTERM)
        assert holder.wait(PATIENCE) == 0


def test_a_holder_ends_and_says_why_before_a_file_becomes_shorter(way, files):
    path = files / "model-1.safetensors"
    with holding_folder(files) as (holder, address, digest):
        with copies.connect(address, parse_config({})) as client:
            os.truncate(path, 100)  # waits for the holder, where the file system can
            assert holder.wait(PATIENCE) == cli.NO
            with pytest.raises(SourceError):
                client.records(digest)
        assert f"netloader: {path} " in holder.stderr.read()


def test_what_is_no_checkpoint_is_not_held(way, files, capsys):
    assert run("hold") == cli.USAGE
    assert "ADDRESS... or --checkpoint FOLDER" in capsys.readouterr().err
    (files / "config.json").unlink()
    assert run("hold", "--checkpoint", files) == cli.USAGE
    (files / "config.json").write_text("{}")
    os.truncate(files / "model-1.safetensors", 100)
    assert run("hold", "--checkpoint", files, "--host", HOST) == cli.NO
    assert "model-1.safetensors is no file of safetensors" in capsys.readouterr().err


# diff


def test_instances_with_equal_weights_are_equal(way, capsys):
    with source(way) as one, source(way) as other:
        assert run("diff", one.address, other.address) == cli.OK
        assert capsys.readouterr().out == f"equal, digest {one.store.digests.weights}\n"


def test_instances_with_equal_weights_that_are_not_one_model_are_not_equal(way, capsys):
    with source(way) as one, source(way, who=identity(way, model="another")) as other:
        assert run("diff", one.address, other.address) == cli.NO
    assert "and 'another' at" in capsys.readouterr().out


def test_tensors_that_differ_are_named(way, capsys):
    with source(way, rows) as one, sides.source(way, rows, 1) as other:
        assert run("diff", one.address, other.address, "--json") == cli.NO
    names = {f"{name} has other values" for name in expected(way, rows, 0)}
    told = answer(capsys)
    assert not told["equal"]
    assert {*told["differences"]} <= names
    assert told["differences"]


def test_a_field_of_the_identity_is_named_with_both_values(way, capsys):
    other_model = identity(way, model="another")
    with source(way) as one, sides.source(way, many_rows, 1, who=other_model) as other:
        assert run("diff", one.address, other.address) == cli.NO
    here, there = identity(way).model, "another"
    expected_line = f"model is {here!r} at {one.address} and {there!r} at {other.address}\n"
    assert capsys.readouterr().out == expected_line


# All of them


def test_a_source_that_lies_about_its_digests_is_no_source(way, monkeypatch, capsys):
    with source(way) as seed:
        monkeypatch.setattr(copies, "combine", lambda *_: seed.store.digests.__class__(b"", "x:1"))
        assert run("probe", seed.address) == cli.NO
    assert "and the source says" in capsys.readouterr().err


# fetch


@contextlib.contextmanager
def with_folder(way, folder):
    """A source whose model has a folder."""
    with source(way) as seed:
        seed.server.offer(Offer(identity(way), seed.store, folder=folder))
        yield seed


@pytest.fixture
def folder(tmp_path):
    """Has all kinds of files, and links."""
    made = tmp_path / "model"
    made.mkdir()
    (tmp_path / "secret.json").write_text("secret")
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (made / name).write_text(f"{name} of the model")
    for name in ("model.safetensors", ".env", "id_rsa", "notes.json", "modeling_own.py"):
        (made / name).write_text("not for everybody")
    (made / "vocab.json").symlink_to(tmp_path / "secret.json")
    (made / "merges.txt").mkdir()
    return made


USUAL = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}


def test_what_is_fetched_are_files_of_known_kinds_from_the_folder_only(way, folder, tmp_path):
    with with_folder(way, folder) as seed:
        assert run("fetch", seed.address, tmp_path / "got") == cli.OK
        got = {path.name: path.read_text() for path in (tmp_path / "got").iterdir()}
        assert got == {name: f"{name} of the model" for name in USUAL}
        assert run("fetch", seed.address, tmp_path / "all", "--remote-code") == cli.OK
    assert {path.name for path in (tmp_path / "all").iterdir()} == USUAL | {"modeling_own.py"}


def test_files_of_the_hubs_cache_are_links_that_are_followed(way, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("of the cache")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    with with_folder(way, snapshot) as seed:
        assert run("fetch", seed.address, tmp_path / "got") == cli.OK
    assert (tmp_path / "got/config.json").read_text() == "of the cache"


@pytest.mark.parametrize("name", ["vocab.json", "notes.json", "id_rsa", "model.safetensors"])
def test_a_file_that_is_not_told_is_not_sent(way, folder, name):
    with with_folder(way, folder) as seed, dial(seed.address) as client:
        told = client.files("netloader")
        assert {file.name for file in told} == USUAL | {"modeling_own.py"}
        with pytest.raises(SourceRefused, match=f"no file {name}"):
            client.file("netloader", api.ModelFile(name, 6, "0" * 64))


def test_a_larger_file_than_allowed_is_not_told(way, folder, monkeypatch):
    monkeypatch.setattr(model_files, "MAX_FILE", 25)
    with with_folder(way, folder) as seed, dial(seed.address) as client:
        assert "chat_template.jinja" not in {file.name for file in client.files("netloader")}


def test_a_file_that_gets_shorter_on_its_way_ends_the_connection(way, folder):
    large, nbytes = folder / "tokenizer.json", 64 << 20
    os.truncate(large, nbytes)
    with with_folder(way, folder) as seed, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or all is on its way at once
        sock.settimeout(PATIENCE)
        sock.connect((seed.address.host, seed.address.port))
        path = api.FILE.format(group="netloader", name=large.name)
        sock.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        came = len(sock.recv(1))
        os.truncate(large, 1 << 20)
        while part := len(sock.recv(1 << 20)):
            came += part
        assert 1 << 20 < came < nbytes
        assert run("fetch", seed.address, folder / "got") == cli.OK


def test_a_source_without_a_folder_says_so(way, tmp_path, capsys):
    with source(way) as seed:
        assert run("fetch", seed.address, tmp_path) == cli.NO
    assert "no folder of the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [("config.json", "other bytes than announced"), ("authorized_keys", "no file beside weights")],
)
def test_what_a_hostile_source_sends_is_not_written(
    way, folder, tmp_path, monkeypatch, capsys, name, words
):
    lie = api.ModelFile(name, len("config.json of the model"), "0" * 64)
    monkeypatch.setattr(WeightServer, "files", lambda self, group: [lie])
    with with_folder(way, folder) as seed:
        assert run("fetch", seed.address, tmp_path / "got") == cli.NO
    assert words in capsys.readouterr().err
    assert not [*(tmp_path / "got").iterdir()]
