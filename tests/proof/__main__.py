"""Proves, model by model, that weights from a peer are those of the peer; prints a table.

``python -m tests.proof [NAME ...]``: for each row three instances run in this process. Two have
loaded models with other weights from disk. The third has no weight files: its weights are filled
with random bytes, it loads from the first, and is compared with it: every parameter, buffer and
derived tensor, the raw tensors that both offer, the outputs of linear layers, and answers. Then it
reloads from the second and is compared with that, or the reload is refused and nothing has changed.
On simulated NPUs (tests/npu_sim) the first then reloads from the disk of the second, and is
compared with it.
"""

import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}

import torch
import vllm
from torch import nn
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import destroy_model_parallel
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import rotary_embedding
from vllm.platforms import current_platform

from tests.e2e.loading import assert_same, freeze, load, make_config, reload_from, store_of
from tools.make_model import copy_without_weights
from vllm_ascend.model_loader.netloader import netloader
from vllm_ascend.model_loader.netloader.errors import NetLoaderError

from . import npu_rows
from .models import ADAPTER
from .rows import ROWS, Row

PROMPTS = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [11, 200, 31, 42, 400]}]
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)


class Engine:
    """An instance with an engine, which answers."""

    def __init__(self, row: Row, path: Path, **config: Any) -> None:
        self._ask = row.ask
        rotary_embedding._ROPE_DICT.clear()  # what models of one process would share
        self._adapter = None
        if row.engine.get("enable_lora"):
            self._adapter = LoRARequest("adapter", 1, str(path.parent / ADAPTER))
        self._llm = LLM(
            str(path),
            load_format="netloader",
            model_loader_extra_config=config,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=128,
            max_num_batched_tokens=128,
            max_num_seqs=4,
            kv_cache_memory_bytes=16 << 20,
            num_gpu_blocks_override=16,  # vLLM 0.27 takes whole GiB otherwise
            enable_prefix_caching=False,
            skip_tokenizer_init=row.ask == "generate",
            use_tqdm_on_load=False,
            **row.engine,
        )
        [self.model] = self._llm.apply_model(_itself)

    def answer(self) -> list[Any]:
        """Return tokens with their log probabilities, or vectors, or scores."""
        if self._ask == "generate":
            plain = self._generate(None)
            if self._adapter is None:
                return plain
            adapted = self._generate(self._adapter)
            assert adapted != plain, "the adapter makes no difference"
            return plain + adapted
        found = self._llm.encode(PROMPTS, pooling_task=self._ask, use_tqdm=False)
        return [one.outputs.data.tolist() for one in found]

    def _generate(self, adapter: LoRARequest | None) -> list[Any]:
        done = self._llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=adapter)
        found = [one.outputs[0] for one in done]
        return [(list(one.token_ids), one.cumulative_logprob) for one in found]

    def reload(self, address: str) -> None:
        """Reload from another source by vLLM's own `reload_weights`."""
        config = self._llm.llm_engine.vllm_config.load_config.model_loader_extra_config
        config["SOURCE"] = sources(address)
        self._llm.collective_rpc(_reload)

    def reload_from_disk(self, path: Path) -> None:
        """Reload from another folder by vLLM's own `reload_weights`."""
        self._llm.collective_rpc(_reload, kwargs={"weights_path": str(path)})


class Loaded:
    """A model without an engine, where the CPU cannot run it."""

    def __init__(self, row: Row, path: Path, **config: Any) -> None:
        self._config = make_config(path, engine=row.engine, **config)
        self.model = load(self._config)

    def answer(self) -> list[Any]:
        """Return nothing."""
        return []

    def reload(self, address: str) -> None:
        """Reload from another source by the loader's own `load_weights`."""
        reload_from(self._config, self.model, address)

    def reload_from_disk(self, path: Path) -> None:
        """Not needed yet."""
        raise NotImplementedError


def _itself(model: nn.Module) -> nn.Module:
    return model


def _reload(worker: Any, **how: Any) -> None:
    # vLLM Ascend's worker has no such method; its model runner has inherited vLLM's.
    one = worker if hasattr(worker, "reload_weights") else worker.model_runner
    with set_current_vllm_config(worker.vllm_config):
        one.reload_weights(**how)


def sources(address: str) -> list[dict[str, Any]]:
    """Return SOURCE for one source."""
    return [{"device_id": 0, "sources": [address]}]


@contextmanager
def randomized() -> Iterator[None]:
    """Fill all weights with random bytes before they come from a peer."""
    pull = netloader.elastic_load

    def randomize(tensors: Any, required: Any, *arguments: Any, **options: Any) -> Any:
        for name in required:
            tensor = tensors[name]
            noise = torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8)
            if tensor.numel():
                tensor.detach().copy_(noise.view(tensor.dtype).view(tensor.shape))
        return pull(tensors, required, *arguments, **options)

    netloader.elastic_load = randomize
    try:
        yield
    finally:
        netloader.elastic_load = pull


def compare(one: Any, other: Any, answers: list[Any]) -> None:
    """Assert that two instances have the same tensors, offer the same and answer the same."""
    assert_same(one.model, other.model)
    ours, theirs = store_of(one.model), store_of(other.model)
    assert ours.manifest.tensors == theirs.manifest.tensors
    assert ours.digests == theirs.digests == theirs.hashed_anew().digests
    assert other.answer() == answers, "the answers differ"


def prove(row: Row, folder: Path) -> str:
    """Return what a row's reload has come to.

    Raises:
        AssertionError: something differs that must not.
    """
    instance = Engine if row.ask else Loaded
    paths = [folder / "a", folder / "b"]
    for seed, path in enumerate(paths):
        row.make(path, seed)
    copy_without_weights(paths[0], folder / "bare")
    config = {"MODEL": "m", "LISTEN_HOST": "127.0.0.1", "FALLBACK": False, **row.config}
    served, addresses = [], []
    for path in paths:
        served.append(instance(row, path, **config, OUTPUT_PREFIX=f"{path}-"))
        addresses.append(Path(f"{path}-0.txt").read_text())
    said = [one.answer() for one in served]
    assert not said[0] or said[0] != said[1], "the answers do not tell the weights apart"
    with randomized():
        client = instance(
            row,
            folder / "bare",
            **config,
            OUTPUT_PREFIX=f"{folder}/client-",
            SOURCE=sources(addresses[0]),
        )
    compare(served[0], client, said[0])
    reloaded = "equal"
    try:
        with randomized():
            client.reload(addresses[1])
    except NetLoaderError as error:
        compare(served[0], client, said[0])
        assert row.reload, f"the reload was refused: {error}"
        assert row.reload in str(error), f"the reload was refused for another reason: {error}"
        reloaded = f"refused: {error}"
    else:
        compare(served[1], client, said[1])
    if row.from_disk:
        served[0].reload_from_disk(paths[1])
        compare(served[1], served[0], said[1])
        reloaded += "; from disk: equal"
    return reloaded


def prove_and_print(row: Row) -> bool:
    """Print the line of a row; return whether it ended as it should."""
    started = time.monotonic()
    proved = True
    if row.lacks:
        loaded, reloaded = "-", row.lacks
    else:
        with tempfile.TemporaryDirectory() as folder:
            try:
                loaded, reloaded = "equal", prove(row, Path(folder))
            except Exception as error:
                traceback.print_exc()
                proved = False
                loaded, reloaded = "FAILED", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    reloaded = " ".join(reloaded.split())
    print(
        f"| {row.name:16} | {seconds:5.1f} | {row.ask or 'none':8} | {loaded:6} | {reloaded} |",
        flush=True,
    )
    return proved


def in_its_place(row: Row) -> bool:
    """Prove a row, and tidy up after it."""
    proved = prove_and_print(row)
    gc.collect()
    gc.freeze()  # what engines import when they are made, too
    destroy_model_parallel()  # which groups there are depends on the model
    return proved


def apart(row: Row) -> bool:
    """Prove a row in a process of its own: what vLLM Ascend keeps in one is for one model only."""
    child = os.fork()
    if not child:
        os._exit(0 if prove_and_print(row) else 1)
    return os.waitpid(child, 0)[1] == 0


def main(names: list[str]) -> int:
    """Run the rows of these names, or all, and print a table."""
    freeze()
    on_npus = current_platform.device_type == "npu"
    print(f"vLLM {vllm.__version__}", flush=True)
    print(f"| {'model':16} | {'s':>5} | {'answers':8} | load   | reload in place |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    rows = [row for row in (npu_rows.ROWS if on_npus else ROWS) if row.name in names or not names]
    proved = [*map(apart if on_npus else in_its_place, rows)]
    return 0 if all(proved) else 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # engines that are taken down while Python ends raise all kinds of errors
