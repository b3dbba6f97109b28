"""Loads of instances that are cut in another way than their source, beside those of equal ones.

Two parts. One loads a real model in processes like vLLM's workers, without engines, over loopback:
instances of one and of two ranks, each from a source of either size. The other makes models in the
shapes of large ones, in memory that is never touched, and has them load tensors without values:
that is what a client does before it knows what to fetch.
"""

import contextlib
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.e2e.loading import make_config, worker
from tests.e2e.ranks import Pair
from tools.make_model import copy_without_weights, make_model
from tools.netloader_view import read_address, source_list
from vllm_ascend.model_loader.netloader.executor.view.fetch import find
from vllm_ascend.model_loader.netloader.executor.view.records import Seen, decode, encode
from vllm_ascend.model_loader.netloader.loading.view import needs_of

SIZE = "medium"  # half a GB
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CLIENT = {"MODEL": "bench", "FALLBACK": False, "LISTEN_PORT": 0}
_LOADED = re.compile(r"loaded \d+ tensors, ([\d.]+) ([MG])B in ([\d.]+) s")
_MB = {"M": 1.0, "G": 1e3}
Tensors = Iterator[tuple[str, tuple[int, ...]]]


def measure(rounds: int) -> dict[str, Any]:
    """Return the figures of the JSON object."""
    with tempfile.TemporaryDirectory(prefix="netloader-bench-") as folder:
        return {"loads": loads(rounds, Path(folder)), "plans": plans(Path(folder))}


# Loads


def loads(rounds: int, folder: Path) -> dict[str, Any]:
    """Load with one and two ranks from one and two ranks, and return what each pair came to.

    All processes share the cores, so torch has one thread in each: more would wait actively.

    Returns:
        `2_to_1` and so on -> `mb`: what all ranks fetched; `needed`: how many times what they
        need that is; `s`: the median of the seconds until the last rank had it; `of_equal`: how
        many times as fast that was as from a source of the client's own size.
    """
    full, bare = folder / "model", folder / "bare"
    make_model(full, "llama", SIZE)
    copy_without_weights(full, bare)
    took: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        pairs = {name: folder / name for name in ("sources", "clients")}
        for place in (*pairs.values(), folder / "single"):
            place.mkdir()
        sources, clients = (Pair(place, **ONE_THREAD) for place in pairs.values())
        stack.callback(sources.kill)
        stack.callback(clients.kill)
        single = Single(folder / "single")
        stack.callback(single.kill)
        two = sources.load(full, MODEL="bench", tp=2)
        assert two.errors == ["", ""], two.errors
        single.load({"path": str(full), "MODEL": "bench", "OUTPUT_PREFIX": f"{folder}/one-"})
        one = read_address(folder / "one-")
        to_one = {
            "1_to_1": source_list({0: [one]}),
            "2_to_1": source_list({0: [two.address(0)]}),
        }
        to_two = {
            "2_to_2": source_list({rank: [two.address(rank)] for rank in (0, 1)}),
            "1_to_2": source_list({rank: [one] for rank in (0, 1)}),
        }
        taker = Single(folder / "taker")
        stack.callback(taker.kill)
        for turn in range(rounds + 1):
            for key, source in to_one.items():
                lines = taker.load({"path": str(bare), "SOURCE": source, **CLIENT})
                took[key].append(_sum(lines, 1))
            for key, source in to_two.items():
                order = {"name": "again", "path": str(bare), "tp": 2, "SOURCE": source, **CLIENT}
                outcome = clients.do(order)
                assert outcome.errors == ["", ""], outcome.errors
                took[key].append(_sum(outcome.lines, 2))
            if not turn:
                took.clear()  # the first round warms up
    medians = {key: statistics.median(s for _, s in each) for key, each in took.items()}
    return {
        key: {
            "mb": took[key][0][0],
            "needed": took[key][0][0] / took[equal][0][0],
            "s": medians[key],
            "of_equal": medians[equal] / medians[key],
        }
        for equal, keys in (("1_to_1", to_one), ("2_to_2", to_two))
        for key in keys
    }


class Single:
    """A process that loads models of one rank and keeps them.

    Args:
        log: file for what it says.
    """

    def __init__(self, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.hub_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.with_suffix(".log").open("w"),
            env=os.environ | ONE_THREAD,
            text=True,
        )

    def load(self, order: dict[str, Any]) -> list[str]:
        """Load a model and return what NetLoader logged."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        lines: list[str] = answer["lines"]
        return lines

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _sum(lines: Sequence[str], ranks: int) -> tuple[float, float]:
    """Return the MB that all ranks have loaded, and the seconds of the slowest."""
    found = [match for line in lines if (match := _LOADED.search(line))]
    assert len(found) == ranks, lines
    megabytes = sum(float(match[1]) * _MB[match[2]] for match in found)
    return megabytes, max(float(match[3]) for match in found)


# Plans


def plans(folder: Path) -> dict[str, Any]:
    """Trace and plan models in the shapes of large ones, all of each on one rank.

    Returns:
        Model -> `names` in its checkpoint; `records_mb`: MB of the records; and seconds of one
        core: `alone_s` of vLLM's own load of tensors without values into a model without memory,
        `trace_s` of such a load that is watched, `decode_s` of looking at the records of a source
        of one rank, and `plan_s` of finding there what is needed.
    """
    figures = {}
    for name, (config, shapes) in LARGE.items():
        place = folder / name
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(place)
        vllm_config = make_config(place, load_format="auto", engine={"skip_tokenizer_init": True})
        dtype = vllm_config.model_config.dtype
        seen = [Seen(tensor, "bfloat16", shape) for tensor, shape in shapes(config)]
        models = {}
        for device in ("meta", "cpu"):
            # Anew each time, as layers register their names.
            own = copy.deepcopy(vllm_config)
            with worker(own), set_default_torch_dtype(dtype), torch.device(device):
                models[device] = initialize_model(vllm_config=own, model_config=own.model_config)
        empty = [(one.name, torch.empty(one.shape, dtype=dtype, device="meta")) for one in seen]
        begun = time.thread_time()
        models["meta"].load_weights(iter(empty))
        alone = time.thread_time()
        needs = needs_of(models["cpu"], models["cpu"].load_weights, seen)
        traced = time.thread_time()
        data = encode(needs)
        encoded = time.thread_time()
        there = decode(data)
        decoded = time.thread_time()
        _, missing = find(needs, [there], 0)
        planned = time.thread_time()
        assert not missing, missing[0]
        figures[name] = {
            "names": len(seen),
            "alone_s": alone - begun,
            "trace_s": traced - alone,
            "decode_s": decoded - encoded,
            "plan_s": planned - decoded,
            "records_mb": len(data) / 1e6,
        }
    return figures


def _outside(config: Any) -> Tensors:
    wide = (config.vocab_size, config.hidden_size)
    yield from (("model.embed_tokens.weight", wide), ("lm_head.weight", wide))
    yield "model.norm.weight", (config.hidden_size,)


def _norms(config: Any, at: str) -> Tensors:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{norm}.weight", (config.hidden_size,)


def _attention(config: Any, at: str) -> Tensors:
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
    yield f"{at}.self_attn.o_proj.weight", (hidden, queries)


def _latent(config: Any, at: str) -> Tensors:
    hidden, heads = config.hidden_size, config.num_attention_heads
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    queries, keys = config.q_lora_rank, config.kv_lora_rank
    yield from {
        f"{at}.self_attn.q_a_proj.weight": (queries, hidden),
        f"{at}.self_attn.q_a_layernorm.weight": (queries,),
        f"{at}.self_attn.q_b_proj.weight": (heads * (nope + rope), queries),
        f"{at}.self_attn.kv_a_proj_with_mqa.weight": (keys + rope, hidden),
        f"{at}.self_attn.kv_a_layernorm.weight": (keys,),
        f"{at}.self_attn.kv_b_proj.weight": (heads * (nope + value), keys),
        f"{at}.self_attn.o_proj.weight": (hidden, heads * value),
    }.items()


def _mlp(hidden: int, inner: int, at: str) -> Tensors:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def _experts(config: Any, count: int, at: str) -> Tensors:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    yield f"{at}.gate.weight", (count, hidden)
    for expert in range(count):
        yield from _mlp(hidden, inner, f"{at}.experts.{expert}")


def _llama(config: Any) -> Tensors:
    yield from _outside(config)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield from _norms(config, at)
        yield from _attention(config, at)
        yield from _mlp(config.hidden_size, config.intermediate_size, f"{at}.mlp")


def _qwen3_moe(config: Any) -> Tensors:
    yield from _outside(config)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield from _norms(config, at)
        yield from _attention(config, at)
        for norm in "qk":
            yield f"{at}.self_attn.{norm}_norm.weight", (config.head_dim,)
        yield from _experts(config, config.num_experts, f"{at}.mlp")


def _deepseek_v3(config: Any) -> Tensors:
    yield from _outside(config)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield from _norms(config, at)
        yield from _latent(config, at)
        if layer < config.first_k_dense_replace:
            yield from _mlp(config.hidden_size, config.intermediate_size, f"{at}.mlp")
            continue
        count = config.n_routed_experts
        yield from _experts(config, count, f"{at}.mlp")
        yield f"{at}.mlp.gate.e_score_correction_bias", (count,)
        shared = f"{at}.mlp.shared_experts"
        yield from _mlp(config.hidden_size, config.moe_intermediate_size, shared)


LARGE: dict[str, tuple[Any, Any]] = {
    "Llama-70B": (
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
        ),
        _llama,
    ),
    "Qwen3-30B-A3B": (
        transformers.Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        _qwen3_moe,
    ),
    # The defaults are those of the model itself, but for this one.
    "DeepSeek-V3": (transformers.DeepseekV3Config(topk_method="noaux_tc"), _deepseek_v3),
}


def show(figures: dict[str, Any]) -> None:
    """Print what was measured."""
    print("\nloads over loopback of instances cut in one way from sources cut in another")
    print(f"{'ranks':20} {'MB':>8} {'of needed':>10} {'s':>7} {'of equal':>9}")
    for key, one in figures["loads"].items():
        name = key.replace("_", " ")
        print(
            f"  {name:18} {one['mb']:8.1f} {one['needed']:10.2f} {one['s']:7.2f} "
            f"{one['of_equal']:9.2f}"
        )
    print("\nseconds of one core until a client knows what to fetch")
    print(
        f"{'model':20} {'names':>8} {'vLLM alone':>11} {'traced':>7} {'decoded':>8} {'plan':>6} "
        f"{'records':>10}"
    )
    for name, one in figures["plans"].items():
        print(
            f"  {name:18} {one['names']:8} {one['alone_s']:11.2f} {one['trace_s']:7.2f} "
            f"{one['decode_s']:8.2f} {one['plan_s']:6.2f} {one['records_mb']:7.2f} MB"
        )
