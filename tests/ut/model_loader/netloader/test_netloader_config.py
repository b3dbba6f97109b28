import json
import math
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.certificates import SECRET, secret_file
from vllm_ascend.model_loader.netloader.config import KEYS as KNOWN_KEYS
from vllm_ascend.model_loader.netloader.config import (
    MAX_MODEL_NAME_BYTES,
    Int8Cache,
    NetLoaderConfig,
    Sources,
    Transport,
    parse_config,
)
from vllm_ascend.model_loader.netloader.errors import ConfigError, NetLoaderError
from vllm_ascend.model_loader.netloader.utils import Address, Lookup, Name

DIGEST = f"xxh3_128:{'0123456789abcdef' * 2}"
OF_INSTANCE = DIGEST.replace("xxh3_128", "instance")
KEYS = [
    "SOURCE",
    "MODEL",
    "LISTEN_HOST",
    "LISTEN_PORT",
    "INT8_CACHE",
    "INT8_CACHE_NAME",
    "OUTPUT_PREFIX",
    "MAX_SESSIONS",
    "MAX_SEND_RATE",
    "MAX_SOURCES",
    "SOURCE_WAIT",
    "FALLBACK",
    "WEIGHTS_DIGEST",
    "TRANSPORT",
    "CONNECTIONS",
    "CHUNK_MIB",
    "VERIFY",
    "HCCL_BUFFER_SIZE",
    "CONNECT_TIMEOUT",
    "HANDSHAKE_TIMEOUT",
    "PROGRESS_TIMEOUT",
    "SECRET_FILE",
    "TLS_CERT",
    "TLS_KEY",
    "TLS_CA",
    "TLS_SERVER_NAME",
    "TOKEN_FILE",
]


def refusal(extra_config):
    with pytest.raises(ConfigError) as error:
        parse_config(extra_config)
    return str(error.value)


def test_nothing_given_is_a_valid_configuration():
    config = parse_config({})
    assert config == NetLoaderConfig(source={})
    assert config.model is None
    assert config.port_for(3) == 0
    assert config.verify
    assert config.int8_cache is Int8Cache.NO
    assert config.hccl_buffer_size == 16
    assert config.chunk_mib is None  # what suits the transport
    assert config.transport is Transport.AUTO
    assert (config.source_wait, config.fallback, config.weights_digest) == (300, True, None)


def test_these_are_all_keys():
    assert sorted([*KEYS, "CONFIG_FILE"]) == KNOWN_KEYS


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("SOURCE", [], {}),
        ("MODEL", "org/name", "org/name"),
        ("MODEL", "x" * MAX_MODEL_NAME_BYTES, "x" * MAX_MODEL_NAME_BYTES),
        ("LISTEN_HOST", "0.0.0.0", "0.0.0.0"),
        ("LISTEN_HOST", "::", "::"),
        ("LISTEN_HOST", "some.host", "some.host"),
        ("LISTEN_PORT", 1024, 1024),
        ("LISTEN_PORT", -5, -5),
        ("INT8_CACHE", "hbm", Int8Cache.HBM),
        ("INT8_CACHE", "DRAM", Int8Cache.DRAM),
        ("INT8_CACHE", "No", Int8Cache.NO),
        ("INT8_CACHE_NAME", [], ()),
        ("INT8_CACHE_NAME", ["mlp", "qkv"], ("mlp", "qkv")),
        ("MAX_SESSIONS", 1, 1),
        ("MAX_SESSIONS", 256, 256),
        ("MAX_SEND_RATE", 10**9, 10**9),
        ("MAX_SEND_RATE", 2**53, 2**53),
        ("MAX_SEND_RATE", "1000000000", 10**9),
        ("MAX_SEND_RATE", "2GiB/s", 2 << 30),
        ("MAX_SEND_RATE", "2GiB", 2 << 30),
        ("MAX_SEND_RATE", "1.5 GB/s", 1_500_000_000),
        ("MAX_SEND_RATE", "500mb/s", 500_000_000),
        ("MAX_SOURCES", 1, 1),
        ("MAX_SOURCES", 64, 64),
        ("SOURCE_WAIT", 0, 0.0),
        ("SOURCE_WAIT", 86400, 86400.0),
        ("SOURCE_WAIT", "0.05", 0.05),
        ("FALLBACK", False, False),
        ("FALLBACK", "true", True),
        ("WEIGHTS_DIGEST", DIGEST, (DIGEST,)),
        ("WEIGHTS_DIGEST", [DIGEST, OF_INSTANCE], (DIGEST, OF_INSTANCE)),
        ("TRANSPORT", "auto", Transport.AUTO),
        ("TRANSPORT", "HTTP", Transport.HTTP),
        ("CONNECTIONS", 1, 1),
        ("CONNECTIONS", "16", 16),
        ("CHUNK_MIB", 1, 1),
        ("CHUNK_MIB", 64, 64),
        ("MAX_SEND_RATE", " 2GiB/s\n", 2 << 30),
        ("VERIFY", False, False),
        ("VERIFY", "False", False),
        ("VERIFY", " TRUE ", True),
        ("HCCL_BUFFER_SIZE", 1, 1),
        ("HCCL_BUFFER_SIZE", 200, 200),
        ("HCCL_BUFFER_SIZE", 4096, 4096),
        ("CONNECT_TIMEOUT", 1, 1.0),
        ("HANDSHAKE_TIMEOUT", 0.1, 0.1),
        ("PROGRESS_TIMEOUT", 3600, 3600.0),
        ("PROGRESS_TIMEOUT", " 2.5\n", 2.5),
        ("PROGRESS_TIMEOUT", "5", 5.0),
    ],
)
def test_a_key_takes_what_it_allows(key, value, parsed):
    assert getattr(parse_config({key: value}), key.lower()) == parsed


INTEGER_KEYS = {
    "LISTEN_PORT": st.integers(-(10**6), 10**6),
    "MAX_SESSIONS": st.integers(1, 256),
    "MAX_SOURCES": st.integers(1, 64),
    "CONNECTIONS": st.integers(1, 16),
    "CHUNK_MIB": st.integers(1, 64),
    "HCCL_BUFFER_SIZE": st.integers(1, 4096),
}


@given(st.fixed_dictionaries(INTEGER_KEYS), st.text(" \t\n", max_size=2))
def test_an_integer_may_be_in_a_text(numbers, blank):
    texts = {key: f"{blank}{number}{blank}" for key, number in numbers.items()}
    assert parse_config(texts) == parse_config(numbers)


NO_INTEGERS = ["4000.5", "0x10", "", " ", "four", "+4", "4_0", "4 0", "1e3", "٤", "²", "9" * 5000]


@pytest.mark.parametrize("text", NO_INTEGERS)
def test_a_text_without_an_integer_is_refused(text):
    for key in INTEGER_KEYS:
        message = refusal({key: text})
        assert message.startswith(f"{key} is {repr(text)[:200]}")
        assert "; allowed: an integer" in message
    entry = {"device_id": text, "sources": []}
    assert refusal({"SOURCE": [entry]}).startswith("SOURCE[0].device_id is ")


SOURCE_ENTRY = "an object with device_id and sources, and no other keys"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("SOURCE", {"device_id": 0, "sources": []}, "a list of"),
        ("SOURCE", 80, '"dns+NAME:PORT"'),
        ("SOURCE", [80, "host:80"], SOURCE_ENTRY),
        ("SOURCE", [{"device_id": 0, "sources": [], "more": 1}], SOURCE_ENTRY),
        ("SOURCE", [{"sources": []}], SOURCE_ENTRY),
        ("SOURCE", [{"device_id": 0.0, "sources": []}], "an integer from 0"),
        ("SOURCE", [{"device_id": "-1", "sources": []}], "an integer from 0"),
        ("SOURCE", [{"device_id": True, "sources": []}], "an integer from 0"),
        ("SOURCE", [{"device_id": -1, "sources": []}], "an integer from 0"),
        ("SOURCE", [{"device_id": 0, "sources": "host:80"}], "a list of strings"),
        ("MODEL", "", "a name of 1 to 512 bytes"),
        ("MODEL", 5, "a name of 1 to 512 bytes"),
        ("MODEL", "x" * (MAX_MODEL_NAME_BYTES + 1), "a name of 1 to 512 bytes"),
        ("MODEL", "ü" * 86, "a name of 1 to 512 bytes"),  # six bytes each as JSON
        ("LISTEN_HOST", 5, "an IP address or a host name"),
        ("LISTEN_HOST", "", "an IP address or a host name"),
        ("LISTEN_HOST", "host:80", "an IP address or a host name"),
        ("LISTEN_HOST", "1.2.3", "an IP address or a host name"),
        ("LISTEN_PORT", True, "an integer"),
        ("LISTEN_PORT", 8000.0, "an integer"),
        ("INT8_CACHE", "disk", "'hbm', 'dram' or 'no'"),
        ("INT8_CACHE", False, "'hbm', 'dram' or 'no'"),
        ("INT8_CACHE", [], "'hbm', 'dram' or 'no'"),
        ("INT8_CACHE_NAME", "mlp", "a list"),
        ("INT8_CACHE_NAME", ["mlp", ""], "a list"),
        ("INT8_CACHE_NAME", [1], "a list"),
        ("OUTPUT_PREFIX", "", "a path prefix"),
        ("OUTPUT_PREFIX", 5, "a path prefix"),
        ("MAX_SESSIONS", 0, "an integer from 1 to 256"),
        ("MAX_SESSIONS", 257, "an integer from 1 to 256"),
        *[
            ("MAX_SEND_RATE", value, "bytes per second, from 1 to 2**53")
            for value in (
                *(0, -1, 1.5, True, 10**400, 2**53 + 1, [], {"GB": 2}, "", "fast", "-1GB/s"),
                *("2GiB/h", "2GiB/s!", "1e9", "GB", "9" * 5000, "2 XB/s"),
            )
        ],
        ("MAX_SESSIONS", 1.0, "an integer from 1 to 256"),
        ("MAX_SESSIONS", True, "an integer from 1 to 256"),
        ("MAX_SOURCES", 0, "an integer from 1 to 64"),
        ("MAX_SOURCES", 65, "an integer from 1 to 64"),
        ("SOURCE_WAIT", -1, "seconds, from 0 to 86400"),
        ("SOURCE_WAIT", 86401, "seconds, from 0 to 86400"),
        ("FALLBACK", 0, "true or false"),
        ("WEIGHTS_DIGEST", "", "weights digests and instance digests"),
        ("WEIGHTS_DIGEST", DIGEST.upper(), "weights digests and instance digests"),
        ("WEIGHTS_DIGEST", DIGEST[:-1], "weights digests and instance digests"),
        ("WEIGHTS_DIGEST", DIGEST + "0", "weights digests and instance digests"),
        (
            "WEIGHTS_DIGEST",
            DIGEST.partition(":")[2],
            "weights digests and instance digests",
        ),
        ("WEIGHTS_DIGEST", DIGEST + "\n", "weights digests and instance digests"),
        ("WEIGHTS_DIGEST", [], "weights digests and instance digests"),
        ("WEIGHTS_DIGEST", [DIGEST, 5], "weights digests and instance digests"),
        ("WEIGHTS_DIGEST", 5, "weights digests and instance digests"),
        ("TRANSPORT", "hccl", "'auto' or 'http'"),
        ("TRANSPORT", True, "'auto' or 'http'"),
        ("CONNECTIONS", 0, "an integer from 1 to 16"),
        ("CONNECTIONS", 17, "an integer from 1 to 16"),
        ("CHUNK_MIB", 0, "an integer from 1 to 64"),
        ("CHUNK_MIB", 65, "an integer from 1 to 64"),
        ("HCCL_BUFFER_SIZE", 0, "an integer from 1 to 4096"),
        ("HCCL_BUFFER_SIZE", 4097, "an integer from 1 to 4096"),
        ("HCCL_BUFFER_SIZE", -16, "an integer from 1 to 4096"),
        ("HCCL_BUFFER_SIZE", 16.0, "an integer from 1 to 4096"),
        ("HCCL_BUFFER_SIZE", True, "an integer from 1 to 4096"),
        ("VERIFY", 1, "true or false"),
        ("VERIFY", "yes", "true or false"),
        ("VERIFY", "", "true or false"),
        ("CONNECT_TIMEOUT", 0, "seconds, from 0.1 to 3600"),
        ("CONNECT_TIMEOUT", -1, "seconds, from 0.1 to 3600"),
        ("CONNECT_TIMEOUT", True, "seconds, from 0.1 to 3600"),
        ("HANDSHAKE_TIMEOUT", 3601, "seconds, from 0.1 to 3600"),
        ("HANDSHAKE_TIMEOUT", math.inf, "seconds, from 0.1 to 3600"),
        ("PROGRESS_TIMEOUT", math.nan, "seconds, from 0.1 to 3600"),
        *[
            ("PROGRESS_TIMEOUT", text, "seconds, from 0.1 to 3600")
            for text in ("", "5s", "0", "3601", "1e1", "inf", "nan", "٣", "5.", "9" * 900)
        ],
    ],
)
def test_a_wrong_value_is_refused_with_the_key_the_value_and_what_is_allowed(key, value, allowed):
    message = refusal({key: value})
    assert message.startswith(key)
    assert "\n" not in message
    assert allowed in message
    shown = value[0] if key == "SOURCE" and isinstance(value, list) else value
    if shown is not value and allowed != SOURCE_ENTRY:
        shown = shown["device_id"] if "integer" in allowed else shown["sources"]
    assert repr(shown)[:200] in message


def test_a_long_value_is_shown_in_part():
    assert len(refusal({"LISTEN_PORT": "9" * 10_000})) < 400


def test_null_is_not_given():
    assert parse_config(dict.fromkeys([*KEYS, "CONFIG_FILE", "num_threads"])) == parse_config({})


def test_a_rank_that_is_null_is_refused():
    message = refusal({"SOURCE": [{"device_id": None, "sources": []}]})
    assert message == "SOURCE[0].device_id is null; allowed: a global rank, an integer from 0"


@pytest.mark.parametrize("extra_config", [None, [], "{}", 5])
def test_anything_but_an_object_is_refused(extra_config):
    assert "must be a JSON object" in refusal(extra_config)


def test_an_unknown_key_is_refused_by_name_and_the_known_ones_are_listed():
    message = refusal({"Source": None, "SORCE": [], "MODEL": "m", "num_threads": 2})
    assert "unknown keys 'SORCE', 'Source' (should be 'SOURCE'); known" in message
    assert all(key in message for key in KEYS)
    assert "CONFIG_FILE" in message
    assert "in lower case those of vLLM's default loader" in message


def test_a_key_of_netloader_in_lower_case_is_none_of_vllms_default_loader(config_file):
    message = refusal({"source": "a:1", "listen_port": 28000, "num_threads": 2})
    assert message.startswith("--model-loader-extra-config has unknown keys")
    assert "'listen_port' (should be 'LISTEN_PORT'), 'source' (should be 'SOURCE'); " in message
    path = config_file({"chunk_mib": 1})
    assert f"{path!r} has unknown keys 'chunk_mib' (should" in refusal({"CONFIG_FILE": path})


def test_a_config_error_is_a_value_error_which_vllm_shows_without_a_traceback_of_its_own():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, NetLoaderError)


# SOURCE


def test_several_entries_for_a_rank_add_up_in_order_without_repetitions():
    config = parse_config(
        {
            "SOURCE": [
                {"device_id": 0, "sources": ["b:2", "a:1"]},
                {"device_id": 1, "sources": ["a:1"]},
                {"device_id": 0, "sources": ["c:3", "b:2", "[::1]:4"]},
            ]
        }
    )
    assert config.source == {
        0: Sources((Address("b", 2), Address("a", 1), Address("c", 3), Address("::1", 4))),
        1: Sources((Address("a", 1),)),
    }


@pytest.mark.parametrize("entry", [{}, {"sources": None}, {"sources": []}])
def test_an_entry_may_have_no_sources(entry):
    assert parse_config({"SOURCE": [{"device_id": "7", **entry}]}).source == {7: Sources()}


def test_malformed_addresses_are_set_apart_with_what_is_wrong_with_them():
    texts = ["host", "a:1", 80, None, "host", "b:2", "x" * 10_000 + ":y"]
    sources = parse_config({"SOURCE": [{"device_id": 0, "sources": texts}]}).source[0]
    assert sources.addresses == (Address("a", 1), Address("b", 2))
    assert [reason.partition(":")[0] for reason in sources.malformed[:3]] == [
        "'host'",
        "80",
        "null",
    ]
    assert "no port" in sources.malformed[0]
    assert "not a text like 'IP:port'" in sources.malformed[1]
    assert len(sources.malformed) == 4
    assert all(len(reason) < 250 for reason in sources.malformed)


def test_texts_and_objects_of_ranks_cannot_be_mixed():
    for value in (["a:1", {"device_id": 0}], [{"device_id": 0}, "a:1"]):
        assert "allowed: texts or objects, which cannot be mixed: " in refusal({"SOURCE": value})


@pytest.mark.parametrize("rank", [0, 7])
def test_a_text_or_a_list_of_texts_is_for_all_ranks(rank):
    one = parse_config({"SOURCE": " dns+fleet:28000 "})
    assert one.sources_of(rank) == Sources((Name(Lookup.DNS, "fleet", 28000),))
    texts = ["[::1]:1", "dnssrv+_netloader._tcp.fleet", "file+/run/netloader/a b_", "[::1]:1", "x"]
    several = parse_config({"SOURCE": texts}).sources_of(rank)
    assert several.addresses == (
        Name(Lookup.INSTANCE, "::1", 1),
        Name(Lookup.SRV, "_netloader._tcp.fleet"),
        Name(Lookup.FILES, "/run/netloader/a b_"),
    )
    assert [*map(str, several.addresses)] == texts[:3]
    [malformed] = several.malformed
    assert "'x': no port" in malformed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dns+fleet", "no port"),
        ("dns+fleet:0", "port '0' is not a number"),
        ("dnssrv+fleet:1", "is not a DNS name"),
        ("dnssrv+", "is not a DNS name"),
        ("file+relative", "not an absolute path"),
        ("http://fleet:1", "without http://"),
        ("srv+fleet:1", "neither an IP address nor a host name"),
        ("", "no port"),
    ],
)
def test_what_is_no_name_is_set_apart_with_what_is_wrong_with_it(text, why):
    sources = parse_config({"SOURCE": text}).sources_of(0)
    assert sources.addresses == ()
    [malformed] = sources.malformed
    assert malformed.startswith(repr(text)) and why in malformed


def test_a_rank_without_an_entry_of_its_own_has_no_sources():
    config = parse_config({"SOURCE": [{"device_id": 1, "sources": ["a:1"]}]})
    assert config.sources_of(0) == Sources()
    assert config.sources_of(1) == Sources((Address("a", 1),))


# LISTEN_PORT


@pytest.mark.parametrize(
    ("base", "rank", "port"),
    [
        (8000, 0, 8000),
        (8000, 7, 8007),
        (1024, 0, 1024),
        (65535, 0, 65535),
        (65535, 1, None),
        (65528, 7, 65535),
        (65529, 7, None),
        (1023, 0, None),
        (1023, 1, None),
        (0, 0, None),
        (-1, 5000, None),
        (65536, 0, None),
        (10**30, 0, None),
    ],
)
def test_a_rank_listens_at_the_base_plus_its_rank_or_not_at_all(base, rank, port):
    assert parse_config({"LISTEN_PORT": base}).port_for(rank) == port


@pytest.mark.parametrize(
    ("host", "announced"),
    [("192.0.2.7", "192.0.2.7"), ("some.host", "some.host"), ("0.0.0.0", None), ("::", None)],
)
def test_the_host_listened_on_is_announced_unless_it_stands_for_all(host, announced):
    assert parse_config({"LISTEN_HOST": host}).announced_host == announced
    assert parse_config({}).announced_host is None


# MAX_SEND_RATE


@pytest.mark.parametrize(
    ("rate", "sessions", "most_mib"),
    [
        (None, 4, 64),
        ("1GB/s", 4, 64),
        ("10MiB/s", 4, 12),
        ("5MiB/s", 4, 6),
        ("1MiB/s", 4, 1),
        ("1MiB/s", 1, 5),
    ],
)
def test_a_message_takes_half_of_the_progress_deadline_at_most_when_all_sessions_share_the_rate(
    rate, sessions, most_mib
):
    config = parse_config({"MAX_SEND_RATE": rate, "MAX_SESSIONS": sessions, "CHUNK_MIB": 8})
    assert config.max_message_bytes == most_mib << 20
    assert config.chunk_mib == 8  # which says what a client asks for, and nothing of what it sends


def test_a_rate_too_low_for_the_smallest_chunk_is_refused_with_the_lowest_rate():
    message = refusal({"MAX_SEND_RATE": "100kB/s", "MAX_SESSIONS": 5, "PROGRESS_TIMEOUT": 20})
    assert message == (
        "MAX_SEND_RATE is '100kB/s'; allowed: 524288 bytes per second and more, so that each of "
        "MAX_SESSIONS 5 clients gets 1 MiB within half of PROGRESS_TIMEOUT 20 s"
    )
    parse_config({"MAX_SEND_RATE": 524288, "MAX_SESSIONS": 5, "PROGRESS_TIMEOUT": 20})


# MODEL


def test_the_model_argument_fills_in_for_an_absent_model():
    assert parse_config({}).with_model("/models/m").model == "/models/m"
    assert parse_config({"MODEL": "m"}).with_model("/models/m").model == "m"


def test_a_model_argument_that_fits_in_no_join_is_refused():
    with pytest.raises(ConfigError, match="MODEL"):
        parse_config({}).with_model("x" * 600)


@pytest.mark.parametrize("key", ["MODEL", "OUTPUT_PREFIX"])
def test_text_that_has_no_utf8_is_refused(key, tmp_path):
    # JSON can say "\ud800"; no message and no file name can.
    message = refusal(json.loads(json.dumps({key: f"{tmp_path}/\ud800"})))
    assert message.startswith(key)


# OUTPUT_PREFIX


def test_an_output_prefix_in_an_existing_folder_is_taken(tmp_path, monkeypatch):
    assert parse_config({"OUTPUT_PREFIX": f"{tmp_path}/"}).output_prefix == f"{tmp_path}/"
    monkeypatch.chdir(tmp_path)
    assert parse_config({"OUTPUT_PREFIX": "rank_"}).output_prefix == "rank_"


def test_an_output_prefix_in_a_missing_folder_is_refused(tmp_path):
    message = refusal({"OUTPUT_PREFIX": f"{tmp_path}/missing/rank_"})
    assert f"'{tmp_path}/missing' is none" in message


def test_an_output_prefix_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "existing folder" in refusal({"OUTPUT_PREFIX": f"{tmp_path}/file/rank_"})


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be written to by root")
def test_an_output_prefix_in_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "can be written to" in refusal({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})


@pytest.mark.parametrize("character", [*'<>:"|?*\x00\n\x7f'])
def test_an_output_prefix_with_a_forbidden_character_is_refused(character, tmp_path):
    message = refusal({"OUTPUT_PREFIX": f"{tmp_path}/rank{character}"})
    assert "without control characters" in message


# CONFIG_FILE


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "netloader.json"

    def write(content):
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_the_file_wins_and_what_stands_beside_it_fills_the_gaps(config_file):
    path = config_file({"MODEL": "of the file", "CHUNK_MIB": 2})
    given_beside = {"CONFIG_FILE": path, "MODEL": "beside it", "MAX_SESSIONS": 7}
    config = parse_config(given_beside)
    assert (config.model, config.chunk_mib, config.max_sessions) == ("of the file", 2, 7)
    assert given_beside["MODEL"] == "beside it"


def test_a_value_of_the_file_is_checked_like_any_other(config_file):
    assert refusal({"CONFIG_FILE": config_file({"CHUNK_MIB": 0})}).startswith("CHUNK_MIB is 0")


def test_a_null_in_the_file_lets_what_stands_beside_it_count(config_file):
    path = config_file({"MODEL": None, "num_threads": 3})
    config = parse_config({"CONFIG_FILE": path, "MODEL": "beside it", "num_threads": 2})
    assert (config.model, config.disk) == ("beside it", {"num_threads": 3})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"MODEL": "a", "VERIFY": true, "MODEL": "b"}', "has the key 'MODEL' twice"),
        ('{"SOURCE": [{"device_id": 0, "device_id": 1}]}', "has the key 'device_id' twice"),
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"LISTEN_PORT": ' + "9" * 5000 + "}", "is not valid JSON"),
        ([], "must be a JSON object"),
        ("null", "must be a JSON object"),
        ({"PORT": 5}, "unknown keys 'PORT'"),
        ({"CONFIG_FILE": "another"}, "unknown keys 'CONFIG_FILE'"),
        (b"\xff\xfe{}", "cannot be read"),
    ],
)
def test_a_file_without_a_configuration_is_refused_by_name(config_file, content, why):
    path = config_file(content)
    message = refusal({"CONFIG_FILE": path})
    assert repr(path) in message
    assert why in message


def test_a_missing_file_is_refused_by_name(tmp_path):
    path = str(tmp_path / "missing.json")
    assert refusal({"CONFIG_FILE": path}) == f"CONFIG_FILE {path!r} does not exist"


def test_a_folder_for_a_file_is_refused(tmp_path):
    assert "cannot be read" in refusal({"CONFIG_FILE": str(tmp_path)})


@pytest.mark.parametrize("value", ["", 5, [], {}, False])
def test_a_file_name_that_is_none_is_refused(value):
    assert "the path of a JSON file" in refusal({"CONFIG_FILE": value})


# Anything


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: (
        st.lists(values, max_size=4)
        | st.dictionaries(st.text() | st.sampled_from(["device_id", "sources"]), values, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "CONFIG_FILE"]), _json_values, max_size=3))
@example({"CONNECT_TIMEOUT": 10**400})
@example({"LISTEN_PORT": -(10**400)})
@example({"MAX_SESSIONS": 10**400})
@example({"SOURCE": [{"device_id": 10**400, "sources": ["a:1"]}]})
@example({"SOURCE": [{"device_id": 0, "sources": ["a:00001999999"]}]})
@example({"CONFIG_FILE": "\x00"})
@example({"CONFIG_FILE": "\ud800"})
@example({"LISTEN_HOST": "\ud800"})
def test_any_json_is_a_configuration_or_a_config_error(extra_config):
    try:
        config = parse_config(extra_config)
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(config, NetLoaderConfig)


@given(st.sampled_from(KEYS), _json_values)
def test_any_value_of_any_key_is_taken_or_a_config_error(key, value):
    try:
        parse_config({key: value})
    except ConfigError as error:
        assert str(error).startswith(key)


# Who may pull


def test_a_secret_can_be_named_by_the_environment(tmp_path, monkeypatch):
    path, other = secret_file(tmp_path, SECRET), secret_file(tmp_path, SECRET, name="other")
    monkeypatch.setenv("NETLOADER_SECRET_FILE", path)
    assert parse_config({}).secret_file == path
    assert parse_config({}).credentials is parse_config({}).credentials is not None
    assert parse_config({"SECRET_FILE": other}).secret_file == other
    monkeypatch.setenv("NETLOADER_SECRET_FILE", "")
    assert parse_config({"SECRET_FILE": other}).secret_file == other
    with pytest.raises(ConfigError, match="NETLOADER_SECRET_FILE is ''"):
        parse_config({})


def test_a_bad_secret_is_an_error_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"SECRET_FILE .* a secret of 5 characters"):
        parse_config({"SECRET_FILE": secret_file(tmp_path, "short")})
    with pytest.raises(ConfigError, match="TLS_CERT needs TLS_KEY and TLS_CA"):
        parse_config({"TLS_CERT": "a"})


def test_a_secret_of_the_environment_does_not_go_with_certificates(tmp_path, monkeypatch):
    monkeypatch.setenv("NETLOADER_SECRET_FILE", secret_file(tmp_path, SECRET))
    with pytest.raises(ConfigError, match="NETLOADER_SECRET_FILE"):
        parse_config({"TLS_CERT": "a", "TLS_KEY": "b", "TLS_CA": "c"})


@pytest.mark.parametrize("key", ["SECRET_FILE", "TLS_CERT", "TLS_KEY", "TLS_CA", "TOKEN_FILE"])
@pytest.mark.parametrize("value", ["", 7, ["a"], "a\0b", "\ud800"])
def test_what_is_no_path_is_an_error(key, value):
    with pytest.raises(ConfigError, match=f"{key} is .*; allowed: the path of a file"):
        parse_config({key: value})


@pytest.mark.parametrize("value", ["", 7, "a b", "a:b"])
def test_what_is_no_name_of_a_server_is_an_error(value):
    with pytest.raises(ConfigError, match="TLS_SERVER_NAME is"):
        parse_config({"TLS_SERVER_NAME": value})
