"""One rank of torch.distributed with HCCL: collectives, and sends from rank to rank."""

import datetime
import sys

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from cases import case, run_cases

RANK, RANKS, PORT = map(int, sys.argv[1:])

torch.npu.set_device(RANK % torch.npu.device_count())
dist.init_process_group(
    "hccl",
    init_method=f"tcp://127.0.0.1:{PORT}",
    rank=RANK,
    world_size=RANKS,
    timeout=datetime.timedelta(seconds=30),
)
DEVICE = torch.device("npu", torch.npu.current_device())


def filled(value, dtype=torch.float32, size=5):
    return torch.full((size,), value, dtype=dtype).to(DEVICE)


@case
def all_reduce():
    x = filled(RANK + 1.0)
    dist.all_reduce(x)
    assert x.cpu().tolist() == [sum(range(1, RANKS + 1))] * 5
    x = filled(RANK + 1.0, torch.bfloat16)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    assert x.cpu().tolist() == [RANKS] * 5


@case
def broadcast():
    x = filled(float(RANK))
    dist.broadcast(x, src=1)
    assert x.cpu().tolist() == [1.0] * 5


@case
def all_gather():
    gathered = [torch.empty(5, device=DEVICE) for _ in range(RANKS)]
    dist.all_gather(gathered, filled(float(RANK)))
    assert [x[0].item() for x in gathered] == list(range(RANKS))
    objects = [None] * RANKS
    dist.all_gather_object(objects, {"rank": RANK})
    assert [x["rank"] for x in objects] == list(range(RANKS))


@case
def reduce_and_scatter():
    x = filled(RANK + 1.0)
    dist.reduce(x, 0)
    assert RANK or x.cpu()[0] == sum(range(1, RANKS + 1))
    out = torch.empty(2, device=DEVICE)
    parts = [filled(float(i), size=2) for i in range(RANKS)] if RANK == 0 else None
    dist.scatter(out, parts, src=0)
    assert out.cpu().tolist() == [RANK] * 2
    out = torch.empty(5, device=DEVICE)
    dist.reduce_scatter_single(out, torch.arange(5.0 * RANKS).to(DEVICE))
    assert out.cpu().tolist() == [RANKS * (RANK * 5 + i) for i in range(5)]


@case
def all_to_all():
    out = torch.empty(RANKS, device=DEVICE)
    dist.all_to_all_single(out, filled(float(RANK), size=RANKS))
    assert out.cpu().tolist() == list(range(RANKS))


@case
def send_and_receive():
    if RANK == 0:
        dist.send(filled(42.0), 1)
    elif RANK == 1:
        out = torch.empty(5, device=DEVICE)
        dist.recv(out, 0)
        assert out.cpu().tolist() == [42.0] * 5


@case
def both_ways_at_once():
    peer = RANK ^ 1
    if peer < RANKS:
        size = 3_000_000
        theirs, own = torch.empty(size, device=DEVICE), filled(float(RANK), size=size)
        ops = [dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert (theirs.cpu() == peer).all()


@case
def smaller_group():
    group = dist.new_group([0, 1])
    if RANK < 2:
        x = filled(1.0)
        dist.all_reduce(x, group=group)
        assert x.cpu()[0] == 2
    dist.barrier()


run_cases()
dist.destroy_process_group()
