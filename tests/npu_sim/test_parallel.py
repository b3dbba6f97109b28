"""Instances of several engines and of stages of a pipeline, and those of another NetLoader.

As in test_serve.py, a test looks at tokens, log lines and ports.
"""

import json

import pytest

from tools.netloader_view import find_sent, source_list
from tools.vllm_server import ServerError, free_port

from .serving import Fleet, assert_as_on_cpu, released_vllm_ascend

pytestmark = pytest.mark.timeout(900)

STAGES = ("--tensor-parallel-size=2", "--pipeline-parallel-size=2")
# By itself vLLM starts an API server for each replica.
REPLICAS = ("--data-parallel-size=2", "--api-server-count=1")
SHIPPED = "the NetLoader shipped in vLLM Ascend"


def identity_at(instance, worker, *fields):
    """What a worker's port says of its rank, and of what is to be had there."""
    status = instance.status(worker)
    [model] = status["models"]
    return status["rank"], *(model["identity"][field] for field in fields)


@pytest.mark.parametrize("name", ["plain", "qwen3_moe"])
def test_stages_of_a_pipeline_load_from_the_same_stages(fleet, models, name):
    model = models[name]
    seed = fleet.start("seed", model, arguments=STAGES).wait()
    said = seed.say_little()
    # As two ranks quantize the halves of what the CPU quantizes as a whole.
    assert_as_on_cpu(said, model, 1 if model.arguments else None)
    source = seed
    for place in ("client", "third"):
        config = {"SOURCE": source_list(source.addresses())}
        client = fleet.start(place, model, config, bare=True, arguments=STAGES).wait()
        assert client.say_little() == said
        client.assert_loaded_from(source)
        source = client


# Replicas of a dense model, and the NetLoader that vLLM Ascend ships


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """For instances that several tests use."""
    with Fleet(tmp_path_factory.mktemp("instances")) as instances:
        yield instances


@pytest.fixture(scope="module")
def port():
    return free_port(2)


@pytest.fixture(scope="module")
def replicas(running, models, port):
    config = {"LISTEN_PORT": port}
    return running.start("replicas", models["plain"], config, arguments=REPLICAS).wait()


@pytest.fixture(scope="module")
def shipped(running, models, replicas, tmp_path_factory):
    """An instance with the shipped NetLoader, which was to load from this one and then serves."""
    released = released_vllm_ascend(tmp_path_factory.mktemp("released"))
    config = {"SOURCE": source_list({0: [replicas.address(1)]}), "LISTEN_PORT": free_port()}
    environment = {"PYTHONPATH": str(released)}
    return running.start("shipped", models["plain"], config, environment=environment).wait()


def test_a_shipped_client_is_refused_at_once_and_loads_from_disk(models, replicas, shipped):
    assert_as_on_cpu(shipped.say_little(), models["plain"])
    refusals = rf"refused the connection of \S+: it runs {SHIPPED}, which cannot load from this one"
    assert replicas.server.search_log(refusals)
    assert replicas.say_little(1) == shipped.say_little()


def test_a_shipped_source_and_a_dead_one_are_passed_over_and_the_disk_is_read(
    fleet, models, shipped, dead_address
):
    """The model is made twice: once for the sources, and anew for the disk."""
    sources = [dead_address, shipped.address()]
    # So that a wait for an answer would have another reason in the end.
    config = {"SOURCE": source_list({0: sources}), "HANDSHAKE_TIMEOUT": 60}
    client = fleet.start("client", models["plain"], config).wait()
    assert_as_on_cpu(client.say_little(), models["plain"])
    assert not client.loads()
    [warning] = [
        line for line in client.server.read_log().splitlines() if "trying the disk" in line
    ]
    assert "WARNING" in warning
    assert f"{dead_address}: " in warning
    closed = f"closed the connection without an answer, as {SHIPPED} does"
    assert f"{shipped.address()}: {closed}" in warning
    assert shipped.say_little() == client.say_little()


def test_replicas_of_a_dense_model_load_from_any_of_them(fleet, models, replicas, shipped, port):
    """Each worker has a number of its own, and the rank inside of its replica as identity."""
    assert [replicas.address(worker) for worker in range(2)] == [
        f"127.0.0.1:{port + worker}" for worker in range(2)
    ]
    source = replicas.address(1)
    config = {"SOURCE": source_list({0: [shipped.address(), source]})}
    client = fleet.start("client", models["plain"], config, bare=True, arguments=REPLICAS).wait()
    said = replicas.say_little(0)
    assert_as_on_cpu(said, models["plain"])
    assert [client.say_little(replica) for replica in range(2)] == [said, said]

    loads = client.loads()
    assert [load.rank for load in loads] == [0, 1]
    # The source may name one of them to the other.
    known = {source, *(client.address(worker) for worker in range(2))}
    assert any(source in load.sources for load in loads)
    assert all(set(load.sources) <= known for load in loads)
    [digest] = {load.digest for load in loads}
    for sent in find_sent(replicas.server.read_log()):
        assert (sent.rank, sent.digest, sent.end) == (1, digest, "complete")
    for instance in (replicas, client):
        for worker in range(2):
            assert identity_at(instance, worker, "rank", "dp") == (worker, 0, 1)
            log = instance.server.search_log(rf"NetLoader rank {worker}: listening on port (\d+)")
            assert instance.address(worker).endswith(f":{log[1]}")


# Experts that are spread over engines


def placed(folder, *experts_of_ranks):
    """What makes vLLM Ascend place experts by a file, the same in both layers."""
    ranks = [{"device_id": rank, "device_expert": e} for rank, e in enumerate(experts_of_ranks)]
    layers = [{"layer_id": layer, "device_list": ranks} for layer in range(2)]
    file = folder / f"{folder.name}.json"
    file.write_text(json.dumps({"moe_layer_count": 2, "layer_list": layers}))
    eplb = {"eplb_config": {"expert_map_path": str(file)}}
    return (
        *REPLICAS,
        "--enable-expert-parallel",
        f"--additional-config={json.dumps(eplb)}",
    )


@pytest.fixture
def folders(tmp_path):
    """Places for files of experts, as an instance does not know where another's is."""
    made = [tmp_path / name for name in ("of_seed", "of_client", "of_stranger")]
    for folder in made:
        folder.mkdir()
    return made


def test_experts_spread_over_two_engines_come_from_where_they_are(fleet, models, folders):
    """The places are those that vLLM Ascend takes without a file.

    With others its all-gather, which few ranks use, looks up physical experts among logical ones.
    """
    model = models["mla_moe"]
    ours = [placed(folder, [0, 1], [2, 3]) for folder in folders[:2]]
    seed = fleet.start("seed", model, arguments=ours[0]).wait()
    said = seed.say_little(0)
    assert_as_on_cpu(said, model)
    assert seed.say_little(1) == said
    config = {"SOURCE": source_list(seed.addresses())}
    client = fleet.start("client", model, config, bare=True, arguments=ours[1]).wait()
    assert [client.say_little(replica) for replica in range(2)] == [said, said]
    client.assert_loaded_from(seed)
    fields = ("rank", "dp", "dp_rank", "ep", "ep_rank")
    for instance in (seed, client):
        for worker in range(2):
            assert identity_at(instance, worker, *fields) == (worker, worker, 2, worker, 2, worker)

    others = placed(folders[2], [2, 3], [0, 1])
    config |= {"FALLBACK": False}
    stranger = fleet.start("stranger", model, config, bare=True, arguments=others)
    with pytest.raises(ServerError):
        stranger.wait()
    refused = r"tensors are not made in the same way: .*expert_map is .* here and .* there"
    assert stranger.server.search_log(refused)
