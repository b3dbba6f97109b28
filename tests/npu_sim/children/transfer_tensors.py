"""Every kind of tensor arrives as it was, and checksums are those of the documented formula."""

import hashlib

import numpy as np
import torch
import torch_npu
import xxhash
from npusim_vllm import counts
from transfer_support import (
    AFTER_THE_LAST,
    FRACTAL_NZ,
    MIB,
    Process,
    case,
    differing,
    do_at,
    few,
    here,
    load,
    load_into,
    maker,
    memory_of,
    nz,
    random_tensor,
    serve,
    settings,
)

from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.devices import device_of, rowsums

DTYPES = (
    torch.bfloat16,
    torch.float32,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def every_kind(seed):
    make = maker(seed)
    embedding, transposed = make(torch.bfloat16, 1024, 700), make(torch.float16, 300, 500).t()
    return {
        **{str(dtype): make(dtype, 37, 71) for dtype in DTYPES},
        "embed.weight": embedding,
        "scalar": make(torch.float32),
        "one": make(torch.int8, 1),
        "empty": torch.empty(0, 4).npu(),
        "transposed": transposed,
        "large_transposed": make(torch.float32, 500, 700).t(),
        "permuted": make(torch.bfloat16, 8, 60, 70).permute(2, 0, 1),
        "strided": make(torch.int32, 40, 50)[::2, 1::3],
        "large_strided": make(torch.float32, 800, 900)[:, 5:800],
        "part": make(torch.uint8, 1000)[3:700],  # begins at no word
        "large": make(torch.float32, 3 * MIB // 4 + 5),
        "odd": make(torch.uint8, 2 * MIB + 3),
        "host": random_tensor(seed, torch.int64, 1000),
        "host_large": random_tensor(seed, torch.uint8, MIB + 5),
        "host_transposed": random_tensor(seed, torch.float32, 30, 50).t(),
        "lm_head.weight": embedding,
        "tied_transposed": transposed,
    }


def every_nz(seed):
    make = maker(seed)
    nz_bf16, nz_int8 = nz(make(torch.bfloat16, 512, 640)), nz(make(torch.int8, 3, 64, 256))
    return {
        "bf16": nz_bf16,
        "fp16": nz(make(torch.float16, 64, 64)),
        "padded": nz(make(torch.bfloat16, 37, 70)),
        "large": nz(make(torch.bfloat16, 1024, 1600)),
        "int8": nz(make(torch.int8, 128, 256)),
        "experts": nz_int8,
        "w4a8": nz(make(torch.int8, 2, 64, 256)).view(torch.int32),
        "large_w4a8": nz(make(torch.int8, 8, 512, 512)).view(torch.int32),
        "nd_between": make(torch.int8, 128, 256),
        "tied": nz_bf16,
    }


def thousands(seed):
    make = maker(seed)
    return {f"small.{i}": make(torch.int16, 1 + i % 7) for i in range(3000)} | {
        f"scale.{i}": make(torch.float32) for i in range(200)
    }


def arrives(make, **changes):
    source, client = Process(0), Process(1)
    client.call(load, [source.call(serve, make, **changes)], make, **changes).check()


@case
def every_kind_of_tensor_arrives():
    arrives(every_kind)


@case
def every_kind_of_tensor_arrives_in_chunks_of_4_mib():
    arrives(every_kind, chunk_mib=4)


@case
def thousands_of_small_tensors_arrive():
    arrives(thousands)


@case
def fractal_nz_arrives_as_fractal_nz():
    arrives(every_nz)


def load_and_describe(sources, make):
    tensors = make(1)
    load_into(tensors, sources)
    return {
        "memory": {
            name: memory_of(tensor)
            for name, tensor in tensors.items()
            if tensor.is_npu and torch_npu.get_npu_format(tensor) == FRACTAL_NZ
        },
        "addresses": {name: tensor.data_ptr() for name, tensor in tensors.items()},
    }


def memory_of_served(names):
    return {name: memory_of(here.tensors[name]) for name in names}


@case
def fractal_nz_is_the_same_byte_by_byte():
    source, client = Process(0), Process(1)
    there = client.call(load_and_describe, [source.call(serve, every_nz)], every_nz)["memory"]
    assert len(there) == 9
    assert there == source.call(memory_of_served, list(there))


@case
def tied_tensors_still_share_memory():
    source, client = Process(0), Process(1)
    at = client.call(load_and_describe, [source.call(serve, every_kind)], every_kind)["addresses"]
    assert at["embed.weight"] == at["lm_head.weight"]
    assert at["transposed"] == at["tied_transposed"]


def aliased_nz(seed):
    weight = nz(maker(seed)(torch.bfloat16, 64, 64))
    return {"weight": weight, "alias": weight.detach()}


@case
def another_tensor_on_fractal_nz_memory_follows_or_is_refused():
    source, client = Process(0), Process(1)
    outcome = client.call(load, [source.call(serve, aliased_nz)], aliased_nz)
    assert outcome.failure is None or "shares memory" in outcome.failure, outcome
    assert not outcome.wrong, outcome


def overlapping_nz(seed):
    weight = nz(maker(seed)(torch.int8, 4, 64, 64))
    return {"weight": weight, "expert": weight[1]}


@case
def a_part_of_fractal_nz_memory_is_refused():
    source, client = Process(0), Process(1)
    outcome = client.call(load, [source.call(serve, overlapping_nz)], overlapping_nz)
    outcome.check_failed("FRACTAL_NZ", "shares memory")


def load_from_a_source_that_has_another_kind(sources):
    tensors = few(1)
    tensors["nz"] = maker(2)(torch.bfloat16, 64, 64)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        load_into(tensors, sources)
    except LoadFailed as error:
        assert differing(tensors, before) == []
        return str(error)
    raise AssertionError("it loaded")


@case
def another_format_is_refused_by_name():
    source, client = Process(0), Process(1)
    refusal = client.call(load_from_a_source_that_has_another_kind, [source.call(serve, few)])
    assert "nz is row-major here and FRACTAL_NZ there" in refusal, refusal


# ------------------------------------------------------------------------------------ checksums


def documented_hash(data):
    """The checksum of bytes by the formula in rowsums.py, written another way."""
    noise = hashlib.shake_256(b"netloader").digest(4 * 2048 * 4)
    weights = (np.frombuffer(noise, "<i4").reshape(4, 2048) | 1).astype(np.int64)
    rows = len(data) // 4096
    words = np.frombuffer(data[: rows * 4096], "<i2").reshape(rows, 2048).astype(np.int64)
    # |word| < 2**15 and |weight| <= 2**31: a sum of 2048 products fits into 64 bits.
    sums = (words @ weights.T).astype(np.uint64).astype(np.uint32)
    rest = data[rows * 4096 :]
    return xxhash.xxh3_128_digest(sums.tobytes() + rest + len(data).to_bytes(8, "little"))


def check_hashes():
    assert here.device.digest_algorithm == rowsums.ALGORITHM
    sizes = (0, 1, 4095, 4096, 4097, 8192, 100_001, 3 * MIB + 77, 5 * MIB)
    hosts = [random_tensor(size, torch.uint8, size) for size in sizes]
    hosts += [random_tensor(1, dtype, 123, 77) for dtype in DTYPES]
    hosts += [torch.full((MIB,), value, dtype=torch.uint8) for value in (0, 0x7F, 0x80, 0xFF)]
    expected = [documented_hash(bytes_of(host)) for host in hosts]
    devices = [host.npu() for host in hosts]
    assert list(here.device.hashes(devices)) == expected
    assert [here.device.hashes([tensor])[0] for tensor in devices] == expected
    assert list(rowsums.hashes(hosts)) == expected
    at_an_odd_place = devices[7][1:-2]
    assert here.device.hashes([at_an_odd_place])[0] == documented_hash(bytes_of(hosts[7][1:-2]))


def bytes_of(host):
    return host.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@case
def checksums_on_the_device_are_those_of_the_documented_formula():
    Process(0).call(check_hashes)


def check_that_a_bit_shows():
    tensor = random_tensor(0, torch.uint8, 100_001).npu()
    before = here.device.hashes([tensor])
    for position in (0, 4095, 4096, 99_999, 100_000):
        changed = tensor.clone()
        changed[position] ^= 1
        assert here.device.hashes([changed]) != before, position


@case
def a_changed_bit_changes_the_checksum():
    Process(0).call(check_that_a_bit_shows)


# ------------------------------------------------------------------------------------ buffers


def buffers_of_a_load(sources, megabytes=None):
    """Returns how many MB are taken within a load and not by torch; there are none after it."""
    config = settings() if megabytes is None else settings(hccl_buffer_size=megabytes)
    device = device_of(f"npu:{here.index}", config.hccl_buffer_size)
    tensors, expected = few(1), few(0)

    def memory():
        torch.npu.current_stream().synchronize()
        return counts()["device_memory"][here.index] - torch.npu.memory_reserved()

    load_into(tensors, sources, device=device)  # the first one makes streams
    before, within = memory(), []
    do_at(AFTER_THE_LAST, lambda: within.append(memory()))
    load_into(tensors, sources, device=device)
    assert memory() == before
    assert differing(tensors, expected) == []
    return (within[0] - before) / MIB


def many(seed):
    make = maker(seed)
    return {f"tensor.{i}": make(torch.uint8, MIB // 4) for i in range(200)}


def kept_after_a_load(sources):
    """How many MiB of the device a load leaves taken, beyond tensors that were there before."""
    tensors = many(1)
    torch.npu.empty_cache()
    before = counts()["device_memory"][here.index]
    load_into(tensors, sources, chunk_mib=16)
    return (counts()["device_memory"][here.index] - before) / MIB


@case
def memory_that_only_the_load_needed_is_the_devices_again():
    address = Process(0).call(serve, many, chunk_mib=16)
    kept = Process(1).call(kept_after_a_load, [address])
    assert kept <= 2, kept  # torch's least: what checksums are computed with stays


def check_buffers(**environment):
    source, client = Process(0, **environment), Process(1, **environment)
    address = source.call(serve, few)
    # One for each direction.
    assert client.call(buffers_of_a_load, [address]) == 2 * 16
    assert client.call(buffers_of_a_load, [address], 1) == 2 * 1
    assert client.call(buffers_of_a_load, [address], 50) == 2 * 50


@case
def hccl_buffers_have_the_configured_size_and_are_given_back():
    check_buffers()


@case
def hccl_buffers_have_the_configured_size_where_torch_npu_has_none_of_its_own():
    check_buffers(P2P_HCCL_BUFFSIZE="0")
