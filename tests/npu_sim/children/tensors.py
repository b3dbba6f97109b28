"""What tensors of the simulated device can do: copies, views, streams, formats, a few operators."""

import io

import torch
import torch_npu
from cases import case, run_cases

torch.npu.set_device(0)
torch.npu.config.allow_internal_format = True

DEVICE = "npu:0"
ND, FRACTAL_NZ = 2, 29
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
generator = torch.Generator().manual_seed(0)
HOST = torch.randn(37, 70, generator=generator)


def equal(got, expected):
    assert torch.equal(got.cpu(), expected.cpu()), (got.cpu(), expected.cpu())


@case
def two_devices_are_there():
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 2
    assert torch.npu.current_device() == 0
    assert torch.npu.get_device_name(0) == "Ascend910B1"


@case
def factories():
    equal(torch.zeros(3, 4, device=DEVICE), torch.zeros(3, 4))
    equal(torch.ones(3, 4, device=DEVICE, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8))
    equal(torch.full((2, 2), 7.5, device=DEVICE), torch.full((2, 2), 7.5))
    equal(torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([1.0, 2.0]))


@case
def fresh_memory_is_not_zero():
    torch.npu.empty_cache()
    size = 30 << 20  # more than torch_npu could have left over from the tensors before
    assert torch.empty(size, dtype=torch.uint8, device=DEVICE).cpu().ne(0).any()


@case
def all_dtypes_there_and_back():
    for dtype in DTYPES:
        host = (HOST * 20).to(dtype)
        device = host.to(DEVICE)
        assert device.dtype == dtype and device.device.type == "npu"
        equal(device.cpu().view(torch.uint8), host.view(torch.uint8))


@case
def scalar():
    assert torch.tensor(3.5).to(DEVICE).item() == 3.5


@case
def strided():
    device = HOST.to(DEVICE)
    equal(device.t().contiguous(), HOST.t().contiguous())
    equal(device[3:9, ::2].contiguous(), HOST[3:9, ::2].contiguous())
    equal(device.t().cpu(), HOST.t())
    wide = torch.empty(37, 140, device=DEVICE)
    wide[:, ::2].copy_(device)
    equal(wide[:, ::2], HOST)
    inside = torch.zeros(40, 80, device=DEVICE)
    inside[1:38, 3:73].copy_(HOST)
    equal(inside[1:38, 3:73], HOST)


@case
def clone_and_copy():
    device = HOST.to(DEVICE)
    other = device.clone()
    assert other.data_ptr() != device.data_ptr()
    equal(other, HOST)
    other.zero_()
    equal(other, torch.zeros_like(HOST))
    other.copy_(device)
    equal(other, HOST)


@case
def views():
    device = HOST.to(DEVICE)
    equal(device.view(70, 37), HOST.view(70, 37))
    equal(device.view(-1)[5:17], HOST.view(-1)[5:17])
    for dtype in (torch.int32, torch.int8, torch.uint8):
        equal(device.view(dtype), HOST.view(dtype))
    equal(device.as_strided((5,), (71,)), HOST.as_strided((5,), (71,)))


@case
def storage():
    device = HOST.to(DEVICE)
    shared = device.untyped_storage()
    assert shared.nbytes() >= HOST.numel() * 4 and shared.device.type == "npu"
    rows = torch.empty(0, device=DEVICE)
    rows.set_(shared, 70, (2, 70))
    equal(rows, HOST[1:3])


@case
def casts():
    device = HOST.to(DEVICE)
    equal(device.bfloat16(), HOST.bfloat16())
    equal(device.half().float(), HOST.half().float())
    equal(device.to(torch.int32), HOST.to(torch.int32))


@case
def pinned_memory():
    pinned = HOST.pin_memory()
    assert pinned.is_pinned()
    device = pinned.to(DEVICE, non_blocking=True)
    torch.npu.synchronize()
    equal(device, HOST)


@case
def parameters():
    linear = torch.nn.Linear(70, 37, bias=False).to(DEVICE)
    linear.weight.data = HOST.to(DEVICE)
    equal(linear.weight, HOST)
    with torch.device("meta"):
        empty = torch.nn.Linear(4, 4)
    assert empty.to_empty(device=DEVICE).weight.device.type == "npu"
    with torch.device(DEVICE):
        assert torch.nn.Linear(4, 4).weight.device.type == "npu"


@case
def streams_and_events():
    stream = torch.npu.Stream()
    begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    with torch.npu.stream(stream):
        begin.record()
        device = HOST.to(DEVICE, non_blocking=True)
        end.record()
    torch.npu.current_stream().wait_stream(stream)
    end.synchronize()
    assert end.query()
    equal(device, HOST)
    assert begin.elapsed_time(end) >= 0


@case
def memory_is_accounted():
    size = 100 << 20
    before = torch.npu.memory_allocated()
    block = torch.empty(size, dtype=torch.int8, device=DEVICE)
    assert torch.npu.memory_allocated() - before >= size
    free, total = torch.npu.mem_get_info()
    assert total - free >= size
    del block
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] - free >= size


@case
def too_much_memory():
    try:
        torch.empty(200 << 30, dtype=torch.int8, device=DEVICE)
    except torch.OutOfMemoryError:
        return
    raise AssertionError


@case
def format_of_floats():
    device = HOST.bfloat16().to(DEVICE)
    assert torch_npu.get_npu_format(device) == ND
    nz = torch_npu.npu_format_cast(device, FRACTAL_NZ)
    assert torch_npu.get_npu_format(nz) == FRACTAL_NZ
    # 37 x 70, padded to tiles of 16 x 16.
    assert torch_npu.get_storage_size(nz) == 48 * 80
    back = torch_npu.npu_format_cast(nz, ND)
    assert torch_npu.get_npu_format(back) == ND
    equal(back, device)
    equal(nz.cpu(), HOST.bfloat16())


@case
def format_of_int8():
    host = torch.randint(-128, 127, (3, 64, 96), dtype=torch.int8, generator=generator)
    nz = torch_npu.npu_format_cast(host.to(DEVICE), FRACTAL_NZ)
    equal(torch_npu.npu_format_cast(nz, ND), host)
    equal(torch_npu.npu_format_cast(nz.clone(), ND), host)
    # In NZ, the bytes are elsewhere than in ND.
    memory = nz.untyped_storage().nbytes()
    assert memory == host.numel()
    assert nz.view(torch.int32).shape == (3, 64, 24)


@case
def format_in_place():
    device = HOST.half().to(DEVICE)
    torch_npu.npu_format_cast_(device, FRACTAL_NZ)
    assert torch_npu.get_npu_format(device) == FRACTAL_NZ
    equal(device.cpu(), HOST.half())
    made = torch_npu.empty_with_format(
        (32, 64), dtype=torch.float16, device=DEVICE, acl_format=FRACTAL_NZ
    )
    assert torch_npu.get_npu_format(made) == FRACTAL_NZ


@case
def arithmetic():
    device = HOST.to(DEVICE)
    equal(device + device, HOST + HOST)
    equal(device * 2 + 1, HOST * 2 + 1)
    equal(-device / 3 - 1, -HOST / 3 - 1)
    equal(device * device, HOST * HOST)
    assert torch.equal(device, device.clone())
    assert torch.allclose(device, device.clone())
    assert device.abs().max().item() == HOST.abs().max().item()
    equal(torch.topk(device, 2)[1], torch.topk(HOST, 2)[1])


@case
def layers():
    device = HOST.to(DEVICE)
    torch.testing.assert_close((device @ device.t()).cpu(), HOST @ HOST.t())
    linear = torch.nn.Linear(70, 5)
    expected = linear(HOST)
    torch.testing.assert_close(linear.to(DEVICE)(device).cpu(), expected)
    normed = torch_npu.npu_rms_norm(device, torch.ones(70, device=DEVICE))[0]
    expected = HOST * torch.rsqrt((HOST * HOST).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(normed.cpu(), expected)
    torch.testing.assert_close(torch.softmax(device, -1).cpu(), torch.softmax(HOST, -1))


@case
def matmul_with_nz_weight():
    host = torch.randn(70, 64, generator=generator).half()
    weight = torch_npu.npu_format_cast(host.to(DEVICE), FRACTAL_NZ)
    torch.testing.assert_close((HOST.half().to(DEVICE) @ weight).cpu(), HOST.half() @ host)


@case
def random():
    drawn = torch.randn(10000, device=DEVICE)
    assert abs(drawn.mean().item()) < 0.1 and abs(drawn.std().item() - 1) < 0.1


@case
def backward():
    device = HOST.to(DEVICE).requires_grad_()
    (device * 2).sum().backward()
    equal(device.grad, torch.full_like(HOST, 2))


@case
def text_and_files():
    assert repr(torch.arange(4, device=DEVICE)) == "tensor([0, 1, 2, 3], device='npu:0')"
    file = io.BytesIO()
    torch.save(HOST.to(DEVICE), file)
    file.seek(0)
    equal(torch.load(file), HOST)


@case
def between_devices():
    other = HOST.to("npu:1")
    equal(other.to(DEVICE), HOST)
    there = torch.empty(37, 70, device="npu:1")
    there.copy_(HOST.to(DEVICE))
    equal(there, HOST)


@case
def operators_without_aclnn_run_on_the_cpu():
    assert torch.linalg.svdvals(torch.eye(3, device=DEVICE)).sum().item() == 3
    equal(torch.erfinv(torch.zeros(3, device=DEVICE)), torch.zeros(3))


run_cases()
torch.npu.synchronize()
