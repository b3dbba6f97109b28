import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.errors import SourceError
from vllm_ascend.model_loader.netloader.identity import Revision
from vllm_ascend.model_loader.netloader.interaction import api, server
from vllm_ascend.model_loader.netloader.interaction.api import Code, Refusal

DIGEST = "xxh3_128:0123456789abcdef"
PEER = api.Peer("10.0.0.1:28000", "process", "serving", 3)
SAID = [
    PEER,
    api.Have(7, [(0, 3), (9, 9)], False),
    api.Named([PEER]),
    api.Join(IDENTITY, DIGEST, PEER),
    api.Join(IDENTITY),
    api.Join(IDENTITY, view=True),
    api.Region(0, 7, [3, 2], [4, 1]),
    api.Regions([api.Region(0, 7, [], [])]),
    api.Joined(
        *(DIGEST, 3, "instance", Revision("v1", True), [PEER], False),
        *(msgspec.Raw(b'{"a":1}'), bytes(32)),
    ),
    api.Joined(DIGEST, 3, "instance", ranks={0: DIGEST, 17: DIGEST}),
    api.OpenGroup(DIGEST),
    api.GroupOpened("0", 1 << 20),
    api.StoreSet([("key", b"\xff\x00")]),
    api.StoreValues([("key", b"")]),
    api.SendRuns([(0, 3), (9, 9)]),
    api.Sizes([4 << 20, 1]),
    api.Endpoint("10.0.0.1:28000", "process"),
    api.ModelStatus(IDENTITY, "serving", "", DIGEST, 1, "disk", DIGEST, {0: DIGEST}, {}, False),
    api.Feed("10.0.0.1:28000", 7),
    api.SessionStatus("127.0.0.1:1", DIGEST, 7, 0.5),
    api.Done(False, "tired"),
    api.ModelFile("config.json", 7, "0" * 64),
    api.Files([api.ModelFile("config.json", 7, "0" * 64)]),
    api.Noted(),
    api.Check(),
    api.Status("0.1.0", "instance", 0, [], [], 4, 1, 7),
    api.Difference("model", "'a'", "'b'"),
    api.Problem("other_model", "message", [api.Difference("model", "'a'", "'b'")], [PEER], DIGEST),
]


def test_there_is_an_example_of_every_struct():
    structs = {
        kind
        for kind in vars(api).values()
        if isinstance(kind, type) and kind.__module__ == api.__name__
        if issubclass(kind, msgspec.Struct)
    }
    assert {type(said) for said in SAID} == structs


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_a_struct_comes_back_as_it_was(said):
    encoded = msgspec.json.encode(said)
    assert msgspec.json.encode(api.decode(encoded, type(said))) == encoded


def test_the_codes_are_told_apart_and_mean_an_error_of_a_source():
    assert len(api.CODES) == len(Code)
    for text, code in api.CODES.items():
        assert re.fullmatch("[a-z_]+", text) and code.name == text.upper()
        assert 400 <= code.status < 600 and code.about
        assert issubclass(code.error, SourceError)
    later = {code for code in Code if code.error.__name__ == "SourceBusy"}
    assert later == {code for code in Code if code.status == 503} | {Code.CHANGED}


def test_every_path_is_found_again_and_has_an_answer():
    values = {"group": "netloader", "digest": DIGEST, "first": "0", "last": "17", "id": "3"}
    values |= {"since": "5", "wait": "9", "name": "config.json"}
    for path in api.METHODS:
        found, parameters = api.route(path.format(**values))
        assert found == path
        assert parameters == {name: values[name] for name in re.findall(r"{(\w+)}", path)}
    assert set(server._ANSWERS) == set(api.METHODS)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "//",
        "*",
        "/status/",
        "/status?x=1",
        "/status#x",
        "/%73tatus",
        "status",
        "/STATUS",
        "/status\n",
        "example.org:443",
        "ftp://example.org/status",
        "/netloader/v1/models/../join",
        "/netloader/v1/models//join",
        "/netloader/v1/models/netloader/files/../config.json",
        "/netloader/v1/models/netloader/files/.env",
        "/netloader/v1/models/netloader/files/",
        f"/netloader/v1/models/{'a' * 65}/join",
        f"/netloader/v1/weights/{DIGEST}/blocks/1",
        f"/netloader/v1/weights/{DIGEST}/blocks/-1-2",
        f"/netloader/v1/weights/{DIGEST}/blocks/1-2-3",
        f"/netloader/v1/weights/{DIGEST}/blocks/\u0661-\u0662",
        f"/netloader/v1/weights/{DIGEST}/blocks/1_0-2_0",
        f"/netloader/v1/weights/{DIGEST}/blocks/{'1' * 21}-2",
        f"/netloader/v1/weights/{DIGEST.replace(':', '%3A')}/blocks/0-1",
        f"/netloader/v1/weights/{DIGEST.upper()}/blocks/0-1",
        "/netloader/v1/groups/x/store",
        f"/netloader/v1/weights/{DIGEST}/have",
        f"/netloader/v1/weights/{DIGEST}/have?since=0",
        f"/netloader/v1/weights/{DIGEST}/have?since=0&wait=99999",
        f"/netloader/v1/weights/{DIGEST}/hav?since=0&wait=1",
        f"/netloader/v1/weights/{DIGEST}/peers?",
    ],
)
def test_no_other_path_is_found(target):
    with pytest.raises(Refusal, match="unknown path") as refused:
        api.route(target)
    assert refused.value.code is Code.NOT_FOUND
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


def test_a_path_may_come_with_the_host_in_front():
    assert api.route("http://[::1]:28000/status") == (api.STATUS, {})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"weights":"\xff"}',
        b"[" * 50_000,
        b'{"weights":7}',
        b'{"weights":"md5"}',
        b'{"weights":"xxh3_128:0123456789abcdef\\n"}',
        b'{"x":' + b"[" * 50_000,
    ],
    ids=repr,
)
def test_what_is_not_the_struct_is_a_bad_request(body):
    with pytest.raises(Refusal, match="is not a valid OpenGroup") as refused:
        api.decode(body, api.OpenGroup)
    assert refused.value.code is Code.BAD_REQUEST
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["kernels", "kernels" + "\x1b" * 9000])
def test_an_identity_with_an_unknown_field_is_refused_by_name(name):
    body = msgspec.json.encode({"identity": {**msgspec.to_builtins(IDENTITY), name: "x"}})
    with pytest.raises(Refusal, match="kernels") as refused:
        api.decode(body, api.Join)
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


def test_differences_name_the_field_and_both_values_in_bounded_text():
    source = msgspec.structs.replace(IDENTITY, tp=2, model="\x1b" + "x" * 9000)
    tp, model = sorted(api.differences(IDENTITY, source), key=lambda one: one.field, reverse=True)
    assert tp == api.Difference("tp", "1", "2")
    assert model.field == "model" and model.client == "'small'"
    assert len(model.source) < 210 and model.source.isprintable()
    assert api.differences(IDENTITY, IDENTITY) == []


def test_whatever_peers_are_called_an_answer_that_names_them_is_not_too_large():
    longest = {"address": "a" * api.MAX_ADDRESS, "instance": "i" * api.MAX_INSTANCE}
    refused = Refusal(Code.BUSY, "busy")
    refused.name(DIGEST, [api.Peer(**longest)] * api.MAX_PEERS)
    assert len(msgspec.json.encode(refused.problem)) < api.MAX_BODY
    for name, text in longest.items():
        with pytest.raises(Refusal):
            api.decode(msgspec.json.encode(longest | {name: text + "x"}), api.Peer)


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_nothing_is_called_by_a_longer_name_than_others_can_pass_on(said):
    fields = msgspec.json.decode(msgspec.json.encode(said))
    if isinstance(fields, dict) and isinstance(fields.get("instance"), str):
        fields["instance"] = "i" * (api.MAX_INSTANCE + 1)
        with pytest.raises(Refusal, match="instance"):
            api.decode(msgspec.json.encode(fields), type(said))


def test_the_sample_in_the_guide_has_what_a_status_has():
    guide = "docs/source/user_guide/feature_guide/netloader_operations.md"
    sample = json.loads(re.search(r"```json\n(.+?)```", Path(guide).read_text(), re.DOTALL)[1])
    [model], [session] = sample["models"], sample["sessions"]
    of = {api.Status: sample, api.ModelStatus: model, api.SessionStatus: session}
    for struct, shown in of.items():
        assert list(shown) == list(struct.__struct_encode_fields__)


# Two threads that decode the first message of a kind at the same time end the process, unless
# msgspec has looked at the struct before.
LOOKED_AT = """
import gc, importlib, pathlib
import msgspec
import vllm_ascend.model_loader.netloader as package

root = pathlib.Path(package.__file__).parent
for path in root.rglob("*.py"):
    if "msgspec.Struct" in path.read_text():
        within = path.relative_to(root).with_suffix("")
        importlib.import_module(".".join([package.__name__, *within.parts]))

def below(struct):
    return {struct}.union(*map(below, struct.__subclasses__()))

for struct in below(msgspec.Struct):
    if struct.__module__.startswith(package.__name__):
        looked_at = any(type(one).__name__ == "StructInfo" for one in gc.get_referents(struct))
        print(looked_at, struct.__name__)
"""


def test_the_first_messages_of_a_kind_may_come_at_the_same_time():
    ended = subprocess.run([sys.executable, "-c", LOOKED_AT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert {"Join", "Manifest", "Records", "Report", "_Entry"} <= {name for _, name in lines}
    assert {name for yes, name in lines if yes == "False"} == {"_Span", "_Write"}  # never sent
