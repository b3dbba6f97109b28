"""Shows one instance feeding another: same tokens, no weight file at the second and the third.

Run by ``make demo``. The exit status is 0 only if every instance generated the same tokens with the
same log probabilities and the second and the third got their weights over the network.
"""

import argparse
import sys
import tempfile
import time
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
class Row:
    """One instance in the table at the end."""

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
    size = parser.parse_args().size
    clean_up_when_interrupted()
    try:
        with tempfile.TemporaryDirectory(prefix="netloader-demo-") as folder:
            rows = run(Path(folder), size)
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


def run(folder: Path, size: str) -> list[Row]:
    """Runs the three instances, of which at most two at a time, and returns the table."""
    full, bare = folder / "model", folder / "model-without-weights"
    say(f"making a random Llama, size {size}")
    make_model(full, "llama", size)
    copy_without_weights(full, bare)
    nbytes = sum(file.stat().st_size for file in full.glob("*.safetensors"))

    with ExitStack() as instances:
        say(f"starting the seed: reads {nbytes / 1e6:.0f} MB from disk")
        seed = instances.enter_context(instance(folder, "seed", full))
        expected = [seed.complete(prompt, TOKENS) for prompt in PROMPTS]
        took = seed.search_log(r"Loading weights took ([\d.]+) seconds")
        rows = [Row("seed", "disk", nbytes / 1e6, float(took[1]) if took else 0.0, "", "")]

        say("starting a second instance: has no weight file, its source is the seed")
        second = instances.enter_context(instance(folder, "second", bare, feeder="seed"))
        rows.append(network_row("second", second, expected))

        say("stopping the seed")
        seed.stop()

        say("starting a third instance: has no weight file either, its source is the second")
        third = instances.enter_context(instance(folder, "third", bare, feeder="second"))
        rows.append(network_row("third", third, expected))
    return rows


def instance(folder: Path, name: str, model: Path, feeder: str | None = None) -> VllmServer:
    """Returns an instance, not yet started, that pulls its weights from a running one."""
    config: dict[str, object] = {"MODEL": "demo", "OUTPUT_PREFIX": str(folder / f"{name}-rank")}
    if feeder is not None:
        config["SOURCE"] = source_list({0: [read_address(folder / f"{feeder}-rank")]})
    return VllmServer(model, folder / f"{name}.log", extra_config=config)


def network_row(name: str, server: VllmServer, expected: list[Completion]) -> Row:
    """Asks an instance what the seed was asked and says where its weights came from.

    Raises:
        ServerError: They did not come over the network.
    """
    loads = find_loads(server.read_log())
    if not loads:
        reason = server.search_log(r"NetLoader rank \d+: loading from disk.*")
        raise ServerError(f"{name} got nothing over the network: {reason[0] if reason else ''}")
    same = [server.complete(prompt, TOKENS) for prompt in PROMPTS] == expected
    load = loads[0]
    return Row(
        *(name, load.source, load.megabytes, load.seconds, load.digest[:16]),
        "yes" if same else "NO",
    )


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
