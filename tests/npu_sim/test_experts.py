"""Models with experts in the formats that Ascend's users run, as a user of `vllm serve` sees them.

The quantized Qwen3, DeepSeek V3 and its draft of models.py. Each instance feeds the next one, which
has no weight file.
"""

from dataclasses import dataclass

import pytest

from tools.netloader_view import source_list

from .serving import TP2, assert_as_on_cpu

pytestmark = pytest.mark.timeout(900)

TP2_EP = (*TP2, "--enable-expert-parallel")
# vLLM Ascend's check of overlapped shared experts, at the end of their post-processing.
CHECKED = "Shared expert split computation validation passed"
DRAFTING = '--speculative-config={"method": "mtp", "num_speculative_tokens": 1}'
OVERLAPPED = '--additional-config={"multistream_overlap_shared_expert": true}'


@dataclass(frozen=True)
class Chain:
    """Instances of a model, each with an INT8_CACHE of its own."""

    model: str
    caches: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = {TP2[0]: "tp2", TP2_EP[1]: "ep", DRAFTING: "draft", OVERLAPPED: "overlapped"}
        return "-".join([self.model, *(words[each] for each in self.arguments), *self.caches])


# Two ranks cost twice, so that not everything meets everything: each model has each INT8_CACHE, and
# experts divided in both ways. Without a cache the client post-processes an empty model, which is
# where the shared experts that are overlapped are checked.
CHAINS = (
    Chain("qwen3_moe", ("no", "no", "no"), TP2),
    Chain("qwen3_moe", ("hbm", "dram", "hbm"), TP2_EP),
    Chain("deepseek_v3", ("no", "no", "no"), (DRAFTING, OVERLAPPED)),
    Chain("deepseek_v3", ("dram", "hbm", "dram"), (*TP2_EP, DRAFTING)),
    Chain("deepseek_w4a8", ("no", "no", "no")),
)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_each_client_says_what_seed_and_cpu_say(fleet, models, chain):
    model, drafting = models[chain.model], DRAFTING in chain.arguments
    more = {"arguments": chain.arguments}
    source = fleet.start("seed", model, {"INT8_CACHE": chain.caches[0]}, **more).wait()
    said = source.say()
    # Two ranks quantize the halves of what the CPU quantizes as a whole, so that they soon differ.
    assert_as_on_cpu(said, model, 1 if source.ranks > 1 else None)
    accepted = source.accepted()
    assert (accepted > 0) == drafting
    for number, cache in enumerate(chain.caches[1:]):
        config = {"INT8_CACHE": cache, "SOURCE": source_list(source.addresses())}
        client = fleet.start(f"client{number}", model, config, bare=True, **more).wait()
        assert client.say() == said
        assert client.accepted() == accepted
        client.assert_loaded_from(source, models=2 if drafting else 1)
        assert bool(client.server.search_log(CHECKED)) == (OVERLAPPED in chain.arguments)
        source.server.kill()
        source = client
