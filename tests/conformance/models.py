"""Models: functions that make tensors on the device of a way, from a seed."""

import numpy
import torch

from .ways import INDEX

MIB = 1 << 20
FRACTAL_NZ = 29
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


class Maker:
    """Makes random tensors, so that every bit pattern of a dtype comes up."""

    def __init__(self, way, seed, index=None):
        self.on_npu = way.on_npu
        self._index = INDEX if index is None else index
        self._random = numpy.random.SFC64(seed)  # the fastest, as much of a test is to make tensors
        way.device(self._index)

    def __call__(self, dtype, *shape):
        return self.here(self.host(dtype, *shape))

    def host(self, dtype, *shape):
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        nbytes = count * dtype.itemsize
        data = self._random.random_raw(-(-nbytes // 8)).view(numpy.uint8)[:nbytes]
        if dtype == torch.bool:
            data &= 1
        return torch.from_numpy(data).view(dtype).reshape(shape)

    def here(self, tensor):
        return tensor.to(f"npu:{self._index}") if self.on_npu else tensor

    def nz(self, tensor):
        """The tensor in a format of its own, where there is one."""
        if not self.on_npu:
            return tensor
        import torch_npu

        return torch_npu.npu_format_cast(tensor, FRACTAL_NZ)


COUNT, ROW = 24, MIB


def rows(make):
    """Tensors of one chunk each, so that a tensor's index is its chunk's number."""
    first = make.nz(make(torch.int8, 256, ROW // 256))
    return {"row.0": first} | {f"row.{i}": make(torch.uint8, ROW) for i in range(1, COUNT)}


def many_rows(make):
    """More of them than a session asks for at once."""
    return {f"row.{i}": make(torch.uint8, ROW) for i in range(64)}


def packed(make):
    """Small tensors that share a few chunks."""
    return {f"t{i}": make(torch.uint8, 7000 + i) for i in range(700)}


def small(make):
    """A model of one chunk."""
    return {f"t{i}": make(torch.float32, 10 + i) for i in range(9)}


def assorted(make):
    """One of every kind of tensor, small and large, tied ones included."""
    embedding, transposed = make(torch.bfloat16, 1024, 700), make(torch.float16, 300, 500).t()
    return {
        **{str(dtype): make(dtype, 37, 71) for dtype in DTYPES},
        "embed.weight": embedding,
        "scalar": make(torch.float32),
        "one": make(torch.int8, 1),
        "empty": make(torch.float32, 0, 4),
        "transposed": transposed,
        "large_transposed": make(torch.float32, 500, 700).t(),
        "permuted": make(torch.bfloat16, 8, 60, 70).permute(2, 0, 1),
        "strided": make(torch.int32, 40, 50)[::2, 1::3],
        "large_strided": make(torch.float32, 800, 900)[:, 5:800],
        "part": make(torch.uint8, 1000)[3:700],  # begins at no word
        "large": make(torch.float32, 3 * MIB // 4 + 5),
        "block": make(torch.uint8, MIB),
        "block_less_a_byte": make(torch.uint8, MIB - 1),
        "block_and_a_byte": make(torch.uint8, MIB + 1),
        "three_blocks": make(torch.uint8, 2 * MIB + 3),
        "host": make.host(torch.int64, 1000),
        "host_large": make.host(torch.uint8, MIB + 5),
        "host_transposed": make.host(torch.float32, 30, 50).t(),
        "lm_head.weight": embedding,
        "tied_transposed": transposed,
    } | ({} if make.on_npu else {"complex": make(torch.complex64, 7)})


def nothing(make):
    return {}


def only_empty(make):
    return {"empty": make(torch.float32, 0, 3)}


def one_scalar(make):
    return {"one": make(torch.float32)}


def thousands(make):
    data = make(torch.float16, 16_000 * 7)
    return {f"layer.{i}.scale": data[7 * i : 7 * i + i % 7].clone() for i in range(16_000)}


def parameters(make):
    made = {"weight": make(torch.float32, 300, 400), "bias": make(torch.bfloat16, 70)}
    return {name: torch.nn.Parameter(tensor) for name, tensor in made.items()}


def tied(make):
    tensor = make(torch.uint8, 50)
    return {"a": tensor, "b": tensor}


def untied(make):
    return {"a": make(torch.uint8, 50), "b": make(torch.uint8, 50)}


def other_rows(make):
    """`rows` with one of another kind."""
    return rows(make) | {"row.7": make(torch.float32, 5)}


def more_rows(make):
    return rows(make) | {"row.24": make(torch.uint8, 5)}
