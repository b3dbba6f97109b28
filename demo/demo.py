"""Shows one instance feeding another: same tokens, no weight file at the second and the third.

Run by ``make demo``, and by ``make demo-npu`` on vLLM Ascend with two simulated NPUs for each
instance. The exit status is 0 only if every instance generated the same tokens with the same log
probabilities and the second and the third got their weights over the network.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tools.make_model import SIZES, copy_without_weights, make_model
from tools.netloader_view import find_loads, read_address, source_list
from tools.vllm_server import Completion, ServerError, VllmServer, clean_up_when_interrupted

PROMPTS = (
    "baba",
    "bebe dodu fafe",
    "gage gigo gugo hahe hiho",
    "keki koku lale lilo luma meme mimo nanu",
)
TOKENS = 40


@dataclass(frozen=True)
class Machine:
    """What the instances run on.

    Attributes:
        ranks: worker processes of an instance.
        environment: of the instance with this number.
    """

    ranks: int
    environment: Callable[[int], dict[str, str]]


CPU = Machine(1, lambda _: {})


@dataclass(frozen=True)
class Row:
    """One instance in the table at the end, or one of its ranks."""

    instance: str
    source: str
    megabytes: float
    seconds: float
    digest: str
    same: str


def main() -> int:
    """Runs the demo and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--npu", action="store_true", help="simulated NPUs (see tests/npu_sim)")
    arguments = parser.parse_args()
    machine = simulated_npus() if arguments.npu else CPU
    clean_up_when_interrupted()
    try:
        with tempfile.TemporaryDirectory(prefix="netloader-demo-") as folder:
            rows = run(Path(folder), arguments.size, machine)
    except KeyboardInterrupt:
        print("\ninterrupted; no process is left")
        return 130
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(rows)
    print("\nThe model was just written, so the seed read it from the page cache, not from a disk.")
    if all(row.same != "NO" for row in rows):
        print("All three instances generated the same tokens with the same log probabilities.")
        return 0
    print("The instances DIFFER.")
    return 1


def simulated_npus() -> Machine:
    """Returns NPUs in pairs; this process needs simulated ones as well, as it imports torch."""
    from tests.npu_sim.serving import npu_environment

    def environment(number: int) -> dict[str, str]:
        devices = f"{2 * number},{2 * number + 1}"
        return npu_environment() | {"ASCEND_RT_VISIBLE_DEVICES": devices}

    return Machine(2, environment)


def run(folder: Path, size: str, machine: Machine) -> list[Row]:
    """Runs the three instances, of which at most two at a time, and returns the table."""
    full, bare = folder / "model", folder / "model-without-weights"
    say(f"making a random Llama, size {size}")
    make_model(full, "llama", size)
    copy_without_weights(full, bare)
    nbytes = sum(file.stat().st_size for file in full.glob("*.safetensors"))

    with ExitStack() as instances:
        say(f"starting the seed: reads {nbytes / 1e6:.0f} MB from disk")
        seed = instances.enter_context(instance(folder, machine, "seed", full))
        expected = [seed.complete(prompt, TOKENS) for prompt in PROMPTS]
        took = seed.search_log(r"Loading weights took ([\d.]+) seconds")
        rows = [Row("seed", "disk", nbytes / 1e6, float(took[1]) if took else 0.0, "", "")]

        say("starting a second instance: has no weight file, its source is the seed")
        second = instances.enter_context(instance(folder, machine, "second", bare, feeder="seed"))
        rows += network_rows("second", second, machine, expected)

        say("stopping the seed")
        seed.stop()

        say("starting a third instance: has no weight file either, its source is the second")
        third = instances.enter_context(instance(folder, machine, "third", bare, feeder="second"))
        rows += network_rows("third", third, machine, expected)
    return rows


def instance(
    folder: Path, machine: Machine, name: str, model: Path, feeder: str | None = None
) -> VllmServer:
    """Returns an instance, not yet started, that pulls its weights from a running one."""
    config: dict[str, object] = {"MODEL": "demo", "OUTPUT_PREFIX": str(folder / f"{name}-rank")}
    if feeder is not None:
        prefix = folder / f"{feeder}-rank"
        ranks = range(machine.ranks)
        config["SOURCE"] = source_list({rank: [read_address(prefix, rank)] for rank in ranks})
    return VllmServer(
        model,
        folder / f"{name}.log",
        extra_config=config,
        arguments=[f"--tensor-parallel-size={machine.ranks}"] if machine.ranks > 1 else [],
        environment=machine.environment(("seed", "second", "third").index(name)),
    )


def network_rows(
    name: str, server: VllmServer, machine: Machine, expected: list[Completion]
) -> list[Row]:
    """Asks an instance what the seed was asked and says where its ranks' weights came from.

    Raises:
        ServerError: They did not come over the network.
    """
    loads = find_loads(server.read_log())
    if len(loads) < machine.ranks:
        reason = server.search_log(r"NetLoader rank \d+: trying the disk.*")
        raise ServerError(f"{name} got nothing over the network: {reason[0] if reason else ''}")
    same = [server.complete(prompt, TOKENS) for prompt in PROMPTS] == expected
    return [
        Row(
            f"{name} r{load.rank}" if machine.ranks > 1 else name,
            *(load.source, load.megabytes, load.seconds, load.digest.partition(":")[2][:16]),
            "yes" if same else "NO",
        )
        for load in loads
    ]


def print_table(rows: list[Row]) -> None:
    """Prints who loaded what from where."""
    print()
    print(
        f"{'instance':9} {'weights from':22} {'MB':>7} {'seconds':>8} {'GB/s':>6}  "
        f"{'digest':17} tokens as the seed's"
    )
    for row in rows:
        speed = row.megabytes / 1e3 / row.seconds if row.seconds else float("nan")
        print(
            f"{row.instance:9} {row.source:22} {row.megabytes:7.1f} {row.seconds:8.2f} "
            f"{speed:6.2f}  {row.digest:17} {row.same}"
        )


def say(text: str) -> None:
    """Prints a line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
