"""What operators see of a load while it goes on: status, metrics, and the page in a browser."""

import contextlib
import re
import shutil
import subprocess
import urllib.request

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.certificates import OTHER_SECRET, SECRET, secret_file
from vllm_ascend.model_loader.netloader.credentials import derived_from
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.api import Join

from . import sides
from .fleet import PATIENT, fleet
from .models import ROW, many_rows
from .sides import PATIENCE, identity, until
from .test_relays import ALL, dial, holding_back
from .ways import Way

pytestmark = pytest.mark.ways(Way.HTTP)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
HALF = ALL // 2


def source(way, **config):
    return sides.source(way, many_rows, **PATIENT | config)


@contextlib.contextmanager
def half_loaded(way):
    """A source, a replica that has half of its blocks, and what lets it get the others."""
    with (
        source(way) as seed,
        fleet(way, 1) as [replica],
        contextlib.ExitStack() as held,
    ):
        held.enter_context(holding_back(seed.server, HALF))
        replica.start([seed])
        until(lambda: replica.filling is not None and replica.filling.blocks_here == HALF)

        def finish():
            held.close()
            replica.check()

        yield seed, replica, finish


def status_of(address):
    with dial(address) as client:
        return client.status()


def counted(address):
    """The metrics that a rank tells."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (one.name, *one.labels.values()): one.value for each in families for one in each.samples
    }


def test_a_status_tells_how_far_a_load_is_and_who_feeds_it(way):
    with half_loaded(way) as (seed, replica, finish):
        model = status_of(replica.address).models[0]
        assert (model.state, model.blocks, model.blocks_here) == ("loading", ALL, HALF)
        assert sorted(model.map) == ["0"] * HALF + ["9"] * HALF
        assert model.feeds == [api.Feed(str(seed.address), HALF * ROW)]
        relays = {one.relay for one in status_of(seed.address).sessions}
        assert str(replica.address) in relays
        finish()
        model = status_of(replica.address).models[0]
        assert (model.state, model.blocks_here, model.feeds) == ("serving", ALL, [])
        assert model.map == "9" * ALL


def listening():
    """The ports of this process."""
    connections = psutil.Process().net_connections("tcp")
    return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}


def test_an_instance_that_loads_and_one_that_sends_listen_on_one_port_each(way):
    before = listening()
    with half_loaded(way) as (seed, replica, finish):
        assert listening() - before == {seed.address.port, replica.address.port}
        finish()


def test_bytes_blocks_and_sessions_are_counted_on_both_sides(way):
    with source(way) as seed:
        before = counted(seed.address)
        sides.load_here(way, [seed], many_rows).check()
        until(lambda: not status_of(seed.address).sessions)
        now = counted(seed.address)

    def grown(*key):
        return now[key] - before.get(key, 0)

    # Both sides are in this process.
    assert grown("netloader_received_bytes_total", "serving") == ALL * ROW
    assert grown("netloader_sent_bytes_total", "serving") == ALL * ROW
    assert grown("netloader_blocks_received_total", "right") == ALL
    assert grown("netloader_source_attempts_total", "complete") == 1
    sessions = grown("netloader_sessions_started_total")
    assert sessions >= 1
    assert grown("netloader_sessions_finished_total", "complete") == sessions
    assert now["netloader_state", "netloader", "serving"] == 1
    assert now["netloader_weights_bytes", "netloader"] == ALL * ROW


def test_what_relays_pass_on_is_counted_apart(way):
    with source(way) as seed, fleet(way, 2) as [first, second]:
        before = counted(seed.address)
        with holding_back(seed.server, HALF):
            first.start([seed])
            until(lambda: first.filling is not None and first.filling.blocks_here == HALF)
            second.start([seed])
            until(lambda: second.filling is not None and second.filling.blocks_here == HALF)
            now = counted(seed.address)
        first.check()
        second.check()
    for key in (
        ("netloader_sent_bytes_total", "loading"),
        ("netloader_received_bytes_total", "loading"),
    ):
        assert now[key] - before.get(key, 0) == HALF * ROW


def test_wrong_blocks_and_refusals_are_counted(way):
    with source(way) as seed:
        before = counted(seed.address)
        with dial(seed.address) as client:
            client.join(Join(identity(way)))
        sides.load_here(way, [seed], many_rows, who=identity(way, model="another"))
        now = counted(seed.address)
        key = ("netloader_source_attempts_total", "other_model")
        assert now[key] - before.get(key, 0) == 1
        until(lambda: not status_of(seed.address).sessions)
        key = ("netloader_sessions_finished_total", "went_away")
        assert counted(seed.address)[key] - before.get(key, 0) == 1


# The page


def browse(url, *options):
    """What a browser makes of a page after some seconds of its own time."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--virtual-time-budget=4000", "--timeout=20000", *options]
    return subprocess.run(
        [*command, url], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@in_a_browser
def test_the_page_shows_how_far_a_load_is_and_refreshes_itself(way, tmp_path):
    with half_loaded(way) as (seed, replica, finish):
        asked, status = [], replica.server.status
        replica.server.status = lambda sessions: asked.append(sessions) or status(sessions)
        shown = browse(f"http://{replica.address}/", "--dump-dom")
        assert f"{HALF} of {ALL} blocks are here" in shown
        assert '<span class="state loading">loading</span>' in shown
        assert seed.store.digests.weights in shown
        assert f"<td>{seed.address}</td>" in shown
        assert len(re.findall(r'<b style="opacity: 1;">', shown)) == HALF
        assert len(asked) > 2
        finish()
        shown = browse(f"http://{replica.address}/", "--dump-dom")
        assert '<span class="state serving">serving</span>' in shown


@in_a_browser
@pytest.mark.parametrize("secret", [SECRET, OTHER_SECRET], ids=["right", "wrong"])
def test_the_page_of_a_closed_port_is_for_browsers_with_the_token(way, tmp_path, secret):
    token = derived_from(secret).token
    with source(way, secret_file=secret_file(tmp_path, SECRET)) as seed:
        url, option = f"https://:{token}@{seed.address}/", "--ignore-certificate-errors"
        # The one thing wrong with the certificate is one that a user can pass over.
        assert "ERR_CERT_AUTHORITY_INVALID" in browse(url, "--dump-dom")
        shown = browse(url, "--dump-dom", option)
        assert (seed.store.digests.weights in shown) == (secret == SECRET)


@in_a_browser
def test_what_a_client_says_is_only_text_on_the_page(way):
    hostile = "<b id=hostile>&"
    with source(way) as seed, dial(seed.address) as client:
        client.join(Join(identity(way), None, api.Peer(hostile, "process")))
        shown = browse(f"http://{seed.address}/", "--dump-dom")
    assert "<td>&lt;b id=hostile&gt;&amp;</td>" in shown


def test_the_page_may_load_nothing_from_elsewhere(way):
    with (
        source(way) as seed,
        urllib.request.urlopen(f"http://{seed.address}/", timeout=PATIENCE) as answer,
    ):
        page = answer.read().decode()
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'self'" in policy
    assert not re.findall(r"https?://|@import|url\(|src=", page)
