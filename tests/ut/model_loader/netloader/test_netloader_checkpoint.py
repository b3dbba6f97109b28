"""A folder with a checkpoint: its files, its tensors, who it is."""

import json
import os
import threading

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.identity import identity
from vllm_ascend.model_loader.netloader import checkpoint
from vllm_ascend.model_loader.netloader.checkpoint import CheckpointError
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view.records import decode
from vllm_ascend.model_loader.netloader.identity import PLACEMENT
from vllm_ascend.model_loader.netloader.interaction import api

from .support import bytes_of, until

CONFIG = {"architectures": ["Small"], "hidden_size": 4, "head_dim": None, "dtype": "bfloat16"}


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "b.weight": torch.randn(6, 4, dtype=torch.bfloat16),
        "a.weight": torch.randn(3, 5),
        "scale": torch.tensor(2.5),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 4),
    }


@pytest.fixture
def folder(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def raw(head, data=b""):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(first, after, shape=(2,), dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, after]}


def index(folder, **files):
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": files}))


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and torch.equal(bytes_of(found[name]), bytes_of(wanted[name]))
        for name in wanted
    )


def problem(folder):
    with pytest.raises(CheckpointError) as error, checkpoint.opened(folder):
        pass
    return str(error.value)


# Files


def test_tensors_are_those_that_safetensors_reads_in_the_order_of_their_names(folder):
    with checkpoint.opened(folder) as found:
        assert same(found.tensors, load_file(folder / "model.safetensors"))
        assert [*found.tensors] == sorted(found.tensors)
        assert found.nbytes == sum(tensor.nbytes for tensor in tensors().values())


def test_tensors_at_odd_offsets_are_right(tmp_path):
    head = {"a": entry(0, 1, [1]), "b": entry(1, 9, [2], "F32")}
    values = torch.tensor([1.5, -3.25])
    for blanks in range(4):
        text = json.dumps(head).encode() + b" " * blanks
        path = tmp_path / "model.safetensors"
        path.write_bytes(raw(text, b"\7" + bytes(values.view(torch.uint8).tolist())))
        with checkpoint.opened(tmp_path) as found:
            assert found.tensors["a"].tolist() == [7]
            assert torch.equal(found.tensors["b"] + 0, values)


def test_all_files_are_read_but_those_of_another_format_beside_them(folder):
    save_file({"c": torch.ones(2)}, folder / "model-2.safetensors")
    save_file({"d": torch.ones(2)}, folder / "consolidated.safetensors")
    with checkpoint.opened(folder) as found:
        assert found.tensors.keys() == {*tensors(), "c"}


def test_an_index_says_which_files_are_read(folder):
    save_file({"c": torch.ones(2)}, folder / "one.safetensors")
    index(folder, c="one.safetensors")
    with checkpoint.opened(folder) as found:
        assert [*found.tensors] == ["c"]


def test_an_index_that_does_not_fit_its_files_is_refused(folder):
    index(folder, missing="model.safetensors")
    assert "'missing', and no file has" in problem(folder)
    for name in ("../model.safetensors", "/etc/passwd", "config.json", ""):
        index(folder, c=name)
        assert "which is no file of safetensors" in problem(folder)
    (folder / checkpoint.INDEX).write_text("[]")
    assert checkpoint.INDEX in problem(folder)
    index(folder, c="gone.safetensors")
    with pytest.raises(FileNotFoundError), checkpoint.opened(folder):
        pass


def test_a_tensor_that_two_files_have_is_refused(folder):
    save_file({"scale": torch.ones(2)}, folder / "more.safetensors")
    assert "has 'scale', as another file has" in problem(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "no files of safetensors" in problem(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    assert "has no tensors" in problem(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "header"),
        (b"\1\0\0", "header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "does not fit"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "does not fit"),
        (raw(b"nonsense"), "its header"),
        (raw(b"\xff" * 8), "its header"),
        (raw(b"[" * 100_000), "its header"),
        (raw({"a": 7}), "its header"),
        (raw({"a": {"dtype": "U8", "shape": [2]}}, b"12"), "its header"),
        (raw({"a": entry(0, 2, [2.5])}, b"12"), "its header"),
        (raw({"a": entry(0, 2, dtype="F7")}, b"12"), "dtype 'F7', which is not supported"),
        (raw({"a": entry(0, 3)}, b"123"), "3 bytes for the shape"),
        (raw({"a": entry(0, 2, [-1, -2])}, b"12"), "2 bytes for the shape"),
        (raw({"a": entry(0, 2, [1 << 62, 1 << 62])}, b"12"), "2 bytes for the shape"),
        (raw({"a": entry(2, 0)}, b"12"), "-2 bytes for the shape"),
        (raw({"a": entry(-2, 0)}, b"12"), "begins at -2"),
        (raw({"a": entry(1, 3)}, b"123"), "begins at 1"),
        (raw({"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "begins at 1"),
        (raw({"a": entry(0, 2), "b": entry(3, 5)}, b"12345"), "begins at 3"),
        (raw({"a": entry(0, 2)}, b"1"), "its tensors end at"),
        (raw({"a": entry(0, 2)}, b"123"), "its tensors end at"),
    ],
)
def test_a_file_that_is_not_right_is_refused_by_name(tmp_path, content, why):
    (tmp_path / "model.safetensors").write_bytes(content)
    found = problem(tmp_path)
    assert str(tmp_path / "model.safetensors") in found
    assert why in found


# Changes


def as_if_no_lease_could_be_had(monkeypatch):
    monkeypatch.setattr(checkpoint, "_leased", lambda *_: False)


def test_files_that_stay_as_they_are_have_not_changed(folder):
    with checkpoint.opened(folder) as found:
        found.check()
        (folder / "notes.txt").write_text("beside it")
        found.check()


@pytest.mark.parametrize("change", ["shorter", "longer", "replaced", "removed", "same length"])
def test_a_file_that_has_changed_is_named(folder, monkeypatch, change):
    as_if_no_lease_could_be_had(monkeypatch)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    os.utime(path, ns=(0, 0))
    with checkpoint.opened(folder) as found:
        if change == "shorter":
            os.truncate(path, 4)
        elif change == "longer":
            path.write_bytes(data + b"1")
        elif change == "same length":
            path.write_bytes(data)
        else:
            path.unlink()
        if change == "replaced":
            path.write_bytes(data)
            os.utime(path, ns=(0, 0))
        with pytest.raises(CheckpointError, match=r"model\.safetensors has (changed|gone)"):
            found.check()


def test_who_wants_to_write_a_file_waits_until_nobody_reads_it(folder):
    path = folder / "model.safetensors"
    opened, wrote = threading.Event(), threading.Event()

    def write():
        opened.set()
        with path.open("r+b") as file:
            file.truncate(4)
        wrote.set()

    with checkpoint.opened(folder) as found:
        if not found.files[0].leased:
            pytest.skip("this file system has no leases")
        writer = threading.Thread(target=write)
        writer.start()

        def is_noticed():
            try:
                found.check()
            except CheckpointError as error:
                assert "about to be changed" in str(error)
                return True
            return False

        until(is_noticed)
        assert opened.is_set() and not wrote.is_set()
        assert same(found.tensors, tensors())
    writer.join()
    assert wrote.is_set()


def test_a_file_that_is_being_written_is_refused(folder):
    with checkpoint.opened(folder) as found:
        if not found.files[0].leased:
            pytest.skip("this file system has no leases")
    with (folder / "model.safetensors").open("r+b"):
        assert "is being written" in problem(folder)


# Records


class Copying(nn.Module):
    """A model whose parameters are a checkpoint's tensors."""

    def __init__(self, checkpoint):
        super().__init__()
        self.named = {}
        for name, tensor in checkpoint.items():
            self.named[name] = nn.Parameter(torch.zeros_like(tensor), requires_grad=False)
            self.register_parameter(name.replace(".", "/"), self.named[name])

    def load_weights(self, weights):
        for name, tensor in weights:
            self.named[name].data.copy_(tensor)


def test_records_are_those_of_a_model_that_copies_each_tensor_as_it_is(folder):
    with checkpoint.opened(folder) as found:
        view = checkpoint.view_of(found)
        records = decode(view.records)
        model, trace = Copying(found.tensors), Trace()
        with trace:
            model.load_weights(trace.watch(found.tensors.items()))
        traced = trace.records(model)
        named = [one.name.replace("/", ".") for one in traced.parameters]
        assert [one.name for one in records.parameters] == sorted({*named} - {"nothing"})
        for ours, theirs in zip(records.tensors, traced.tensors, strict=True):
            assert (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
            assert [(one.box, one.offset, one.stride, one.through) for one in ours.copies] == [
                (one.box, one.offset, one.stride, one.through) for one in theirs.copies
            ]
            assert [records.parameters[one.parameter].name for one in ours.copies] == [
                named[one.parameter] for one in theirs.copies
            ]
        for parameter, tensor in zip(records.parameters, view.parameters, strict=True):
            assert tensor is found.tensors[parameter.name]


# Who it is


def test_the_identity_is_that_of_the_configuration(folder):
    who = checkpoint.identity_of(folder, "small", "netloader")
    assert (who.model, who.layout) == ("small", "checkpoint")
    assert (who.rank, who.tp, who.pp, who.ep) == (0, 1, 1, 1)
    assert who.config == {}
    assert who.defaults == {"architectures": ["Small"], "hidden_size": 4}


def of_an_instance(**changes):
    settings = {"architectures": ["Small"], "rope_parameters.rope_theta": 1e6}
    return identity(config=settings, defaults={"hidden_size": 4, "head_dim": 2}, **changes)


def test_instances_of_any_kind_whose_settings_are_those_of_the_folder_can_read_its_view(folder):
    who = checkpoint.identity_of(folder, "small", "netloader")
    for kind in (
        {"rank": 3, "tp": 4},
        {"quantization": "fp8", "layout": "processed", "vllm_version": "1"},
        {"dtype": "torch.float32"},
    ):
        assert api.differences(of_an_instance(**kind), who, view=True) == []


def test_another_model_is_told_from_the_folder_by_name_revision_and_settings(folder):
    who = checkpoint.identity_of(folder, "small", "netloader")

    def fields(client):
        return [one.field for one in api.differences(client, who, view=True)]

    assert fields(of_an_instance(model="large")) == ["model"]
    other = msgspec.structs.replace(of_an_instance(), defaults={"hidden_size": 8})
    assert fields(other) == ["config.hidden_size"]


def test_a_client_that_asks_by_name_is_told_that_a_folder_is_cut_otherwise(folder):
    who = checkpoint.identity_of(folder, "small", "netloader")
    fields = {one.field for one in api.differences(of_an_instance(), who)}
    assert fields == {"dtype"}
    assert fields <= PLACEMENT


def test_a_model_without_a_name_is_called_as_vllm_is_given_it(folder):
    assert checkpoint.identity_of(folder, None, "netloader").model == str(folder)
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = folder / "models--org--small" / "snapshots" / commit
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    who = checkpoint.identity_of(cached, None, "netloader")
    assert (who.model, who.revision.name) == ("org/small", commit)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        checkpoint.identity_of(tmp_path, "small", "netloader")


def test_a_configuration_that_is_not_there_is_named_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        checkpoint.identity_of(tmp_path, "small", "netloader")
    assert str(error.value) == f"{tmp_path}/config.json: No such file or directory"
    with pytest.raises(ConfigError, match=r"/nope: no such folder$"):
        checkpoint.identity_of(tmp_path / "nope", "small", "netloader")
