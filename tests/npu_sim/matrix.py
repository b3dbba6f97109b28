"""Which models have been run on simulated NPUs, and by which test.

`python -m tests.npu_sim.matrix` prints the table of the guide. docs/check_code.py compares the two,
and tests/ut/test_matrix.py compares this list with the tests that pytest finds. It needs no engine.
"""

from dataclasses import dataclass

SIMULATOR, CLASSES, NOT_RUN = "simulator", "classes, without an engine", "not run"
HEAD = ("Model", "Quantization", "Parallelism", "`INT8_CACHE`", "Run")

_SERVE = "npu_sim/test_serve.py::test_client_and_its_client_say_what_seed_and_cpu_say"
_SECRET = (
    "npu_sim/test_serve.py::"
    "test_with_a_secret_ranks_pull_in_groups_and_then_from_what_outlives_all_instances"
)
_INT8 = "npu_sim/test_serve.py::test_int8_model_in_each_cache_mode_says_what_seed_and_cpu_say"
_MLA = "npu_sim/test_serve.py::test_client_of_mla_and_experts_says_what_seed_and_cpu_say"
_EXPERTS = "npu_sim/test_experts.py::test_each_client_says_what_seed_and_cpu_say"
_STAGES = "npu_sim/test_parallel.py::test_stages_of_a_pipeline_load_from_the_same_stages"
_REPLICAS = "npu_sim/test_parallel.py::test_replicas_of_a_dense_model_load_from_any_of_them"
_SPREAD = "npu_sim/test_parallel.py::test_experts_spread_over_two_engines_come_from_where_they_are"
_CLASSES = "conformance/test_npu_models.py::test_every_tensor_of_a_processed_model_arrives"
_RAW = "conformance/test_npu_models.py::test_with_int8_cache_the_raw_weights_arrive"


@dataclass(frozen=True)
class Row:
    """Instances of one kind, each of which feeds the next.

    Attributes:
        model: its family.
        quantization: of its weights.
        parallelism: of each instance.
        caches: the INT8_CACHE of each instance; nothing if the test leaves it at its default.
        run: how far.
        test: which does it, as pytest names it below tests/; nothing if none does.
    """

    model: str
    quantization: str
    parallelism: str
    caches: tuple[str, ...] = ()
    run: str = NOT_RUN
    test: str = ""

    def cells(self) -> list[str]:
        """Returns its row in the guide's table."""
        caches = " → ".join(f"`{cache}`" for cache in self.caches)
        if not caches:
            caches = "" if self.run == NOT_RUN else "default"
        return [self.model, self.quantization, self.parallelism, caches, self.run]


def _on(test: str, *row: str, caches: tuple[str, ...] = (), run: str = SIMULATOR) -> Row:
    return Row(row[0], row[1], row[2], caches, run, test)


_NO, _NO3, _RAWS = ("no", "no"), ("no", "no", "no"), ("hbm", "dram", "hbm")
_DRAFT, _DYNAMIC = "DeepSeek V3 with MTP draft", "W8A8_DYNAMIC"
ROWS = (
    _on(_SERVE, "Llama", "bf16", "one rank"),
    _on(_SECRET, "Llama", "bf16", "TP 2"),
    _on(f"{_STAGES}[plain]", "Llama", "bf16", "TP 2, PP 2"),
    _on(_REPLICAS, "Llama", "bf16", "DP 2"),
    _on(f"{_INT8}[w8a8-no-no]", "Llama", "W8A8", "one rank", caches=_NO),
    _on(f"{_INT8}[w8a8-hbm-dram-hbm]", "Llama", "W8A8", "one rank", caches=_RAWS),
    _on(f"{_INT8}[w8a8_dynamic-no-no]", "Llama", "W8A8_DYNAMIC", "one rank", caches=_NO),
    _on(f"{_INT8}[w8a8_dynamic-hbm-dram-hbm]", "Llama", "W8A8_DYNAMIC", "one rank", caches=_RAWS),
    _on(_MLA, "DeepSeek V2", "bf16", "one rank", caches=_NO),
    _on(_SPREAD, "DeepSeek V2", "bf16", "DP 2, EP"),
    _on(f"{_EXPERTS}[qwen3_moe-tp2-no-no-no]", "Qwen3-MoE", _DYNAMIC, "TP 2", caches=_NO3),
    _on(
        f"{_EXPERTS}[qwen3_moe-tp2-ep-hbm-dram-hbm]",
        "Qwen3-MoE",
        _DYNAMIC,
        "TP 2, EP",
        caches=_RAWS,
    ),
    _on(f"{_STAGES}[qwen3_moe]", "Qwen3-MoE", _DYNAMIC, "TP 2, PP 2"),
    _on(
        f"{_EXPERTS}[deepseek_v3-draft-overlapped-no-no-no]",
        *(_DRAFT, _DYNAMIC, "one rank"),
        caches=_NO3,
    ),
    _on(
        f"{_EXPERTS}[deepseek_v3-tp2-ep-draft-dram-hbm-dram]",
        *(_DRAFT, _DYNAMIC, "TP 2, EP"),
        caches=("dram", "hbm", "dram"),
    ),
    _on(
        f"{_EXPERTS}[deepseek_w4a8-no-no-no]",
        "DeepSeek V3",
        "W4A8_DYNAMIC",
        "one rank",
        caches=_NO3,
    ),
    Row(
        "linear layers, experts, MLA",
        "W8A8, W8A8_DYNAMIC, W4A8",
        "one rank",
        _NO,
        CLASSES,
        _CLASSES,
    ),
    Row("linear layers, experts", "W8A8, W8A8_DYNAMIC", "one rank", ("hbm",) * 2, CLASSES, _RAW),
    Row("linear layers, experts", "W8A8, W8A8_DYNAMIC", "one rank", ("dram",) * 2, CLASSES, _RAW),
    Row("Llama", "W8A8", "TP 2"),
    Row("Qwen3-MoE", "bf16", "any"),
    Row("Qwen3-MoE", "W8A8_DYNAMIC", "DP 2, EP"),
    Row("DeepSeek V3", "W4A8_DYNAMIC", "TP 2, EP"),
    Row("DeepSeek V3.2 with sparse attention", "any", "any"),
    Row("multimodal", "any", "any"),
    Row("any", "W4A16, W8A16, FP8, MXFP8", "any"),
)


def table() -> list[list[str]]:
    """Returns the rows of the guide's table."""
    return [row.cells() for row in ROWS]


if __name__ == "__main__":
    for cells in (HEAD, ["---"] * len(HEAD), *table()):
        print(f"| {' | '.join(cells)} |")
