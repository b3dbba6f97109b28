"""NetLoader in the released vLLM Ascend, on simulated NPUs, as a user of `vllm serve` sees it.

Each test looks at tokens and their log probabilities, and at log lines, never inside. Draft models
are loaded and then not used: drafting needs `_C_ascend.npu_copy_and_expand_eagle_inputs`, one of
vLLM Ascend's own kernels that are not simulated. MTP needs none, see test_experts.py.
"""

import re
import sys
import time
from collections.abc import Sequence

import pytest

from tools.netloader_view import find_sent, source_list
from tools.vllm_server import ServerError

from ..certificates import SECRET, secret_file
from ..e2e.support import drafting, holding
from .serving import START_SECONDS, TP2, NpuInstance, assert_as_on_cpu, make_llama, run

pytestmark = pytest.mark.timeout(900)

# A load then takes seconds, in which a test stops or kills somebody.
SLOW = {"MAX_SEND_RATE": "640KB/s", "MAX_SESSIONS": 3, "CHUNK_MIB": 1, "PROGRESS_TIMEOUT": 15}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Has several chunks, so that a load can be in the middle."""
    return make_llama(tmp_path_factory.mktemp("llama") / "llama", seed=0)


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory):
    """Differs in its weights."""
    return make_llama(tmp_path_factory.mktemp("other") / "llama", seed=1)


def test_installed_netloader_is_the_active_one(tmp_path):
    command = [sys.executable, "-P", "-m", "vllm_ascend.model_loader.netloader"]
    said = run(command, cwd=tmp_path).splitlines()
    assert any(re.fullmatch(r"vLLM Ascend: \d.*", line) for line in said)
    assert said[-1] == "--load-format netloader: active"


def test_client_and_its_client_say_what_seed_and_cpu_say(fleet, models, dead_address):
    """Each instance feeds the next; the last two have no weight file."""
    model = models["plain"]
    seed = fleet.start("seed", model).wait()
    said = seed.say()
    assert_as_on_cpu(said, model)

    sources = {rank: [dead_address, *alive] for rank, alive in seed.addresses().items()}
    config = {"SOURCE": source_list(sources)}
    # Each of its processes imports vLLM by itself, as `vllm serve` has it by default.
    spawned = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    client = fleet.start("client", model, config, bare=True, environment=spawned).wait()
    assert client.say() == said
    client.assert_loaded_from(seed)
    # The dead source cost nothing but a line in the log.
    assert client.server.search_log(rf"NetLoader rank 0: source {dead_address}")

    seed.server.kill()
    config = {"SOURCE": source_list(client.addresses())}
    third = fleet.start("third", model, config, bare=True).wait()
    assert third.say() == said
    third.assert_loaded_from(client)


def test_with_a_secret_ranks_pull_in_groups_and_then_from_what_outlives_all_instances(
    fleet, models, tmp_path
):
    """From the seed to a client, from that to a process without NPUs, and from that to another."""
    model, secret = models["plain"], {"SECRET_FILE": secret_file(tmp_path, SECRET)}
    seed = fleet.start("seed", model, secret, arguments=TP2).wait()
    said = seed.say()
    assert_as_on_cpu(said, model)

    config = secret | {"SOURCE": source_list(seed.addresses())}
    client = fleet.start("client", model, config, bare=True, arguments=TP2).wait()
    assert client.say() == said
    client.assert_loaded_from(seed)
    assert not client.server.search_log("the weights come over HTTP")

    without = tmp_path / "without"
    without.mkdir()
    for name in ("vllm", "torch_npu"):
        (without / f"{name}.py").write_text("raise ImportError")
    environment = {
        "NETLOADER_SECRET_FILE": secret["SECRET_FILE"],
        "PYTHONPATH": str(without),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    with holding(client.address(), environment=environment) as holder:
        seed.server.kill()
        client.server.kill()
        config = secret | {"SOURCE": holder}
        third = fleet.start("third", model, config, bare=True, arguments=TP2).wait()
        assert third.say() == said
        assert not third.why_from_disk()
        assert [load.digest for load in third.loads()] == [load.digest for load in client.loads()]
        assert third.server.search_log(rf"source {holder}: .* the weights come over HTTP")


# "no" is the regression test for a defect of the NetLoader that vLLM Ascend releases: its client
# processes weights that the source has processed already, and generates wrong tokens. "hbm" and
# "dram" both send the raw weights, so either can feed the other, and show the checkpoint.
@pytest.mark.parametrize("modes", [("no", "no"), ("hbm", "dram", "hbm")], ids="-".join)
@pytest.mark.parametrize("name", ["w8a8", "w8a8_dynamic"])
def test_int8_model_in_each_cache_mode_says_what_seed_and_cpu_say(fleet, models, name, modes):
    model = models[name]
    source = fleet.start("seed", model, {"INT8_CACHE": modes[0]}).wait()
    said = source.say()
    assert_as_on_cpu(said, model)
    for number, mode in enumerate(modes[1:]):
        config = {"INT8_CACHE": mode, "SOURCE": source_list(source.addresses())}
        client = fleet.start(f"client{number}", model, config, bare=True).wait()
        assert client.say() == said
        client.assert_loaded_from(source)
        source.server.kill()
        source = client
    if modes[-1] == "hbm":  # what the seed has said of the checkpoint has come this far
        # Where vLLM makes one layer of several, it keeps the scale and offset of one of them.
        lost = {"input_scale", "input_offset"} if name == "w8a8" else set()
        assert {gap.rpartition(".")[2] for gap in source.not_seen_through()} == lost


def test_client_of_mla_and_experts_says_what_seed_and_cpu_say(fleet, models):
    """What is sent was made from the checkpoint: MLA's W_UV and W_UK_T, and transposed experts."""
    model = models["mla_moe"]
    seed = fleet.start("seed", model, {"INT8_CACHE": "no"}).wait()
    said = seed.say()
    assert_as_on_cpu(said, model)
    config = {"INT8_CACHE": "no", "SOURCE": source_list(seed.addresses())}
    client = fleet.start("client", model, config, bare=True).wait()
    assert client.say() == said
    client.assert_loaded_from(seed)


def test_without_source_and_disk_the_error_names_both(fleet, models, dead_address):
    config = {"SOURCE": source_list({0: [dead_address]})}
    client = fleet.start("client", models["plain"], config, bare=True)
    with pytest.raises(ServerError):
        client.wait()
    error = client.server.search_log(r"LoadFailed: (.*)")[1]
    assert f"{dead_address}: " in error
    assert "cannot be loaded from disk either" in error
    assert str(models["plain"].bare) in error


def test_source_killed_in_mid_transfer_then_the_next_source(fleet, llama, other_llama):
    # Its other weights show that the tokens are those of the second source, not of a mixture.
    doomed = fleet.start("doomed", other_llama, SLOW)
    second = fleet.start("second", llama)
    doomed.wait()
    second.wait()

    lost = doomed.address()
    config = {"SOURCE": source_list({0: [lost, second.address()]}), "MAX_SOURCES": 1}
    client = fleet.start("client", llama, config, bare=True)
    client.wait_until_pulling()
    doomed.server.kill()
    client.wait()
    assert client.say() == second.say()
    client.assert_loaded_from(second)
    assert client.server.search_log(rf"WARNING .*NetLoader rank 0: source {lost}: transfer failed")
    assert not doomed.digests_sent()


def test_three_clients_at_once_pass_on_what_has_come_and_one_is_killed_meanwhile(fleet, llama):
    # So slow that all have begun before one is complete, though they start on a busy machine.
    deadlines = {"CHUNK_MIB": 1, "PROGRESS_TIMEOUT": 45}
    slow = deadlines | {"MAX_SEND_RATE": "320KB/s", "MAX_SESSIONS": 3}
    seed = fleet.start("seed", llama, slow, arguments=TP2).wait()
    config = deadlines | {"SOURCE": seed.address(), "SOURCE_WAIT": START_SECONDS}
    clients = [
        fleet.start(f"client{number}", llama, config, bare=True, arguments=TP2)
        for number in range(3)
    ]
    killed = first_to_relay(clients)
    killed.server.kill()
    survivors = [client.wait() for client in clients if client is not killed]
    for client in survivors:
        assert client.say() == seed.say()
        assert not client.why_from_disk()
        assert [load.digest for load in client.loads()] == [
            seed.status(rank)["models"][0]["weights"] for rank in range(2)
        ]
    assert any(client.server.search_log(r": loaded .*, relayed ") for client in survivors)


def first_to_relay(clients: Sequence[NpuInstance]) -> NpuInstance:
    """Returns a client that loads and has passed something on, once there is one."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for client in clients:
            if client.address_file().exists():
                status = client.status(0)
                if status["models"][0]["state"] == "loading" and status["bytes_sent"]:
                    return client
        time.sleep(0.05)
    raise AssertionError("no client passes anything on")


def test_stopped_client_and_killed_client_do_not_disturb_their_source(fleet, llama):
    source = fleet.start("source", llama, SLOW).wait()
    said = source.say()
    config = {"SOURCE": source_list(source.addresses())}
    stopped = fleet.start("stopped", llama, config)
    killed = fleet.start("killed", llama, config, bare=True)
    stopped.wait_until_pulling()
    stopped.server.pause()
    killed.wait_until_pulling()
    killed.server.kill()

    assert source.say() == said
    # The stopped client's connection is open, and its session only ends after PROGRESS_TIMEOUT.
    assert len(find_sent(source.server.read_log())) < 2
    source.wait_for_log(r"NetLoader rank 0: sent(.|\n)*NetLoader rank 0: sent")
    assert not source.digests_sent()

    third = fleet.start("third", llama, config, bare=True).wait()
    assert third.say() == said
    third.assert_loaded_from(source)
    assert source.say() == said

    # The stopped one goes on and finds its session ended.
    stopped.server.resume()
    stopped.wait()
    # It may have heard of the third one by then.
    if failure := stopped.why_from_disk():
        assert f"{source.address()}: " in failure
    else:
        assert {load.digest for load in stopped.loads()} <= third.digests_sent()
    assert stopped.say() == said
    assert source.say() == said


def test_draft_model_comes_from_the_source_too(fleet, llama, other_llama):
    """Loads only, see above."""
    seed = fleet.start("seed", llama, arguments=[drafting(other_llama.full)]).wait()
    config = {"SOURCE": source_list(seed.addresses())}
    client = fleet.start(
        "client", llama, config, bare=True, arguments=[drafting(other_llama.bare)]
    ).wait()
    target, drafter = client.loads()
    assert all(seed.address() in load.sources for load in (target, drafter))
    assert target.digest != drafter.digest
    assert {target.digest, drafter.digest} <= seed.digests_sent()
