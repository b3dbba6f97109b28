"""The metrics: what Prometheus reads, the table of them, and the dashboard that shows them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vllm_ascend.model_loader.netloader import metrics
from vllm_ascend.model_loader.netloader.errors import (
    ChosenToRead,
    MakesRoom,
    SourceBusy,
    SourceLost,
    SourceRefused,
    SourceSilent,
    SourceUnreachable,
    TransferCorrupt,
)
from vllm_ascend.model_loader.netloader.loading import sessions
from vllm_ascend.model_loader.netloader.version import __version__

ROOT = Path(__file__).parents[4]
OPERATIONS = ROOT / "docs/source/user_guide/feature_guide/netloader_operations.md"
DASHBOARD = ROOT / "deploy/grafana/netloader.json"
# Prometheus' own, and that of a histogram's buckets.
OTHER_LABELS = {"instance", "le"}


def described():
    """Each metric as the documentation has it: name, type, labels, meaning."""
    return [
        [
            f"`{metric._name}{'_total' if metric._type == 'counter' else ''}`",
            metric._type,
            ", ".join(f"`{label}`" for label in metric._labelnames),
            metric._documentation,
        ]
        for metric in metrics.registry._collector_to_names
    ]


def samples(text=None):
    """Sample -> value, with the labels."""
    text = metrics.exposition().decode() if text is None else text
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_the_table_in_the_documentation_is_that_of_the_code():
    text = OPERATIONS.read_text()
    table = re.search(r"<!-- metrics -->\n.*\n.*\n((?:\|.*\n)+)<!-- end of metrics -->", text)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]
    assert rows == described()


def test_names_begin_with_netloader_and_no_label_is_for_addresses():
    for metric in metrics.registry._collector_to_names:
        assert metric._name.startswith("netloader_")
        assert not {"peer", "address", "host", "instance"} & {*metric._labelnames}


def test_the_dashboard_uses_metrics_and_labels_that_exist():
    metrics_used, labels_of = set(), {}
    for metric in metrics.registry._collector_to_names:
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
        for ending in endings.get(metric._type, [""]):
            labels_of[metric._name + ending] = {*metric._labelnames} | OTHER_LABELS
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    for query in queries:
        names = set(re.findall(r"netloader_\w+", query))
        metrics_used |= names
        assert names <= labels_of.keys(), query
        labels = re.findall(r"(\w+)=~?\"", query)
        for by in re.findall(r"by \(([^)]*)\)", query):
            labels += by.split(", ")
        for name in names:
            assert set(labels) <= labels_of[name], query
    families = {re.sub("_(total|bucket|count|sum)$", "", name) for name in metrics_used}
    assert families == {metric._name for metric in metrics.registry._collector_to_names}


def test_a_model_is_in_one_state_at_a_time():
    def state(name):
        return samples().get(("netloader_state", (("model", "some"), ("state", name))))

    metrics.show_model("some", "loading", 5)
    metrics.show_model("some", "serving", 7)
    assert (state("loading"), state("serving")) == (0, 1)
    assert samples()["netloader_weights_bytes", (("model", "some"),)] == 7
    metrics.show_model("some", None, 0)
    assert (state("loading"), state("serving")) == (0, 0)


def test_a_load_that_fails_is_counted_as_such():
    def count(outcome):
        labels = (("outcome", outcome), ("source", "peers"))
        return samples().get(("netloader_load_seconds_count", labels), 0)

    before = count("complete"), count("failed")
    with metrics.load_from(metrics.PEERS):
        pass
    with pytest.raises(OSError), metrics.load_from(metrics.PEERS):
        raise OSError
    assert (count("complete"), count("failed")) == (before[0] + 1, before[1] + 1)
    with pytest.raises(ChosenToRead), metrics.load_from(metrics.PEERS):
        raise ChosenToRead("it counts as a load from disk")
    assert (count("complete"), count("failed")) == (before[0] + 1, before[1] + 1)


def test_the_version_is_told():
    assert samples()["netloader_build_info", (("version", __version__),)] == 1


def in_process(code, folder):
    """Run code in a process that shares its metrics through a folder; return its output."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


WITHOUT_A_FOLDER = """
import logging
logging.basicConfig()
from vllm_ascend.model_loader.netloader import metrics
metrics.count(metrics.SENT_BYTES, "serving", by=7)
assert b'netloader_sent_bytes_total{state="serving"} 7.0' in metrics.exposition()
"""


def test_a_folder_that_is_not_there_costs_no_more_than_its_metrics(tmp_path):
    said = in_process(WITHOUT_A_FOLDER, tmp_path / "none").stderr
    assert said.count("PROMETHEUS_MULTIPROC_DIR") == 1 and "in its memory only" in said


def test_a_folder_that_goes_away_costs_no_load(monkeypatch):
    def fails(*labels):
        raise FileNotFoundError("the folder")

    for metric in (metrics.LOAD_SECONDS, metrics.STATE, metrics.SENT_BYTES):
        monkeypatch.setattr(metric, "labels", fails)
    with metrics.load_from(metrics.PEERS):
        pass
    metrics.show_model("some", "serving", 7)
    metrics.count(metrics.SENT_BYTES, "serving")


PROCESS = """
from vllm_ascend.model_loader.netloader import metrics
metrics.show_model("netloader", "serving", 1000)
metrics.SENT_BYTES.labels("serving").inc(7)
assert b'netloader_sent_bytes_total{state="serving"} 7.0' in metrics.exposition()
"""
COLLECTOR = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_with_a_folder_for_several_processes_all_of_them_are_in_it(tmp_path):
    # As vLLM's API server reads it; two ranks have written.
    in_process(PROCESS, tmp_path)
    in_process(PROCESS, tmp_path)
    got = samples(in_process(COLLECTOR, tmp_path).stdout)
    assert got["netloader_sent_bytes_total", (("state", "serving"),)] == 14
    assert got["netloader_state", (("model", "netloader"), ("state", "serving"))] == 2
    assert got["netloader_weights_bytes", (("model", "netloader"),)] == 2000
    assert got["netloader_build_info", (("version", __version__),)] == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SourceSilent("x"), "unreachable"),
        (SourceUnreachable("x"), "unreachable"),
        (SourceLost("x"), "lost"),
        (MakesRoom("x"), "left"),
        (SourceBusy("x"), "later"),
        (TransferCorrupt("x"), "wrong_bytes"),
        (SourceRefused("x"), "refused"),
        (SourceRefused("x", code="other_model"), "other_model"),
    ],
)
def test_an_attempt_is_called_by_what_has_ended_it(error, kind):
    assert sessions._kind(error) == kind
