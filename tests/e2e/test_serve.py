"""What a user of `vllm serve --load-format netloader` sees.

Each test looks at tokens and their log probabilities, at log lines and at files, never inside.
Those marked `core` also run on the older supported vLLM.
"""

import json
import os
import re
import socket
import subprocess
import time
from contextlib import ExitStack

import pytest

from tests.certificates import OTHER_SECRET, SECRET, Authority, secret_file
from tests.name_server import name_server
from tools.make_model import make_adapter
from tools.netloader_view import find_loads, source_list
from tools.vllm_server import ServerError, VllmServer, free_port, launch
from vllm_ascend.model_loader.netloader.credentials import derived_from

from .killing_proxy import killing_proxy
from .ranks import Pair
from .support import COMMAND, PROMPTS, TOKENS, drafting, fork, holding, metrics, running

pytestmark = pytest.mark.timeout(600)

TP2 = ("--tensor-parallel-size=2",)


def assert_loaded_from(client, source, ranks=1):
    """The client's log names the source, rank by rank, and both sides saw the same bytes."""
    loads = client.loads()
    assert [load.rank for load in loads] == list(range(ranks))
    for load in loads:
        assert source.address(load.rank) in load.sources
        assert load.megabytes > 0
    assert {load.digest for load in loads} <= source.digests_sent()
    assert not client.why_from_disk()


def find_views(instance, cut):
    """Returns the lines of the ranks that have loaded from a source that is cut in another way."""
    through = rf"NetLoader rank \d: loaded .* through their view of the checkpoint \({cut}\)"
    return re.findall(through, instance.server.read_log())


@pytest.mark.core
def test_client_says_what_its_seed_says(seed, said, client):
    assert client.say() == said
    assert_loaded_from(client, seed)


@pytest.mark.core
def test_client_is_a_source_and_config_file_goes_first(
    tmp_path, llama, dead_address, seed, said, client
):
    file = tmp_path / "netloader.json"
    file.write_text(json.dumps({"SOURCE": source_list({0: [dead_address, client.address()]})}))
    beside = {
        "CONFIG_FILE": str(file),
        "MODEL": "llama",
        "SOURCE": source_list({0: [seed.address()]}),
    }
    multiproc = tmp_path / "multiproc"
    multiproc.mkdir()
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(multiproc)}
    # Nothing of the model is on disk but what a source has given.
    fetched = tmp_path / "fetched"
    subprocess.run([*COMMAND, "fetch", client.address(), str(fetched)], check=True)
    with running(
        tmp_path / "third", fetched, beside, environment=environment, start=launch
    ) as third:
        assert third.say() == said
        assert_loaded_from(third, client)
        assert metrics(third.address())["netloader_received_bytes_total"] > 0
        # Its ranks' metrics are among vLLM's own.
        assert third.server.count("netloader_received_bytes_total") > 0
        assert third.server.count("netloader_state") == 1
        # The dead source cost nothing but a line in the log.
        assert third.server.search_log(rf"NetLoader rank 0: source {dead_address}")


@pytest.mark.core
def test_without_a_source_that_fits_it_loads_from_disk(tmp_path, llama, dead_address, seed, said):
    sources = [dead_address, seed.address()]
    config = {"MODEL": "another", "SOURCE": source_list({0: sources})}
    with running(tmp_path / "other", llama.full, config) as other:
        assert other.say() == said
        assert not other.loads()
        reasons = other.why_from_disk()
        assert dead_address in reasons
        assert seed.address() in reasons
        assert "'another'" in reasons
        assert "'llama'" in reasons


def test_without_source_and_disk_the_error_names_both(tmp_path, llama, dead_address):
    config = {"MODEL": "llama", "SOURCE": source_list({0: [dead_address]})}
    with (
        pytest.raises(ServerError),
        running(tmp_path / "lost", llama.bare, config),
    ):
        pass
    log = (tmp_path / "lost" / "log.txt").read_text()
    assert dead_address in log
    assert "cannot be loaded from disk either" in log


@pytest.fixture(scope="module")
def held(llama):
    """Where the seed's checkpoint is held by a process without vLLM."""
    with holding("--checkpoint", str(llama.full), '--config={"MODEL": "llama"}') as address:
        yield address


def test_wedged_source_is_passed_over_for_one_without_vllm(
    tmp_path, llama, held, said, wedged_client
):
    config = {
        "MODEL": "llama",
        "SOURCE": source_list({0: [wedged_client.address(), held]}),
        "MAX_SOURCES": 1,
        "HANDSHAKE_TIMEOUT": 2,
    }
    with running(tmp_path / "patient", llama.bare, config) as patient:
        assert patient.say() == said
        assert len(find_views(patient, "the whole checkpoint there, TP 1 here")) == 1
        assert not patient.why_from_disk()
        assert patient.server.search_log(rf"source {wedged_client.address()}")


@pytest.fixture(scope="module")
def pair(folder, llama, seed):
    """Has two ranks, no weight files, and its weights from a source of one rank."""
    config = {"MODEL": "llama", "SOURCE": seed.address()}
    with running(folder / "pair", llama.bare, config, arguments=TP2) as pair:
        assert len(find_views(pair, "TP 1 there, TP 2 here")) == 2
        yield pair


@pytest.fixture(scope="module")
def pair_said(pair, said):
    completions = pair.say()
    # Sums are split among ranks, so rounding may turn a later token; the first stands.
    assert [each.tokens[0] for each in completions] == [each.tokens[0] for each in said]
    return completions


_RESOLVER = """
import dns.resolver
dns.resolver.default_resolver = dns.resolver.Resolver(configure=False)
dns.resolver.default_resolver.nameservers = ["127.0.0.1"]
dns.resolver.default_resolver.port = {port}
"""


def test_five_instances_started_at_once_with_one_name_read_the_disk_once(tmp_path, llama, said):
    ports = [free_port() for _ in range(5)]
    records = [f"0 1 {port} localhost." for port in ports]
    with name_server("fleet.test", *records) as port, ExitStack() as stack:
        instances = []
        for index, listen in enumerate(ports):
            config = {"MODEL": "llama", "SOURCE": "dnssrv+fleet.test", "LISTEN_PORT": listen}
            instances.append(
                VllmServer(
                    llama.full if index else llama.bare,
                    tmp_path / f"{index}.txt",
                    extra_config=config,
                    environment={"RUN_FIRST": _RESOLVER.format(port=port)},
                    launch=fork,
                )
            )
            stack.callback(instances[-1].kill)
            instances[-1].start()
        for instance in instances:
            instance.wait_until_ready(300.0)  # five share the cores
        assert [[one.complete(prompt, TOKENS) for prompt in PROMPTS] for one in instances] == [
            said
        ] * 5
        readers = [one for one in instances if one.search_log("chosen to read the weights")]
        assert [one for one in instances if one.search_log(r"loaded .* from disk")] == readers
        assert len(readers) == 1
        assert not any(one.search_log("trying the disk") for one in instances)
        for client in instances:
            loads = find_loads(client.read_log())
            assert len(loads) == (client not in readers)
            for load in loads:
                assert {*map(int, re.findall(r":(\d+)\b", load.source))} <= {*ports}
        weights = r"instance digest (instance:\S+), "
        assert len({one.search_log(weights)[1] for one in instances}) == 1


def test_two_ranks_say_what_those_say_that_load_from_disk(tmp_path, llama, pair_said, held):
    config = {"MODEL": "llama", "SOURCE": held, "FALLBACK": False}
    with (
        running(tmp_path / "disk", llama.full, {"MODEL": "llama"}, arguments=TP2) as disk,
        running(tmp_path / "held", llama.bare, config, arguments=TP2) as client,
    ):
        assert disk.say() == pair_said
        assert client.say() == pair_said
        assert len(find_views(client, "the whole checkpoint there, TP 2 here")) == 2


def test_one_rank_says_after_reloads_from_other_sizes_what_it_says_at_first_with_lora_too(
    tmp_path, llama, model, pair, said
):
    make_adapter(tmp_path / "adapter", llama.full)
    lora = ("--enable-lora", f"--lora-modules=adapter={tmp_path / 'adapter'}")
    developing = {"VLLM_SERVER_DEV_MODE": "1"}
    config = {"MODEL": "llama", "SOURCE": pair.address(1), "FALLBACK": False}
    folder = str(model("llama", seed=1).full)
    with (
        holding("--checkpoint", folder, '--config={"MODEL": "llama"}') as other,
        running(
            tmp_path / "one", llama.bare, config, arguments=lora, environment=developing
        ) as one,
    ):
        assert one.say() == said
        adapted = one.say_with("adapter")
        assert find_views(one, "TP 2 there, TP 1 here")
        one.server.reload(config | {"SOURCE": other})
        assert one.say() != said
        assert one.say_with("adapter") != adapted
        one.server.reload(config | {"SOURCE": pair.address(0)})
        assert one.say() == said
        assert one.say_with("adapter") == adapted
        assert one.server.read_log().count("got the checkpoint for a reload") == 2


def test_no_mixture_when_the_source_of_one_rank_dies_and_the_next_has_another_checkpoint(
    tmp_path, llama, model, pair, pair_said
):
    log = tmp_path / "client" / "log.txt"
    (tmp_path / "other").mkdir()
    ranks = Pair(tmp_path / "other")
    try:
        other = ranks.load(model("llama", seed=1).full, MODEL="llama", tp=2)
        first, second = (other.address(rank) for rank in (0, 1))

        def kill():
            # Rank 0 has all of its weights by then.
            for _ in range(600):
                if "NetLoader rank 0: loaded" in log.read_text():
                    break
                time.sleep(0.1)
            ranks.kill()

        with killing_proxy(second, kill, after=1 << 20) as dies:
            sources = {0: [first, pair.address(0)], 1: [dies, pair.address(1)]}
            config = {"MODEL": "llama", "SOURCE": source_list(sources)}
            config |= {"MAX_SOURCES": 1, "CHUNK_MIB": 1, "PROGRESS_TIMEOUT": 60}
            with running(tmp_path / "client", llama.bare, config, arguments=TP2) as client:
                assert client.say() == pair_said
                # Rank 1 gives up what it has while it looks for the weights that rank 0 has.
                assert [load.source for load in client.loads()] == [
                    first,
                    *(pair.address(rank) for rank in (0, 1, 1)),
                ]
                assert client.server.search_log("rank 0: the ranks of this instance have different")

                files = [client.address_file(rank) for rank in (0, 1)]
                assert all(file.exists() for file in files)
                client.server.stop()
                assert not any(file.exists() for file in files)
    finally:
        ranks.kill()


def test_pipeline_stages_pull_from_their_like(tmp_path, llama):
    """Loads only: vLLM's CPU backend takes two pipeline stages and then fails to generate."""
    stages = ("--pipeline-parallel-size=2",)
    with running(tmp_path / "pair", llama.full, {"MODEL": "llama"}, arguments=stages) as pair:
        # One name for both ranks: either rank of the source says where both listen.
        config = {"MODEL": "llama", "SOURCE": pair.address(1)}
        with running(tmp_path / "next", llama.bare, config, arguments=stages) as following:
            assert_loaded_from(following, pair, ranks=2)
            one, two = following.loads()
            assert one.digest != two.digest


@pytest.mark.core
def test_a_secret_is_exchanged_between_running_instances(tmp_path, model):
    """First with both secrets, then with the new one alone; one with a third is passed over."""
    old, new, third = SECRET, OTHER_SECRET, "third-secret-" * 4
    folders = [tmp_path / name for name in ("seed-has", "holder-has", "client-has")]
    for path in folders:
        path.mkdir()
    seed_has, holder_has, client_has = (
        {"NETLOADER_SECRET_FILE": secret_file(path, old)} for path in folders
    )
    full, bare = model("llama-tied").full, model("llama-tied").bare
    with (
        running(tmp_path / "seed", full, {"MODEL": "tied"}, environment=seed_has) as seed,
        holding(seed.address(), environment=holder_has) as stray,
    ):
        secret_file(folders[0], old, new)
        secret_file(folders[1], third)
        secret_file(folders[2], new, old)
        sources = source_list({0: [stray, seed.address()]})
        config = {"MODEL": "tied", "SOURCE": sources, "MAX_SOURCES": 1}
        with running(tmp_path / "client", bare, config, environment=client_has) as client:
            assert client.say() == seed.say()
            assert_loaded_from(client, seed)
            foreign = "its certificate does not belong to a secret in SECRET_FILE here"
            assert client.server.search_log(rf"source {stray}: {foreign}")

            secret_file(folders[0], new)
            secret_file(folders[2], new)
            diff = [*COMMAND, "diff", seed.address(), client.address()]
            late = {"NETLOADER_SECRET_FILE": secret_file(tmp_path, old)}
            for known, said in ((client_has, "equal, digest"), (late, foreign)):
                ran = subprocess.run(diff, env=os.environ | known, capture_output=True, text=True)
                assert said in ran.stdout + ran.stderr
            token = derived_from(new).token
            assert metrics(seed.address(), token)["netloader_sent_bytes_total"] > 0
            assert metrics(client.address(), token)["netloader_received_bytes_total"] > 0
        host, port = seed.address().split(":")
        with socket.create_connection((host, int(port)), timeout=30) as stranger:
            stranger.sendall(b"GET /status HTTP/1.1\r\nHost: h\r\n\r\n")
            assert b"HTTP" not in stranger.recv(1 << 16)
        assert seed.server.wait_for_log(r"refused the connection of .*: it does not use TLS")


def test_between_instances_with_certificates_and_one_whose_secret_nobody_has(tmp_path, model):
    authority, moe = Authority(tmp_path), model("moe")
    token = "token-" * 8
    common = {
        "MODEL": "moe",
        "TLS_SERVER_NAME": "netloader.test",
        "TOKEN_FILE": secret_file(tmp_path, token, name="token"),
    }

    def closed(who):
        files = authority.files("netloader.test", who=who)
        return common | {key.upper(): path for key, path in files.items()}

    with running(tmp_path / "seed", moe.full, closed("seed")) as seed:
        config = closed("client") | {"SOURCE": source_list({0: [seed.address()]})}
        with running(tmp_path / "client", moe.bare, config) as client:
            said = seed.say()
            assert client.say() == said
            assert_loaded_from(client, seed)
            assert metrics(client.address(), token)["netloader_received_bytes_total"] > 0

            sources = [client.address(), seed.address()]
            config = {"MODEL": "moe", "SOURCE": source_list({0: sources})}
            config["SECRET_FILE"] = secret_file(tmp_path, SECRET)
            with running(tmp_path / "stranger", moe.full, config) as stranger:
                assert stranger.say() == said
                assert not stranger.loads()
                reasons = stranger.why_from_disk()
                foreign = "its certificate does not belong to a secret in SECRET_FILE here"
                assert all(f"{source}: {foreign}" in reasons for source in sources)
            for source in (client, seed):
                refused = r"refused the connection of .*: it does not accept this instance's cert"
                assert source.server.wait_for_log(refused)


@pytest.mark.parametrize(
    ("arch", "modes"),
    [
        pytest.param("w8a8-static", ("no", "hbm", "dram"), id="static"),
        pytest.param("w8a8-dynamic", ("hbm",), id="dynamic", marks=pytest.mark.core),
    ],
)
def test_int8_models_in_each_cache_mode(tmp_path, model, arch, modes):
    """A chain: an instance of each mode feeds the next."""
    made = model(arch)
    with ExitStack() as instances:
        config = {"MODEL": arch, "INT8_CACHE": modes[0]}
        source = instances.enter_context(running(tmp_path / "seed", made.full, config))
        said = source.say()
        for number, mode in enumerate((*modes[1:], "no")):
            sources = source_list({0: [source.address()]})
            config = {"MODEL": arch, "INT8_CACHE": mode, "SOURCE": sources}
            folder = tmp_path / f"client{number}"
            client = instances.enter_context(running(folder, made.bare, config))
            assert client.say() == said
            assert_loaded_from(client, source)
            source.server.kill()
            source = client


@pytest.mark.core
def test_source_killed_in_mid_transfer_then_disk(tmp_path, model, said, llama):
    # The other weights show that the tokens are those on disk, not a mixture.
    other = model("llama", seed=1)
    config = {"MODEL": "llama"}
    with (
        running(tmp_path / "seed", other.full, config) as seed,
        killing_proxy(seed.address(), seed.server.kill, after=1 << 20) as address,
    ):
        config |= {"CHUNK_MIB": 1, "SOURCE": source_list({0: [address]})}
        with running(tmp_path / "client", llama.full, config) as client:
            assert not seed.server.is_running
            assert client.say() == said
            assert not client.loads()
            assert f"{address}: " in client.why_from_disk()


def test_draft_model_comes_from_the_source_too(tmp_path, llama, model):
    draft = model("llama", seed=1)
    with running(
        tmp_path / "seed", llama.full, {"MODEL": "llama"}, arguments=[drafting(draft.full)]
    ) as seed:
        config = {"MODEL": "llama", "SOURCE": source_list({0: [seed.address()]})}
        with running(
            tmp_path / "client", llama.bare, config, arguments=[drafting(draft.bare)]
        ) as client:
            assert client.say() == seed.say()
            target, drafter = client.loads()
            assert all(seed.address() in load.sources for load in (target, drafter))
            assert target.digest != drafter.digest
            assert {target.digest, drafter.digest} <= seed.digests_sent()
