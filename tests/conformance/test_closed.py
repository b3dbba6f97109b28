"""Loads between instances that let in only those with their secret or their certificates."""

import contextlib
import functools

import pytest

from tests.certificates import OTHER_SECRET, SECRET, Authority, secret_file
from vllm_ascend.model_loader.netloader.errors import SourceRefused
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.interaction.discovery import NOBODY, Discovery
from vllm_ascend.model_loader.netloader.loading.sessions import status_of
from vllm_ascend.model_loader.netloader.utils import parse_name

from . import models
from .fleet import PATIENT, fleet
from .models import ROW, many_rows
from .sides import HOST, identity, load, load_here, loading, log_lines, settings, source, until
from .ways import Way

HTTP = pytest.mark.ways(Way.HTTP)


@pytest.fixture
def secret(tmp_path):
    return {"secret_file": secret_file(tmp_path, SECRET)}


@pytest.fixture
def other(tmp_path):
    return {"secret_file": secret_file(tmp_path, OTHER_SECRET, name="other")}


@pytest.mark.parametrize("changes", [{}, {"chunk_mib": 4, "connections": 3}], ids=str)
def test_every_kind_of_tensor_arrives(way, secret, changes):
    with source(way, models.assorted, **secret) as running:
        outcome = load(way, [running], models.assorted, **secret, **changes)
        assert not running.server._server.door.counts
    assert outcome.check().digest == running.store.digests.weights


@pytest.mark.parametrize("model", [models.nothing, models.one_scalar, models.packed])
def test_every_kind_of_model_arrives(way, secret, model):
    with source(way, model, **secret) as running:
        load(way, [running], model, **secret).check()


def test_with_certificates_all_arrives(way, tmp_path):
    authority = Authority(tmp_path)
    client = authority.files("client.test", who="client")
    with source(way, **authority.files(who="source")) as running:
        load(way, [running], **client).check()


def test_a_source_with_another_secret_is_one_reason_and_the_next_one_is_taken(way, secret, other):
    with source(way, **other) as foreign, source(way, **secret) as own:
        outcome = load(way, [foreign, own], **secret).check()
        assert outcome.gave == str(own.address)
        assert foreign.server.bytes_sent == 0
        # Its client may know before it does.
        until(lambda: foreign.server._server.door.counts == {"declined": 1})


@pytest.mark.parametrize(
    ("ours", "theirs"), [("secret", "other"), ("secret", "none"), ("none", "other")]
)
def test_without_the_same_secret_there_is_a_reason_and_no_byte(way, secret, other, ours, theirs):
    given = {"none": {}, "other": other, "secret": secret}
    with source(way, **given[theirs]) as running:
        outcome = load(way, [running], source_wait=20.0, **given[ours])
        assert running.server.bytes_sent == 0
    outcome.check_failed(str(running.address), "SECRET_FILE" if ours == "none" else "")
    assert outcome.seconds < 15  # it is no source that may serve later


@HTTP
def test_those_that_load_pass_on_to_each_other_inside_tls(way, secret, other):
    with (
        source(way, many_rows, max_send_rate=128 * ROW, **PATIENT, **secret) as seed,
        fleet(way, 3, **secret) as replicas,
        fleet(way, 1, **other) as [stranger],
    ):
        for replica in replicas:
            replica.start([seed])
        stranger.start([seed, *replicas])
        for replica in replicas:
            replica.check()
        stranger.thread.join(20)
        assert "SECRET_FILE" in stranger.reasons
        assert all("), " in replica.gave for replica in replicas)  # from several
        until(lambda: all(one.server._server.door.counts["declined"] for one in replicas))


@HTTP
def test_instances_are_found_by_names_inside_tls(way, secret, other):
    with source(way, **secret) as running:
        name = parse_name(f"dns+{HOST}:{running.address.port}")
        for given, reason in ((secret, ""), (other, "SECRET_FILE"), ({}, "uses TLS")):
            ask = functools.partial(status_of, config=settings(way, **given))
            found, problems = Discovery([name], identity(way), NOBODY, 5.0, ask).look_up()
            if reason:
                assert found == []
                assert reason in str(problems[str(running.address)])
            else:
                assert [address for address, _ in found] == [running.address]
                assert problems == {}


@HTTP
def test_the_secret_is_exchanged_while_clients_load(way, tmp_path, secret):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    with contextlib.ExitStack() as stack:
        here = {"secret_file": secret_file(theirs, SECRET)}
        client = {"secret_file": secret_file(ours, SECRET)}
        running = stack.enter_context(source(way, many_rows, max_send_rate=256 * ROW, **here))
        long = stack.enter_context(loading(way, [running], many_rows, **client))
        until(lambda: running.sessions)
        for turn in (
            lambda: secret_file(theirs, SECRET, OTHER_SECRET),
            lambda: secret_file(ours, OTHER_SECRET, SECRET),
            lambda: secret_file(theirs, OTHER_SECRET),
        ):
            turn()
            load_here(way, [running], many_rows, **client).check()
        long().check()
        load_here(way, [running], many_rows, **secret).check_failed("SECRET_FILE")


def test_many_that_are_refused_leave_nothing_behind(way, secret, other):
    with source(way, **secret) as running, log_lines() as lines:
        for _ in range(100):
            with pytest.raises(SourceRefused):
                ElasticClient.connect(
                    running.address,
                    connect=5.0,
                    handshake=5.0,
                    progress=5.0,
                    credentials=settings(way, **other).credentials,
                )
        until(lambda: running.server._server.door.counts["declined"] == 100)
        until(lambda: not running.server._server._waiting)
        load(way, [running], **secret).check()
    assert len([line for line in lines if "refused the connection of" in line]) <= 3
