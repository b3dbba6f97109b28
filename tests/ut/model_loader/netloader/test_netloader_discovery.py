"""From names to endpoints: real sources on addresses of this host, and a zone of the tests' own."""

import contextlib
import socket
import threading
from dataclasses import replace as replace_in

import dns.resolver
import pytest
import torch
from msgspec.structs import replace

from tests.identity import identity
from tests.name_server import name_server, resolver_at
from vllm_ascend.model_loader.netloader.errors import (
    OtherPlacement,
    SourceBusy,
    SourceLost,
    SourceRefused,
    SourceSilent,
    SourceUnreachable,
)
from vllm_ascend.model_loader.netloader.interaction import discovery
from vllm_ascend.model_loader.netloader.interaction.api import Code, Endpoint, ModelStatus, Status
from vllm_ascend.model_loader.netloader.interaction.cold_start import Phase, Seen
from vllm_ascend.model_loader.netloader.interaction.discovery import Discovery, Own
from vllm_ascend.model_loader.netloader.loading.sessions import status_of
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, parse_name

from .support import HOST, settings, store_of

ONE, OTHER = "127.0.0.2", "127.0.0.3"
WEIGHTS = {"a": torch.ones(1)}


def discover(*names, rank=0, own=None, connect=5.0, handshake=5.0, electing=False, **who):
    names = [parse_name(name) for name in names]
    own = own or Own("this process")
    who = identity(rank=rank, **who)
    config = settings(connect_timeout=connect, handshake_timeout=handshake)
    return Discovery(
        names, who, own, connect, lambda address: status_of(address, config), electing=electing
    )


def look_up(*names, **options):
    return discover(*names, **options).look_up()


def addresses(*names, **options):
    found, problems = look_up(*names, **options)
    assert problems == {}
    return [address for address, _ in found]


class Instance:
    """Two ranks of one instance, which know where they listen."""

    def __init__(self, stack, host=HOST, port=0, ranks=2):
        self.servers, self.endpoints = [], {}
        for rank in range(ranks):
            server = WeightServer(settings(listen_host=host), rank, host)
            server.process = f"process {rank} of {host}"
            stack.callback(server.stop)
            server.start(port + rank if port else 0)
            self.endpoints[rank] = server.endpoint
            server.offer(
                Offer(identity(rank=rank), store_of(WEIGHTS), endpoints=lambda: self.endpoints)
            )
            self.servers.append(server)

    def address(self, rank):
        host, _, port = self.endpoints[rank].address.rpartition(":")
        return Address(host, int(port))


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def zone(monkeypatch):
    """Addresses of names, for this process; a number is for how long the answer takes."""
    zone, resolve, late = {}, socket.getaddrinfo, threading.Event()

    def getaddrinfo(host, port, *arguments, **options):
        if host not in zone:
            return resolve(host, port, *arguments, **options)
        if zone[host] is None:
            late.wait(60)
        return [
            one for each in zone[host] or () for one in resolve(each, port, type=socket.SOCK_STREAM)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield zone
    late.set()


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_any_rank_of_an_instance_names_the_endpoints_of_all(stack, asked, rank):
    instance = Instance(stack)
    found, problems = look_up(str(instance.address(asked)), rank=rank)
    assert found == [(instance.address(rank), f"process {rank} of {HOST}")]
    assert problems == {}


def test_a_name_has_an_instance_at_each_of_its_addresses(stack, zone):
    one = Instance(stack, ONE)
    port = one.address(0).port
    other = Instance(stack, OTHER, port, ranks=1)
    zone["fleet.test"] = [ONE, OTHER, "127.0.0.4"]
    found, problems = look_up(f"dns+fleet.test:{port}")
    assert {address for address, _ in found} == {one.address(0), other.address(0)}
    [(address, problem)] = problems.items()
    assert address == f"127.0.0.4:{port}" and isinstance(problem, SourceUnreachable)


def test_an_instance_without_this_rank_may_have_its_weights_in_other_parts(stack):
    instance = Instance(stack, ranks=1)
    for who, kind in (({"tp": 2}, OtherPlacement), ({"tp": 2, "model": "b"}, SourceRefused)):
        found, problems = look_up(str(instance.address(0)), rank=1, **who)
        [problem] = problems.values()
        assert not found and type(problem) is kind and "tp is 2" in str(problem)


def test_an_endpoint_is_asked_at_the_host_that_was_reached_if_it_is_the_same_one(stack):
    instance = Instance(stack)
    port = instance.address(0).port
    for rank, endpoint in instance.endpoints.items():  # as it calls itself, which is not reached
        address = f"192.0.2.1:{endpoint.address.rpartition(':')[2]}"
        instance.endpoints[rank] = Endpoint(address, endpoint.instance)
    instance.servers[0].endpoint = instance.endpoints[0]
    [address] = addresses(f"{HOST}:{port}", rank=1)
    assert address == Address(HOST, int(instance.endpoints[1].address.rpartition(":")[2]))
    instance.endpoints[1] = Endpoint("192.0.2.2:9", "elsewhere")
    assert addresses(f"{HOST}:{port}", rank=1) == [Address("192.0.2.2", 9)]
    instance.endpoints[1] = Endpoint("localhost:9", "elsewhere")
    _, problems = look_up(f"{HOST}:{port}", rank=1)
    [problem] = problems.values()
    assert isinstance(problem, SourceRefused) and "localhost" in str(problem)


def test_who_was_asked_listens_where_it_was_asked_as_ports_may_be_mapped(stack):
    instance = Instance(stack)
    asked = instance.address(0)
    said = Endpoint("192.0.2.1:9", instance.endpoints[0].instance)
    instance.endpoints[0] = instance.servers[0].endpoint = said
    assert addresses(str(asked)) == [asked]


def test_two_processes_that_say_that_they_are_at_one_address_are_one_source(stack):
    one, other = Instance(stack, ONE), Instance(stack, OTHER)
    for instance in (one, other):
        instance.endpoints[1] = Endpoint("192.0.2.1:9", f"of {instance.address(0)}")
    found = addresses(str(one.address(0)), str(other.address(0)), rank=1)
    assert found == [Address("192.0.2.1", 9)]


def serve(stack, monkeypatch, name, *records):
    """Let this process ask a name server that knows these SRV records."""
    resolver = resolver_at(stack.enter_context(name_server(name, *records)))
    monkeypatch.setattr(dns.resolver, "default_resolver", resolver)


def test_srv_records_name_ports_and_hosts(stack, zone, monkeypatch):
    one, other = Instance(stack, ONE), Instance(stack, OTHER)
    zone["one.test"], zone["other.test"] = [ONE], [OTHER]
    records = [f"0 0 {one.address(0).port} one.test.", f"0 0 {other.address(1).port} other.test."]
    serve(stack, monkeypatch, "_netloader._tcp.fleet.test", *records)
    found = addresses("dnssrv+_netloader._tcp.fleet.test", rank=1)
    assert {*found} == {one.address(1), other.address(1)}
    found, problems = look_up("dnssrv+none.test")
    assert found == [] and "does not exist" in str(problems["dnssrv+none.test"])
    assert isinstance(problems["dnssrv+none.test"], SourceUnreachable)


def test_files_are_those_of_any_number_of_instances(stack, tmp_path):
    one, other = Instance(stack, ONE), Instance(stack, OTHER)
    for name, instance in (("one", one), ("other", other)):
        for rank in (0, 1):
            path = tmp_path / f"weights [a]-{name}_{rank}.txt"
            path.write_text(str(instance.address(rank)))
    (tmp_path / "weights [a]-other_0.log").write_text("no address")
    found = addresses(f"file+{tmp_path}/weights [a]-", rank=1)
    assert sorted(found) == [one.address(1), other.address(1)]
    found, problems = look_up(f"file+{tmp_path}/none-")
    assert found == [] and "there are no such files" in str([*problems.values()])


def test_a_file_without_an_address_is_a_problem_and_no_source(tmp_path):
    (tmp_path / "rank_0.txt").write_text("no address")
    found, problems = look_up(f"file+{tmp_path}/rank_")
    assert found == [] and "no port" in str(problems[f"file+{tmp_path}/rank_"])


def test_a_bad_file_and_a_record_of_no_host_cost_nobody_else(stack, zone, monkeypatch, tmp_path):
    instance = Instance(stack)
    (tmp_path / "rank_0.txt").write_bytes(b"\xff")
    (tmp_path / "rank_1.txt").write_text(str(instance.address(1)))
    (tmp_path / "rank_2.txt").mkdir()
    assert addresses(f"file+{tmp_path}/rank_") == [instance.address(0)]
    zone["one.test"] = [HOST]
    records = ["0 0 1 no-such-host.invalid.", f"0 0 {instance.address(0).port} one.test."]
    serve(stack, monkeypatch, "fleet.test", *records)
    assert addresses("dnssrv+fleet.test") == [instance.address(0)]


def test_all_addresses_of_one_instances_host_are_tried(stack, zone):
    instance = Instance(stack, ONE)
    port = instance.address(1).port
    zone["one.test"] = ["127.0.0.4", ONE]
    assert addresses(f"one.test:{port}", rank=1) == [Address("one.test", port)]
    assert addresses(f"one.test:{port}", rank=0) == [Address("one.test", instance.address(0).port)]


def test_kinds_of_names_may_be_mixed_and_an_instance_found_twice_is_one(stack, zone, tmp_path):
    instance = Instance(stack)
    zone["fleet.test"] = [HOST]
    (tmp_path / "rank_1.txt").write_text(str(instance.address(1)))
    names = [
        str(instance.address(0)),
        f"dns+fleet.test:{instance.address(0).port}",
        f"file+{tmp_path}/rank_",
    ]
    assert addresses(*names) == [instance.address(0)]


def test_a_look_up_that_does_not_end_costs_its_deadline_and_no_other_name(stack, zone):
    instance = Instance(stack)
    zone["slow.test"] = None
    found, problems = look_up("dns+slow.test:1", str(instance.address(0)), connect=0.2)
    assert [address for address, _ in found] == [instance.address(0)]
    assert "nothing in time" in str(problems["dns+slow.test:1"])


def test_a_name_that_is_not_known_may_be_known_later(zone):
    zone["none.test"] = []
    names = discover("dns+none.test:1")
    assert names.look_up() == ([], {})
    _, problems = look_up("dns+no-such-name.invalid:1")
    assert isinstance(problems["dns+no-such-name.invalid:1"], SourceUnreachable)


# Who is left out


def test_the_own_process_is_left_out(stack):
    instance = Instance(stack)
    own = Own(f"process 1 of {HOST}")
    assert addresses(str(instance.address(0)), rank=1, own=own) == []
    assert addresses(str(instance.address(0)), rank=0, own=own) == [instance.address(0)]


def test_where_this_instance_is_to_listen_nobody_is_asked(zone):
    zone["fleet.test"] = [HOST]
    assert addresses("dns+fleet.test:1", own=Own(ports=[1])) == []
    _, problems = look_up("dns+fleet.test:1", own=Own(ports=[2]))
    assert [*problems] == [f"{HOST}:1"]
    _, problems = look_up("dns+fleet.test:1")
    assert [*problems] == [f"{HOST}:1"]


def test_where_a_rank_of_this_instance_is_to_listen_on_another_host_nobody_is_asked(zone):
    zone["fleet.test"] = ["192.0.2.1"]
    told = []
    own = Own(ports=[1], hosts=lambda: told)
    _, problems = look_up("dns+fleet.test:1", own=own, connect=0.1)
    assert [*problems] == ["192.0.2.1:1"]
    zone["rank-1.test"] = ["192.0.2.1"]
    for host in ("192.0.2.1", "rank-1.test"):
        told = [host]
        assert addresses("dns+fleet.test:1", "rank-1.test:1", own=own) == []
        _, problems = look_up("dns+fleet.test:2", own=own, connect=0.1)
        assert [*problems] == ["192.0.2.1:2"]


def test_an_instance_that_does_not_know_its_rank_yet_is_asked_later(stack):
    instance = Instance(stack)
    del instance.endpoints[1]
    _, problems = look_up(str(instance.address(0)), rank=1)
    [problem] = problems.values()
    assert isinstance(problem, SourceBusy) and "rank 1 listens" in str(problem)


def test_an_instance_without_a_model_is_asked_later(stack):
    instance = Instance(stack)
    instance.servers[0].forget("netloader")
    _, problems = look_up(str(instance.address(0)))
    [problem] = problems.values()
    assert isinstance(problem, SourceBusy) and "no model of group 'netloader'" in str(problem)


# Of pipeline stages only the last one has a draft, and an instance's own has none yet.
def test_a_draft_is_where_its_rank_has_the_target(stack):
    instance = Instance(stack)
    asked = str(instance.address(0))
    draft = {"group": "netloader_draft", "model": "of the draft"}
    assert addresses(asked, rank=1, **draft) == [instance.address(1)]
    assert addresses(asked, rank=1, own=Own(f"process 1 of {HOST}"), **draft) == []
    _, problems = look_up(asked, rank=2, **draft)
    [problem] = problems.values()
    assert isinstance(problem, SourceBusy) and "rank 2 listens" in str(problem)


# Who comes first


class Statuses:
    """In the place of instances: what each says of itself."""

    def __init__(self, monkeypatch, local=()):
        self.asked, self.said = [], {}
        monkeypatch.setattr(f"{__name__}.status_of", self._status_of)
        monkeypatch.setattr(discovery, "_is_local", lambda host: host in local)

    def _status_of(self, address, config):
        self.asked.append(address.host)
        taken, state = self.said.get(address.host, (0, "serving"))
        endpoint = Endpoint(str(address), f"at {address}")
        model = ModelStatus(identity(), state, "", None, 1, "disk", None, {}, {0: endpoint}, False)
        return Status("0.1.0", f"at {address}", 0, [model], [], 4, taken, 0)


def hosts(*names, **options):
    return [address.host for address in addresses(*names, **options)]


def test_the_same_host_comes_first_then_who_serves_then_who_has_places(monkeypatch):
    names = [f"192.0.2.{number}:1" for number in range(1, 6)]
    statuses = Statuses(monkeypatch, local=["192.0.2.4"])
    statuses.said = {
        "192.0.2.1": (3, "serving"),
        "192.0.2.2": (0, "loading"),
        "192.0.2.3": (1, "serving"),
        "192.0.2.4": (4, "serving"),
        "192.0.2.5": (2, "serving"),
    }
    order = ["192.0.2.4", "192.0.2.3", "192.0.2.5", "192.0.2.1", "192.0.2.2"]
    assert hosts(*names) == order


def test_the_priority_of_srv_records_comes_before_all_that(stack, zone, monkeypatch):
    zone |= {f"{number}.test": [f"192.0.2.{number}"] for number in (1, 2, 3)}
    statuses = Statuses(monkeypatch, local=["192.0.2.3"])
    statuses.said["192.0.2.1"] = (3, "loading")
    serve(stack, monkeypatch, "fleet.test", "1 1 1 1.test.", "2 1 1 3.test.", "3 9 1 2.test.")
    assert hosts("dnssrv+fleet.test") == ["192.0.2.1", "192.0.2.3", "192.0.2.2"]
    monkeypatch.setattr(discovery, "MAX_ASKED", 1)
    assert hosts("dnssrv+fleet.test") == ["192.0.2.1"]


def test_the_weight_of_srv_records_says_how_often_one_of_several_equal_ones_is_the_first(
    stack, zone, monkeypatch
):
    zone |= {f"{number}.test": [f"192.0.2.{number}"] for number in (1, 2, 3)}
    Statuses(monkeypatch)
    serve(stack, monkeypatch, "fleet.test", "0 1 1 1.test.", "0 3 1 2.test.", "0 0 1 3.test.")
    orders = [hosts("dnssrv+fleet.test", own=Own(f"client {number}")) for number in range(100)]
    first = [order[0] for order in orders]
    assert 65 <= first.count("192.0.2.2") <= 85
    assert first.count("192.0.2.3") <= 1
    # Of four equal ones each is the first for a quarter.
    monkeypatch.setitem(zone, "3.test", [f"192.0.2.{number}" for number in (3, 4, 5, 6)])
    serve(stack, monkeypatch, "fleet.test", "0 7 1 3.test.")
    orders = [hosts("dnssrv+fleet.test", own=Own(f"client {number}")) for number in range(100)]
    assert 15 <= [order[0] for order in orders].count("192.0.2.3") <= 35


def test_equal_ones_come_in_the_same_order_for_one_client_and_in_others_for_others(monkeypatch):
    Statuses(monkeypatch)
    names = [f"192.0.2.{number}:1" for number in range(1, 9)]
    orders = [hosts(*names, own=Own(f"client {number}")) for number in range(20)]
    assert orders[0] == hosts(*reversed(names), own=Own("client 0"))
    assert len({order[0] for order in orders}) >= 5


def test_of_many_those_are_asked_that_were_not_asked_before(monkeypatch):
    monkeypatch.setattr(discovery, "MAX_ASKED", 4)
    statuses = Statuses(monkeypatch)
    names = discover(*[f"192.0.2.{number}:1" for number in range(1, 9)])
    for _ in range(2):
        assert len(names.look_up()[0]) == 4
    assert len({*statuses.asked}) == 8


def test_who_takes_long_to_answer_is_not_waited_for_once_another_has(stack, monkeypatch):
    instance = Instance(stack)
    silent = stack.enter_context(socket.create_server((HOST, 0)))
    monkeypatch.setattr(discovery, "_OTHERS", 0.05)
    port = silent.getsockname()[1]
    found, problems = look_up(str(instance.address(0)), f"{HOST}:{port}", handshake=60)
    assert [address for address, _ in found] == [instance.address(0)]
    [problem] = problems.values()
    assert isinstance(problem, SourceUnreachable) and "no status yet" in str(problem)


def test_what_is_no_instance_is_a_problem(stack):
    server = stack.enter_context(socket.create_server((HOST, 0)))
    threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
    found, problems = look_up(f"{HOST}:{server.getsockname()[1]}")
    assert found == [] and len(problems) == 1


# What a look-up shows of all instances of the model


class Waiting(Statuses):
    """Instances that have no weights, as they say themselves."""

    def __init__(self, monkeypatch, **options):
        super().__init__(monkeypatch, **options)
        self.of_model, self.can_read = {}, {}

    def _status_of(self, address, config):
        said = self.said.get(address.host)
        if isinstance(said, Exception):
            raise said
        status = super()._status_of(address, config)
        [model] = status.models
        who = identity(**self.of_model.get(address.host, {}))
        can_read = self.can_read.get(address.host, False)
        return replace(status, models=[replace(model, identity=who, can_read=can_read)])


def test_who_waits_or_reads_is_no_source_and_is_told_of_with_what_it_says(monkeypatch):
    statuses = Waiting(monkeypatch)
    states = ["waiting", "volunteering", "reading", "loading", "serving"]
    statuses.said = {f"192.0.2.{index}": (0, state) for index, state in enumerate(states)}
    statuses.can_read["192.0.2.1"] = True
    names = discover(*[f"{host}:1" for host in statuses.said])
    found, problems = names.look_up()
    assert {address.host for address, _ in found} == {"192.0.2.3", "192.0.2.4"}
    assert all(isinstance(problem, SourceBusy) for problem in problems.values())
    assert "reads the weights from disk" in str(problems["192.0.2.2:1"])
    assert {one: (seen.state, seen.can_read) for one, seen in names.seen.replicas.items()} == {
        f"at 192.0.2.{index}:1": (state, index == 1) for index, state in enumerate(states)
    }
    assert names.seen == Seen(names.seen.replicas)  # not listed, nobody silent, all names known


def test_another_model_or_one_that_cannot_be_a_source_does_not_count(monkeypatch):
    statuses = Waiting(monkeypatch)
    statuses.said = {
        "192.0.2.1": (0, "waiting"),
        "192.0.2.2": (0, "cannot_serve"),
        "192.0.2.3": (0, "waiting"),
    }
    statuses.of_model = {"192.0.2.1": {"model": "another"}, "192.0.2.3": {"rank": 0, "dp_rank": 1}}
    names = discover(*[f"{host}:1" for host in statuses.said])
    found, _ = names.look_up()
    assert {address.host for address, _ in found} == {"192.0.2.1", "192.0.2.2"}
    assert [*names.seen.replicas] == ["at 192.0.2.3:1"]


def test_an_instance_knows_whether_the_names_stand_for_it_too(monkeypatch):
    Waiting(monkeypatch, local=["192.0.2.1"])
    for own, listed in [
        (Own("x", [1]), True),  # its address is not even asked
        (Own("at 192.0.2.2:1"), True),
        (Own("x", [2]), False),
        (Own("x"), False),
    ]:
        names = discover("192.0.2.1:1", "192.0.2.2:1", own=own)
        names.look_up()
        assert names.seen.listed == listed


def test_who_does_not_answer_is_silent_and_where_nobody_listens_nobody_is(monkeypatch):
    statuses = Waiting(monkeypatch)
    statuses.said = {
        "192.0.2.1": SourceSilent("no connection in time"),
        "192.0.2.2": SourceLost("no answer in time"),
        "192.0.2.3": SourceUnreachable("Connection refused"),
        "192.0.2.4": SourceRefused("not ours"),
    }
    names = discover(*[f"{host}:1" for host in statuses.said])
    names.look_up()
    assert names.seen == Seen(silent={"192.0.2.1:1", "192.0.2.2:1"})


def test_a_rank_that_loads_the_target_has_nothing_of_a_draft_and_another_may_load_it(stack):
    instance = Instance(stack)
    for rank, silent in (0, set()), (1, {str(instance.address(0))}):
        names = discover(str(instance.address(0)), rank=rank, group="netloader_draft")
        names.look_up()
        assert names.seen.silent == silent


def test_a_name_that_cannot_be_looked_up_is_told_of(zone):
    names = discover("dns+nowhere.test:1")
    names.look_up()
    assert not names.seen.whole


def test_of_the_ranks_of_an_instance_the_one_that_loads_the_same_part_knows(stack):
    instance = Instance(stack)
    for rank, phase in enumerate([Phase.READING, Phase.WAITING]):
        offer = Offer(identity(rank=rank), None, code=Code.LOADING, phase=phase)
        instance.servers[rank].offer(replace_in(offer, endpoints=lambda: instance.endpoints))
    for order in (0, 1), (1, 0):
        names = discover(*[str(instance.address(rank)) for rank in order])
        names.look_up()
        [(process, replica)] = names.seen.replicas.items()
        assert (process, replica.state) == (f"process 0 of {HOST}", "reading")


def test_of_many_all_ask_the_same_ones_each_time_and_only_these_can_be_chosen(monkeypatch):
    monkeypatch.setattr(discovery, "MAX_ASKED", 4)
    statuses = Waiting(monkeypatch, local=["192.0.2.1"])
    names = [f"192.0.2.{number}:1" for number in range(1, 10)]
    statuses.said = {name.partition(":")[0]: (0, "waiting") for name in names}
    looks, asked = [], []
    for own in "ab":
        search = discover(*names, own=Own(own), electing=True)
        for _ in range(8):
            search.look_up()
            looks.append({*search.seen.replicas})
        asked.append({*statuses.asked})
    assert len(looks[0]) == 2 and looks == looks[:1] * 16
    assert asked[0] == {*statuses.said}  # the others are asked in turn
    elector, other = next(iter(looks[0])), next(n for n in names if f"at {n}" not in looks[0])
    for process, listed in (elector, True), (f"at {other}", False):
        search = discover(*names, own=Own(process), electing=True)
        for _ in range(8):
            search.look_up()
            assert search.seen.listed == listed
    # What is not to be missed is told of by all.
    statuses.said[other.partition(":")[0]] = (0, "reading")
    search = discover(*names, electing=True)
    for _ in range(8):
        search.look_up()
        if f"at {other}" in search.seen.replicas:
            break
    assert search.seen.replicas[f"at {other}"].state == "reading"
