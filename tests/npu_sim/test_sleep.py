"""Sleep of vLLM Ascend: its memory is unmapped, and whoever touches it then ends its process."""

import json
import time
import urllib.request

import pytest

from tools.netloader_view import source_list
from tools.vllm_server import HOST, clean_up_when_interrupted

from .serving import START_SECONDS, Fleet, NpuInstance, make_llama
from .simulator import case_names
from .test_serve import SLOW

SCRIPT = "sleep.py"
# vLLM Ascend wakes up nothing in FRACTAL_NZ, and its worker has no method to reload.
SLEEPING = (
    "--enable-sleep-mode",
    '--additional-config={"weight_nz_mode": 0}',
    "--worker-extension-cls=npusim_vllm.extension.Reloading",
)
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@pytest.fixture(scope="module")
def child(module_simulator):
    return module_simulator.run(SCRIPT, timeout=100)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_sleep(child, name):
    child.check_case(name)


def post(instance: NpuInstance, path: str, **body: object) -> None:
    """Calls one of vLLM's development endpoints."""
    request = urllib.request.Request(
        f"http://{HOST}:{instance.server.port}{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with _open(request, timeout=START_SECONDS):
        pass


def wait_for_state(instance: NpuInstance, state: str) -> dict[str, object]:
    """Returns what an instance says of its model, once it is in a state."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with _open(f"http://{instance.address()}/status", timeout=START_SECONDS) as answer:
            [model] = json.load(answer)["models"]
        if model["state"] == state:
            return model
        assert time.monotonic() < deadline, model
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_a_source_that_sleeps_is_touched_by_nobody_and_offers_what_it_had_when_it_is_awake(
    tmp_path,
):
    """A client pulls before, asks meanwhile, and completes afterwards."""
    clean_up_when_interrupted()
    llama = make_llama(tmp_path / "llama", seed=0)
    more = {"arguments": SLEEPING, "environment": DEVELOPMENT}
    with Fleet(tmp_path) as fleet:
        seed = fleet.start("seed", llama, SLOW, **more).wait()
        said, before = seed.say(), wait_for_state(seed, "serving")
        config = {"SOURCE": source_list(seed.addresses()), "SOURCE_WAIT": 300, "FALLBACK": False}
        client = fleet.start("client", llama, config, bare=True)
        client.wait_until_pulling()
        post(seed, "/sleep?level=1")
        client.wait_for_log(r"asleep: the source sleeps \(sleep level 1\)")
        assert not client.loads()
        post(seed, "/wake_up")
        client.wait()
        assert client.say() == seed.say() == said
        client.assert_loaded_from(seed)
        after = wait_for_state(seed, "serving")
        assert (after["weights"], after["epoch"]) == (before["weights"], 2)

        post(seed, "/sleep?level=2")
        wait_for_state(seed, "asleep")
        post(seed, "/wake_up")
        wait_for_state(seed, "changing")
        from_disk = {"weights_path": str(llama.full)}
        post(seed, "/collective_rpc", method="reload_weights", kwargs=from_disk)
        after = wait_for_state(seed, "serving")
        assert (after["weights"], after["epoch"]) == (before["weights"], 3)
        assert seed.say() == said
