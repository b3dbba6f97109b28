"""Whatever happens to one side, the other one lives on, infers, and serves or loads right bytes."""

import signal
import time

import torch
from npusim_vllm import fault
from transfer_support import (
    AFTER_THE_LAST,
    BEFORE_THE_FORMATS,
    BEFORE_THE_GROUP,
    BEFORE_THE_VOTE,
    COUNT,
    IN_THE_FIRST_MESSAGE,
    IN_THE_TRANSFER,
    MIB,
    PATIENCE,
    WHILE_HCCL_CONNECTS,
    LoadFailed,
    Process,
    case,
    check_inference,
    do_at,
    end_inference,
    here,
    inferring,
    load,
    load_into,
    maker,
    nz,
    rows,
    sent_bytes,
    serve,
    signal_self_at,
    wait_for_no_sessions,
    wait_until_hccl_rests,
)

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# torch_npu's watchdog looks for errors once a second, and ends the process that has one.
WATCHDOG = 2.5
# A handshake, then a transfer that stalls, then the end of what was under way.
LONGEST = 5.0 + 3.0 + 5.0 + 2.0


def check_survivors(*processes):
    time.sleep(WATCHDOG)
    for process in processes:
        process.check_alive()
    for process in processes:
        process.call(check_inference)
    for process in processes:
        process.start(end_inference)
    assert all(process.result() > 5 for process in processes)


INFERENCE = 1  # communicator, which two processes have that infer together
# Deadlines that no case lives to see.
NOTICED = {"handshake_timeout": 3 * PATIENCE, "progress_timeout": 3 * PATIENCE}


# ------------------------------------------------------------------------------------ clients go


def client_goes(point, number):
    source, mate = inferring(0, 2)
    address = source.call(serve, rows, **(NOTICED if number == KILL else {}))
    client = Process(1)
    client.call(signal_self_at, point, number)
    client.start(load, [address], rows)
    client.wait_until_gone(number)
    assert source.call(wait_for_no_sessions) < LONGEST
    source.call(wait_until_hccl_rests, INFERENCE)
    Process(1).call(load, [address], rows).check()
    check_survivors(source, mate)
    if number == STOP:
        client.kill(signal.SIGCONT)
        outcome = client.result()
        assert outcome.failure or not outcome.wrong, outcome
        client.call(load, [address], rows).check()


@case
def a_client_is_killed_before_the_group():
    client_goes(BEFORE_THE_GROUP, KILL)


@case
def a_client_is_killed_while_hccl_connects():
    client_goes(WHILE_HCCL_CONNECTS, KILL)


@case
def a_client_is_killed_before_the_vote():
    client_goes(BEFORE_THE_VOTE, KILL)


@case
def a_client_is_killed_in_the_first_message():
    client_goes(IN_THE_FIRST_MESSAGE, KILL)


@case
def a_client_is_killed_in_the_transfer():
    client_goes(IN_THE_TRANSFER, KILL)


@case
def a_client_is_killed_after_the_last_message():
    client_goes(AFTER_THE_LAST, KILL)


@case
def a_client_is_stopped_before_the_group():
    client_goes(BEFORE_THE_GROUP, STOP)


@case
def a_client_is_stopped_while_hccl_connects():
    client_goes(WHILE_HCCL_CONNECTS, STOP)


@case
def a_client_is_stopped_in_the_first_message():
    client_goes(IN_THE_FIRST_MESSAGE, STOP)


@case
def a_client_is_stopped_in_the_transfer():
    client_goes(IN_THE_TRANSFER, STOP)


@case
def a_client_is_stopped_after_the_last_message():
    client_goes(AFTER_THE_LAST, STOP)


# ------------------------------------------------------------------------------------ sources go


def source_goes(point, number):
    """A source goes while a client pulls from it, which has another one."""
    client, mate = inferring(1, 3)
    source, other = Process(0), Process(2)
    addresses = [source.call(serve, rows), other.call(serve, rows)]
    source.call(signal_self_at, point, number)
    outcome = client.call(load, addresses, rows, **(NOTICED if number == KILL else {}))
    outcome.check()
    assert outcome.seconds < LONGEST, outcome
    source.wait_until_gone(number)
    check_survivors(client, mate)
    client.call(load, addresses[1:], rows).check()


@case
def a_source_is_killed_before_the_group():
    source_goes(BEFORE_THE_GROUP, KILL)


@case
def a_source_is_stopped_while_hccl_connects():
    source_goes(WHILE_HCCL_CONNECTS, STOP)


@case
def a_source_is_stopped_before_the_vote():
    source_goes(BEFORE_THE_VOTE, STOP)


@case
def a_source_is_killed_while_hccl_connects():
    source_goes(WHILE_HCCL_CONNECTS, KILL)


@case
def a_source_is_killed_in_the_first_message():
    source_goes(IN_THE_FIRST_MESSAGE, KILL)


@case
def a_source_is_killed_in_the_transfer():
    source_goes(IN_THE_TRANSFER, KILL)


@case
def a_source_is_killed_after_the_last_message():
    source_goes(AFTER_THE_LAST, KILL)


@case
def a_source_is_stopped_before_the_group():
    source_goes(BEFORE_THE_GROUP, STOP)


@case
def a_source_is_stopped_in_the_first_message():
    source_goes(IN_THE_FIRST_MESSAGE, STOP)


@case
def a_source_is_stopped_in_the_transfer():
    source_goes(IN_THE_TRANSFER, STOP)


@case
def a_source_is_stopped_after_the_last_message():
    source_goes(AFTER_THE_LAST, STOP)


def the_only_source_goes(number):
    client, mate = inferring(1, 3)
    source = Process(0)
    address = source.call(serve, rows)
    source.call(signal_self_at, IN_THE_TRANSFER, number)
    outcome = client.call(load, [address], rows)
    outcome.check_failed(str(address))
    assert outcome.seconds < LONGEST, outcome
    check_survivors(client, mate)
    client.call(load, [Process(0).call(serve, rows)], rows).check()


@case
def the_only_source_is_killed():
    the_only_source_goes(KILL)


@case
def the_only_source_is_stopped():
    the_only_source_goes(STOP)


# ------------------------------------------------------------------------------------ half of one


@case
def a_client_dies_within_a_message():
    source, mate = inferring(0, 2)
    address = source.call(serve, rows)
    client = Process(1)
    client.call(fault, f"recv:die@{COUNT // 2}")
    client.start(load, [address], rows)
    client.wait_until_gone(KILL)
    source.call(wait_for_no_sessions)
    Process(1).call(load, [address], rows).check()
    check_survivors(source, mate)


@case
def a_source_dies_within_a_message():
    client, mate = inferring(1, 3)
    source, other = Process(0), Process(2)
    addresses = [source.call(serve, rows), other.call(serve, rows)]
    source.call(fault, f"send:die@{COUNT // 2}")
    client.call(load, addresses, rows).check()
    source.wait_until_gone(KILL)
    check_survivors(client, mate)


# ------------------------------------------------------------------------------------ the device


def synchronize_device():
    torch.npu.synchronize()


@case
def the_whole_device_synchronizes_after_a_client_was_killed():
    source, client = Process(0), Process(1)
    address = source.call(serve, rows)
    client.call(signal_self_at, IN_THE_TRANSFER, KILL)
    client.start(load, [address], rows)
    client.wait_until_gone(KILL)
    source.call(wait_for_no_sessions)
    source.call(synchronize_device)


@case
def the_whole_device_synchronizes_after_the_source_was_killed():
    source, client = Process(0), Process(1)
    address = source.call(serve, rows)
    source.call(signal_self_at, IN_THE_TRANSFER, KILL)
    client.call(load, [address], rows).check_failed()
    client.call(synchronize_device)


def take_every_stream():
    """Makes streams as a model does, which are all that torch_npu has to give, and uses each."""
    here.streams = [torch.npu.Stream() for _ in range(64)]
    use_every_stream()


def use_every_stream():
    ones = torch.ones(8, device="npu")
    torch.npu.current_stream().synchronize()
    for stream in here.streams:
        with torch.npu.stream(stream):
            ones + ones
    for stream in here.streams:
        stream.synchronize()


@case
def a_stopped_client_holds_up_no_stream_of_the_model():
    source, client = Process(0), Process(1)
    address = source.call(serve, rows, **NOTICED)
    source.call(take_every_stream)
    client.call(signal_self_at, IN_THE_TRANSFER, STOP)
    client.start(load, [address], rows)
    client.wait_until_gone(STOP)
    source.call(use_every_stream)


# ------------------------------------------------------------------------------------ HCCL's faults


def check_next(source, client, address):
    """Both sides live on and can do it again."""
    source.call(wait_for_no_sessions)
    time.sleep(WATCHDOG)
    source.check_alive()
    client.check_alive()
    source.call(fault, "clear")
    client.call(fault, "clear")
    client.call(load, [address], rows).check()
    for process in (source, client):
        process.call(wait_until_hccl_rests)


# What HCCL itself lets fail on its stream stops the device where that is what failures do.
ONLY_THE_STREAM = {"NPU_SIM_ON_FAILURE": "stream"}


def with_fault(side, spec, environment=None):
    """Returns how a load ended that had a fault on one side, and how many MB were sent."""
    environment = environment or {}
    source, client = Process(0, **environment), Process(1, **environment)
    address = source.call(serve, rows)
    (source if side == "source" else client).call(fault, spec)
    outcome = client.call(load, [address], rows)
    assert outcome.seconds < LONGEST, outcome
    sent = source.call(sent_after_the_session)
    check_next(source, client, address)
    return outcome, sent // MIB


def sent_after_the_session():
    wait_for_no_sessions()
    return sent_bytes()


@case
def delayed_messages_arrive():
    outcome, sent = with_fault("source", "send:delay=60")
    outcome.check()
    assert outcome.seconds > 0.06 * COUNT and sent == COUNT


@case
def a_message_that_is_long_on_its_way_arrives():
    outcome, _ = with_fault("client", "recv:delay=2000@9")
    outcome.check()
    assert outcome.seconds > 2


@case
def a_source_that_stalls_is_given_up():
    with_fault("source", "send:stall@9")[0].check_failed()


@case
def a_client_that_stalls_within_a_message_gives_up():
    with_fault("client", "recv:stall=5000@9")[0].check_failed()


@case
def a_bit_that_flips_on_the_way_is_noticed_and_fetched_again():
    outcome, sent = with_fault("source", "send:flip=70000@9")
    outcome.check()
    assert sent == COUNT + 1


@case
def a_bit_that_flips_at_the_client_is_noticed_and_fetched_again():
    outcome, sent = with_fault("client", "recv:flip=-1@4")
    outcome.check()
    assert sent == COUNT + 1


@case
def bits_that_flip_all_the_time_fail_the_load():
    outcome, _ = with_fault("client", "recv:flip=5@2+")
    outcome.check_failed("wrong bytes twice")


@case
def an_operation_that_hccl_refuses_at_the_source():
    outcome, _ = with_fault("source", "send:error@9")
    outcome.check_failed()


@case
def an_operation_that_hccl_refuses_at_the_client():
    outcome, _ = with_fault("client", "recv:error@9")
    outcome.check_failed()


@case
def an_operation_that_fails_later_at_the_source():
    outcome, _ = with_fault("source", "send:async_error@9", ONLY_THE_STREAM)
    outcome.check_failed()


@case
def an_operation_that_fails_later_at_the_client():
    outcome, _ = with_fault("client", "recv:async_error@9", ONLY_THE_STREAM)
    outcome.check_failed()


@case
def a_client_goes_on_with_the_next_source_after_an_error():
    source, other, client = (Process(index, **ONLY_THE_STREAM) for index in (0, 2, 1))
    addresses = [source.call(serve, rows), other.call(serve, rows)]
    source.call(fault, "send:async_error@9")
    client.call(load, addresses, rows).check()
    time.sleep(WATCHDOG)
    for process in (source, other, client):
        process.check_alive()
    client.call(load, addresses[:1], rows).check()


# ------------------------------------------------------------------------------------ memory


def packed(seed):
    """Chunks of several tensors each, which need memory of their own on both sides."""
    make = maker(seed)
    return {f"part.{i}": make(torch.uint8, 300_001) for i in range(300)}


def no_memory():
    torch.npu.empty_cache()
    fault("alloc:fail")


def without_memory(side):
    source, client = Process(0), Process(1)
    address = source.call(serve, packed, chunk_mib=32)
    client.call(make_blank, packed)
    (source if side == "source" else client).call(no_memory)
    refusal = client.call(load_blank, [address], chunk_mib=32)
    time.sleep(WATCHDOG)
    source.call(wait_for_no_sessions)
    source.check_alive()
    client.check_alive()
    source.call(fault, "clear")
    client.call(fault, "clear")
    client.call(load, [address], packed, chunk_mib=32).check()
    return refusal


def make_blank(make):
    here.blank = make(1)


def load_blank(sources, **changes):
    try:
        load_into(here.blank, sources, **changes)
    except LoadFailed as error:
        return str(error)
    raise AssertionError("it loaded")


@case
def a_source_without_memory_fails_a_session_and_lives_on():
    assert without_memory("source")


@case
def a_client_without_memory_fails_and_lives_on():
    assert "memory" in without_memory("client")


def large_nz(seed):
    """More than what torch still has for the copy that a cast makes."""
    return {"nz": nz(maker(seed)(torch.int8, 4096, 8192))}


def lose_memory_before_the_formats():
    do_at(BEFORE_THE_FORMATS, no_memory)


@case
def a_client_without_memory_for_formats_fails_and_lives_on():
    source, client = Process(0), Process(1)
    address = source.call(serve, large_nz)
    client.call(lose_memory_before_the_formats)
    client.call(load, [address], large_nz).check_failed("after all weights had come", "memory")
    client.call(fault, "clear")
    client.call(load, [address], large_nz).check()


# ------------------------------------------------------------------------------------ handshake


# Until then a communicator hangs here: longer than the deadline of a handshake.
HANGS = 16


def hanging(side):
    environment = {"HCCL_CONNECT_TIMEOUT": str(HANGS)}
    source, client = Process(0, **environment), Process(1, **environment)
    address = source.call(serve, rows)
    begun = time.monotonic()
    (source if side == "source" else client).call(fault, "init:hang@1")
    outcome = client.call(load, [address], rows)
    outcome.check_failed(str(address))
    assert outcome.seconds < 5 + 7, outcome
    assert source.call(wait_for_no_sessions) < 5 + 7
    # While the thread that hangs is still there, and again when HCCL has let it go.
    client.call(load, [address], rows).check()
    time.sleep(max(0, begun + HANGS + 1 - time.monotonic()))
    check_next(source, client, address)


@case
def a_communicator_that_hangs_at_the_source():
    hanging("source")


@case
def a_communicator_that_hangs_at_the_client():
    hanging("client")


@case
def a_communicator_that_cannot_be_made_at_the_source():
    with_fault("source", "init:error@1")[0].check_failed()


@case
def a_communicator_that_cannot_be_made_at_the_client():
    with_fault("client", "init:error@1")[0].check_failed()
