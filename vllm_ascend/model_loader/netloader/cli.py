"""The operator's commands; see `python -m vllm_ascend.model_loader.netloader --help`."""

import argparse
import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from . import checkpoint, copies, model_files
from .config import SECRET_FILE_VARIABLE, NetLoaderConfig, parse_config
from .credentials import Derived, derived_from, read_secrets
from .errors import (
    ConfigError,
    LoadFailed,
    NetLoaderError,
    ProtocolError,
    SourceError,
    SourceLost,
    SourceRefused,
)
from .interaction import api
from .interaction.api import DRAFT_GROUP, TARGET_GROUP, Status
from .interaction.discovery import addresses_of
from .loading.sessions import connect, status_of
from .utils import (
    Address,
    Name,
    one_line,
    own_host,
    parse_address,
    parse_name,
    rate,
    shortened,
    size,
)

OK, NO, USAGE = 0, 1, 2
_INTERVAL = 1.0  # seconds between two looks of `status --watch`
_LOOK = 0.2  # seconds between two looks at the files of a checkpoint
_SHOWN = 10  # differences of two instances


def main(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit status: 0: yes, 1: no or failed, 2: wrong usage."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        _complain([error])
        return USAGE
    except (NetLoaderError, OSError) as error:
        _complain([error])
        return NO
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """Return what parses the command line."""
    made = argparse.ArgumentParser(
        prog="netloader",
        description="Looks at NetLoader's instances, measures links to them, and copies weights.",
        epilog="For instances with a secret let NETLOADER_SECRET_FILE name its file; certificates, "
        "deadlines and the rest go into --config. Exit status: 0: yes, 1: no or failed, 2: wrong "
        "usage.",
    )
    commands = made.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        one.set_defaults(run=run)
        one.add_argument("--json", action="store_true", help="answer in JSON")
        one.add_argument(
            "--config",
            metavar="JSON",
            type=_json,
            default={},
            help="NetLoader's keys, such as TLS_CERT, as in --model-loader-extra-config",
        )
        return one

    def of_a_model(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--draft", action="store_true", help="the speculative draft instead of the model"
        )

    # `__main__` runs it; here it is for --help.
    commands.add_parser(
        "check", help="say whether this NetLoader is active, and whether a configuration is valid"
    )

    one = command("status", _status, "show all ranks of instances")
    one.add_argument("where", metavar="ADDRESS|NAME", nargs="+", type=_where)
    one.add_argument("--watch", action="store_true", help="again each second, until Ctrl-C")

    one = command("probe", _probe, "pull blocks to nowhere, checked, and say how fast they come")
    one.add_argument("address", metavar="ADDRESS", type=_address)
    one.add_argument(
        "--connections", metavar="N", type=_count, nargs="+", default=[1, 4], help="default: 1 4"
    )
    one.add_argument(
        "--seconds", metavar="S", type=_seconds, default=3.0, help="for each, default: 3"
    )
    of_a_model(one)

    one = command("pull", _pull, "copy the weights of all ranks of an instance into files")
    one.add_argument("addresses", metavar="ADDRESS", nargs="+", type=_address)
    one.add_argument("folder", metavar="FOLDER", type=_folder)
    of_a_model(one)

    one = command("fetch", _fetch, "copy what a model's folder needs beside weights")
    one.add_argument("address", metavar="ADDRESS", type=_address)
    one.add_argument("folder", metavar="FOLDER", type=_folder)
    one.add_argument(
        "--remote-code", action="store_true", help="also code, which vLLM may run if told to"
    )
    of_a_model(one)

    one = command("hold", _hold, "hold the weights of an instance or a checkpoint, and serve them")
    one.add_argument("addresses", metavar="ADDRESS", nargs="*", type=_address)
    one.add_argument("--checkpoint", metavar="FOLDER", type=Path, help="serve the files there")
    one.add_argument("--folder", metavar="DIR", type=_folder, help="in files there, not in memory")
    one.add_argument("--host", help="address of this machine that clients reach")
    of_a_model(one)

    one = command("diff", _diff, "say why two instances cannot exchange weights")
    one.add_argument("one", metavar="A", type=_address)
    one.add_argument("other", metavar="B", type=_address)
    of_a_model(one)

    one = command("secret", _secret, "make a file with a new secret, for all instances")
    one.add_argument("file", metavar="FILE", type=Path)

    command("token", _token, "print the bearer token: the first of TOKEN_FILE, else the secret's")

    one = command("certificate", _certificate, "write what belongs to the secret as PEM files")
    one.add_argument("folder", metavar="FOLDER", type=_folder)
    return made


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _where(text: str) -> Name:
    try:
        return parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _folder(text: str) -> Path:
    if os.path.isdir(text):
        return Path(text)
    if os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a file; it must be a folder, or a new one")
    try:
        parse_address(text)
    except ValueError:
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is an address; the last argument is a folder")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number from 1 to 64")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: seconds, more than 0, up to 3600")
    return seconds


def client_config(options: argparse.Namespace) -> NetLoaderConfig:
    """Return with what a command goes to instances: deadlines, and what lets it in.

    Raises:
        ConfigError: the configuration given is wrong.
    """
    if not isinstance(options.config, dict):
        raise ConfigError(f"--config is {options.config!r}; it must be a JSON object")
    # Whoever gives no SOURCE_WAIT wants an answer now.
    return parse_config({"SOURCE_WAIT": 0, **options.config}, "--config")


def _group(options: argparse.Namespace) -> str:
    return DRAFT_GROUP if options.draft else TARGET_GROUP


def _say(options: argparse.Namespace, answer: Any, text: str) -> None:
    if options.json:
        print(msgspec.json.encode(answer).decode(), flush=True)
    else:  # what peers say must not reach the terminal as they say it
        print("\n".join(map(shortened, text.split("\n"))), flush=True)


def _complain(problems: Sequence[Exception]) -> None:
    for problem in problems:
        print(f"netloader: {shortened(one_line(problem))}", file=sys.stderr)


# Commands


def _status(options: argparse.Namespace) -> int:
    config = client_config(options)
    before: dict[str, tuple[float, int]] = {}
    while True:
        addresses, unknown = [], []
        for name in options.where:
            try:
                addresses += addresses_of(name, config.connect_timeout)
            except SourceError as error:
                if not options.watch:
                    raise
                unknown.append(error)  # it may be known a second later
        found, problems = copies.statuses(addresses, config)
        problems = [*unknown, *problems]
        rows = [row for address, status in found.items() for row in _rows(address, status, before)]
        if options.watch and not options.json and sys.stdout.isatty():
            print("\033[H\033[J", end="")
        answer = {
            "ranks": {str(address): status for address, status in found.items()},
            "problems": [str(problem) for problem in problems],
        }
        _say(options, answer, _table(rows))
        _complain(problems)
        if not options.watch:
            serving = [model.state == "serving" for one in found.values() for model in one.models]
            return OK if serving and all(serving) and not problems else NO
        time.sleep(_INTERVAL)


_HEAD = ("ADDRESS", "RANK", "MODEL", "STATE", "BLOCKS", "WEIGHTS", "SESSIONS", "SENT", "RATE")


def _rows(
    address: Address, status: Status, before: dict[str, tuple[float, int]]
) -> list[Sequence[str]]:
    now = time.monotonic()
    then, sent = before.get(status.instance, (now, status.bytes_sent))
    before[status.instance] = now, status.bytes_sent
    speed = rate(max(0, status.bytes_sent - sent), now - then) if now > then else ""
    return [
        (
            str(address),
            str(status.rank),
            model.identity.model + (" (draft)" if model.identity.group == DRAFT_GROUP else ""),
            model.state,
            f"{model.blocks_here}/{model.blocks}",
            model.weights or "",
            f"{status.places_taken}/{status.places}",
            size(status.bytes_sent),
            speed,
        )
        for model in status.models
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [_HEAD, *([one_line(shortened(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _probe(options: argparse.Namespace) -> int:
    config, address = client_config(options), options.address
    status = status_of(address, config)
    model = copies.model_of(address, status, _group(options))
    with connect(address, config) as client:
        description = copies.describe(client, model.identity)
        latency = copies.latency(client, description.digests.weights)
        client.done(api.Done(complete=False, reason=api.LOOKED))
    measured = []
    for connections in options.connections:
        with tqdm(unit="B", unit_scale=True, desc=f"{connections} connections") as bar:
            measured.append(
                copies.measure(
                    address, description, connections, options.seconds, config, bar.update
                )
            )
    lines = [f"{address}: latency {1000 * latency:.2f} ms"]
    for one in measured:
        wrong = f", {one.wrong} blocks wrong" if one.wrong else ", all right"
        lines.append(
            f"{one.connections} connections: {size(one.nbytes)} in {one.seconds:.2f} s "
            f"({rate(one.nbytes, one.seconds)}){wrong}"
        )
        lines += [f"  {failure}" for failure in one.failures]
    _say(options, {"latency_s": latency, "measured": measured}, "\n".join(lines))
    good = all(one.nbytes and not one.wrong and not one.failures for one in measured)
    return OK if good else NO


def _described(
    options: argparse.Namespace, config: NetLoaderConfig
) -> list[tuple[copies.Description, list[Address], str]]:
    """Return what each rank of the instances has, who has it, and this machine's address there."""
    found, problems = copies.statuses(options.addresses, config)
    _complain(problems)
    by_weights: dict[tuple[int, str], list[Address]] = {}
    identities = {}
    for address, status in found.items():
        model = copies.model_of(address, status, _group(options))
        key = model.identity.rank, model.weights or ""
        by_weights.setdefault(key, []).append(address)
        identities[key] = model.identity
    ranks = [rank for rank, _ in by_weights]
    if twice := [rank for rank in ranks if ranks.count(rank) > 1]:
        raise SourceRefused(f"the instances have different weights for rank {twice[0]}")
    described = []
    for key, addresses in sorted(by_weights.items()):
        with connect(addresses[0], config) as client:
            what = copies.describe(client, identities[key])
            client.done(api.Done(complete=False, reason=api.LOOKED))
            described.append((what, addresses, client.local_host))
    if not described:
        raise SourceRefused("no instance answers")
    expected = {rank for what, *_ in described for rank in what.ranks}
    if missing := expected - {what.identity.rank for what, *_ in described}:
        raise SourceRefused(f"ranks {sorted(missing)} of the instance do not answer")
    return described


def _pull(options: argparse.Namespace) -> int:
    config = client_config(options)
    answer = {}
    for what, addresses, _ in _described(options, config):
        path = options.folder / copies.file_name(what.identity)
        copies.pull(addresses, what, path, config, show_progress=not options.json)
        answer[str(path)] = what.digests.weights
    _say(options, answer, "\n".join(f"{path}: {digest}" for path, digest in answer.items()))
    return OK


def _fetch(options: argparse.Namespace) -> int:
    config, group, address = client_config(options), _group(options), options.address
    answer = {}
    options.folder.mkdir(parents=True, exist_ok=True)
    with connect(address, config) as client:
        for file in client.files(group):
            if not model_files.is_allowed(file.name):
                raise ProtocolError(f"{address}: {file.name} is no file beside weights")
            if model_files.is_code(file.name) and not options.remote_code:
                continue
            content = client.file(group, file)
            if model_files.digest_of(content) != file.sha256:
                raise SourceLost(f"{address}: {file.name} came with other bytes than announced")
            part = options.folder / f".{file.name}.part"
            part.write_bytes(content)
            part.replace(options.folder / file.name)
            answer[file.name] = file.sha256
    if "config.json" not in answer:
        raise SourceRefused(f"{address}: has no config.json for clients")
    _say(options, answer, "\n".join(f"{options.folder / name}" for name in answer))
    return OK


def _hold(options: argparse.Namespace) -> int:
    config = client_config(options)
    if bool(options.addresses) == bool(options.checkpoint):
        raise ConfigError("hold needs either ADDRESS... or --checkpoint FOLDER")
    copies.port_of(config, 0)  # before all is pulled
    if options.checkpoint:
        return _hold_checkpoint(options, config)
    held, host = [], options.host or config.announced_host
    for what, addresses, local_host in _described(options, config):
        path = options.folder / copies.file_name(what.identity) if options.folder else None
        store = copies.pull(addresses, what, path, config, show_progress=not options.json)
        if not config.verify and store.hashed_anew().digests != store.digests:
            raise LoadFailed(f"other weights came than {what.digests.weights}")
        view = copies.view_of(store, addresses, config)
        held.append((what, store, view, ", ".join(map(str, addresses))))
        host = host or local_host
    over = _stopped()
    with copies.holding(held, config, host or "") as listening:
        answer = {
            str(address): what.digests.weights
            for address, (what, *_) in zip(listening, held, strict=True)
        }
        lines = [f"{address}: serving {digest}" for address, digest in answer.items()]
        _say(options, answer, "\n".join(lines))
        over.wait()
    return OK


def _hold_checkpoint(options: argparse.Namespace, config: NetLoaderConfig) -> int:
    folder = options.checkpoint.resolve()
    identity = checkpoint.identity_of(folder, config.model, _group(options))
    host = options.host or config.announced_host or own_host()
    next_check = 0.0

    def progress(found: checkpoint.Checkpoint, nbytes: int) -> None:
        nonlocal next_check
        bar.total = found.nbytes
        bar.update(nbytes)
        if time.monotonic() >= next_check:
            found.check()
            next_check = time.monotonic() + _LOOK

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(unit="B", unit_scale=True, desc="reading", disable=options.json)
        )
        address, weights, found = stack.enter_context(
            copies.holding_checkpoint(folder, identity, config, host, progress)
        )
        bar.close()
        over = _stopped()
        _say(options, {str(address): weights}, f"{address}: serving {weights}")
        while not over.wait(_LOOK):
            found.check()
    return OK


def _stopped() -> threading.Event:
    """Return what is set once the command is to end."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    return over


def _diff(options: argparse.Namespace) -> int:
    config, group = client_config(options), _group(options)
    sides = [options.one, options.other]
    models = [copies.model_of(one, status_of(one, config), group) for one in sides]
    here, there = models
    differences = [
        f"{one.field} is {one.client} at {sides[0]} and {one.source} at {sides[1]}"
        for one in api.differences(here.identity, there.identity)
    ]
    if not differences and here.weights == there.weights:
        _say(options, {"equal": True, "weights": here.weights}, f"equal, digest {here.weights}")
        return OK
    if not differences:
        described = []
        for address, model in zip(sides, models, strict=True):
            with connect(address, config) as client:
                described.append(copies.describe(client, model.identity))
                client.done(api.Done(complete=False, reason=api.LOOKED))
        differences = _differing(sides, *described)
    shown = differences[:_SHOWN]
    more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
    _say(options, {"equal": False, "differences": differences}, "\n".join([*shown, *more]))
    return NO


def _secret(options: argparse.Namespace) -> int:
    _write_new(options.file, f"{secrets.token_hex(32)}\n".encode())
    _say(options, {"file": str(options.file)}, str(options.file))
    return OK


def _token(options: argparse.Namespace) -> int:
    path = client_config(options).token_file
    token = read_secrets("TOKEN_FILE", path)[0] if path else _derived(options).token
    _say(options, {"token": token}, token)
    return OK


def _certificate(options: argparse.Namespace) -> int:
    derived, files = _derived(options), {}
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tls.crt", derived.certificate), ("tls.key", derived.key)):
        _write_new(options.folder / name, content)
        files[name] = str(options.folder / name)
    _say(options, files, "\n".join(files.values()))
    return OK


def _derived(options: argparse.Namespace) -> Derived:
    """Return what belongs to the secret that is presented."""
    path = client_config(options).secret_file
    if path is None:
        raise ConfigError(
            f"no secret: {SECRET_FILE_VARIABLE}, or SECRET_FILE in --config, has to name its file"
        )
    return derived_from(read_secrets("SECRET_FILE", path)[0])


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that nobody else may read, and never in the place of another."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FileExistsError(f"{path} exists already: remove it, or name another") from None
    with open(descriptor, "wb") as file:
        file.write(content)


def _differing(
    sides: Sequence[Address], one: copies.Description, other: copies.Description
) -> list[str]:
    """Return in what two descriptions differ, tensor by tensor."""
    if one.digests.algorithm != other.digests.algorithm:
        algorithms = one.digests.algorithm, other.digests.algorithm
        return [
            f"digests are {kind} at {side}" for side, kind in zip(sides, algorithms, strict=True)
        ]
    found = [
        f"{field} is {ours} at {sides[0]} and {theirs} at {sides[1]}"
        for field in ("layout", "attributes", "meaning")
        if (ours := getattr(one.manifest, field)) != (theirs := getattr(other.manifest, field))
    ]
    entries = [{entry.name: entry for entry in each.manifest.tensors} for each in (one, other)]
    places = [{entry.name: at for at, entry in enumerate(each.entries)} for each in (one, other)]
    for name in dict.fromkeys([*entries[0], *entries[1]]):
        ours, theirs = (each.get(name) for each in entries)
        if ours is None or theirs is None:
            found.append(f"{name} is only at {sides[0] if theirs is None else sides[1]}")
        elif ours != theirs:
            kinds = (f"{each.dtype} {[*each.shape]}" for each in (ours, theirs))
            found.append(f"{name} is {next(kinds)} at {sides[0]} and {next(kinds)} at {sides[1]}")
        elif ours.alias_of is None and _digest(one, places[0][name]) != _digest(
            other, places[1][name]
        ):
            found.append(f"{name} has other values")
    return found


def _digest(what: copies.Description, tensor: int) -> list[bytes]:
    run = what.blocks.blocks_of(tensor)
    return [what.digests.of(block) for block in range(run.first, run.last + 1)]
