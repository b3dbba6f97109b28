"""CPU kernels for the operators of torch_npu that a dense vLLM Ascend model calls.

They follow the operators' documented meaning, for the arguments that such a model passes.
"""

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# A registration lasts as long as its Library.
npu = torch.library.Library("npu", "IMPL")
atb: torch.library.Library
aten: torch.library.Library


def op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of CPU tensors as the operator's kernel."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            device = tensors[0].device
            result = function(*map(_to_cpu, args), **{k: _to_cpu(v) for k, v in kwargs.items()})
            if isinstance(result, tuple):
                return tuple(x.to(device) for x in result)
            return result.to(device)

        npu.impl(name, kernel, "PrivateUse1", allow_override=True)
        return function

    return register


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a CPU tensor on the same memory, for operators that write to an argument."""
    torch.npu.current_stream().synchronize()
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    flat = flat[: storage.nbytes() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# ------------------------------------------------------------------------------------ layers


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_size: int, neox: bool
) -> torch.Tensor:
    """Applies rotary embeddings to the first elements of each head; the rest stays."""
    heads = x.float().reshape(len(cos), -1, head_size)
    cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    rest = heads[..., 2 * half :]
    if neox:
        a, b = heads[..., :half], heads[..., half : 2 * half]
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = heads[..., : 2 * half : 2], heads[..., 1 : 2 * half : 2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([rotated, rest], -1).reshape(x.shape).to(x.dtype)


@op("npu_mrope")
def npu_mrope(
    positions: Any,
    query: Any,
    key: Any,
    cos_sin_cache: Any,
    head_size: int,
    mrope_section: Any = None,
    rotary_mode: str = "half",
    cache_mode: str = "default",
) -> Any:
    """Rotary embeddings of text."""
    cos, sin = cos_sin_cache[positions].float().chunk(2, -1)
    return tuple(_rotate(x, cos, sin, head_size, rotary_mode == "half") for x in (query, key))


def rotary_embedding(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox_style: bool
) -> None:
    """Rotary embeddings in place."""
    cos, sin = cos_sin_cache.cpu()[positions.cpu()].float().chunk(2, -1)
    for x in map(host, (query, key)):
        x.copy_(_rotate(x, cos, sin, head_size, is_neox_style))


@op("npu_swiglu")
def npu_swiglu(x: Any, dim: int = -1) -> Any:
    """The gated activation."""
    gate, up = x.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


@op("npu_rms_norm")
def npu_rms_norm(x: Any, gamma: Any, epsilon: float = 1e-6) -> Any:
    """The norm, and the factor that it found."""
    wide = x.float()
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * factor * gamma.float()).to(x.dtype), factor


@op("npu_add_rms_norm")
def npu_add_rms_norm(x1: Any, x2: Any, gamma: Any, epsilon: float = 1e-6) -> Any:
    """The norm of a sum, and the sum."""
    total = x1 + x2
    normed, factor = npu_rms_norm(total, gamma, epsilon)
    return normed, factor, total


@op("npu_top_k_top_p")
def npu_top_k_top_p(logits: Any, p: Any, k: Any) -> Any:
    """Removes the unlikely tokens."""
    values, order = logits.sort(-1)
    if k is not None:
        least = values.gather(1, (values.shape[1] - k.long()).clamp(min=0).unsqueeze(1))
        values = values.masked_fill(values < least, float("-inf"))
    if p is not None:
        out = values.softmax(-1).cumsum(-1) <= 1 - p.unsqueeze(1)
        out[:, -1] = False
        values = values.masked_fill(out, float("-inf"))
    return torch.empty_like(values).scatter_(-1, order, values)


# ------------------------------------------------------------------------------------ attention


def reshape_and_cache(key: Any, value: Any, key_cache: Any, value_cache: Any, slots: Any) -> None:
    """Writes keys and values to their slots; a negative slot is padding."""
    slots = slots.cpu().long()
    real = slots >= 0
    for new, cache in ((key, key_cache), (value, value_cache)):
        rows = host(cache).flatten(0, 1)
        rows[slots[real]] = new.cpu()[: len(slots)][real].reshape(-1, *rows.shape[1:])


def npu_scatter_pa_kv_cache(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, **unused: Any
) -> None:
    """The same, as vLLM Ascend calls it for some models."""
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


npu.impl("npu_scatter_pa_kv_cache", npu_scatter_pa_kv_cache, "PrivateUse1", allow_override=True)


@op("npu_fused_infer_attention_score")
def attention(
    query: Any,
    key: Any,
    value: Any,
    actual_seq_lengths: Any = None,
    actual_seq_lengths_kv: Any = None,
    block_table: Any = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    **unused: Any,
) -> Any:
    """Causal attention of sequences one after another, their keys and values in blocks or not."""
    assert input_layout == "TND", input_layout
    out = torch.empty_like(query)
    start, kv_start = 0, 0
    for i, end in enumerate(actual_seq_lengths):
        end = min(int(end), query.shape[0])
        kv_end = int(actual_seq_lengths_kv[i])
        if block_table is not None:
            blocks = block_table[i][: (kv_end + block_size - 1) // block_size].long()
            k, v = (
                x[blocks].reshape(-1, num_key_value_heads, query.shape[-1])[:kv_end]
                for x in (key, value)
            )
        else:
            k, v = key[kv_start:kv_end], value[kv_start:kv_end]
            kv_start = kv_end
        if end > start and len(k):
            out[start:end] = _attend(query[start:end], k, v, num_heads, num_key_value_heads, scale)
        start = end
    return out, torch.zeros(1)


def _attend(q: Any, k: Any, v: Any, heads: int, kv_heads: int, scale: float) -> Any:
    k, v = (x.float().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def paged_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Any,
    context_lens: Any,
    out: Any,
    workspace: Any = None,
) -> None:
    """Attention of one new token per sequence."""
    result, _ = attention(
        query.cpu(),
        host(key_cache).flatten(2),
        host(value_cache).flatten(2),
        list(range(1, len(query) + 1)),
        context_lens.tolist(),
        block_table.cpu(),
        num_heads,
        scale_value,
        "TND",
        num_kv_heads,
        key_cache.shape[1],
    )
    host(out).copy_(result.view(out.shape))


def install_atb(module: ModuleType) -> None:
    """Registers the operators of torch_npu.op_plugin.atb._atb_ops, which is just imported."""
    global atb
    module._register_atb_extensions()
    atb = torch.library.Library("atb", "IMPL")
    kernels: dict[str, Callable[..., Any]] = {
        "_npu_matmul_add_fp32": lambda x, weight, out: None,  # called to warm up only
        "_npu_paged_attention": paged_attention,
        "_npu_paged_attention_get_workspace": lambda query, *args, **kwargs: torch.empty(
            1, device=query.device
        ),
        "_npu_reshape_and_cache": reshape_and_cache,
        "_npu_rotary_embedding": rotary_embedding,
    }
    for name, kernel in kernels.items():
        atb.impl(name, kernel, "PrivateUse1", allow_override=True)


class SlotMapping:
    """Stands in for the Triton kernel that finds each token's slot in the cache."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """Returns the kernel for a grid of one program per sequence, and one that pads."""

        def run(
            num_tokens: int,
            max_tokens: int,
            query_start_loc: Any,
            positions: Any,
            block_table: Any,
            stride: int,
            block_size: int,
            out: Any,
            PAD_ID: int = -1,
            **unused: Any,
        ) -> None:
            starts, places = query_start_loc.cpu().tolist(), positions.cpu().tolist()
            blocks = block_table.cpu()
            slots = [PAD_ID] * out.shape[0]
            for sequence in range(grid[0] - 1):
                for token in range(starts[sequence], starts[sequence + 1]):
                    block, offset = divmod(places[token], block_size)
                    slots[token] = int(blocks[sequence, block]) * block_size + offset
            out.copy_(torch.tensor(slots, dtype=out.dtype))

        return run


# ------------------------------------------------------------------------------------ W8A8


@op("npu_dynamic_quant")
def npu_dynamic_quant(
    input: Any,
    smooth_scales: Any = None,
    group_index: Any = None,
    dst_type: Any = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> Any:
    """Quantizes each token by its own scale."""
    assert dst_type in (None, 1, torch.int8), dst_type
    assert group_index is None and quant_mode == "pertoken", quant_mode
    x = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    scale = x.abs().amax(-1) / 127
    quantized = (x / scale.clamp(min=1e-30).unsqueeze(-1)).round().clamp(-128, 127)
    return quantized.to(torch.int8), scale


@op("npu_quantize")
def npu_quantize(
    self: Any, scales: Any, zero_points: Any, dtype: Any, axis: int = 1, div_mode: bool = True
) -> Any:
    """Quantizes by scales from the checkpoint."""
    x = self.float() / scales.float() if div_mode else self.float() * scales.float()
    if zero_points is not None:
        x = x + zero_points.float()
    return x.round().clamp(-128, 127).to(torch.int8)


# Numbers of c10::ScalarType.
SCALAR_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    15: torch.bfloat16,
}


@op("npu_quant_matmul")
def npu_quant_matmul(
    x1: Any,
    x2: Any,
    scale: Any,
    offset: Any = None,
    pertoken_scale: Any = None,
    bias: Any = None,
    output_dtype: Any = None,
    group_sizes: Any = None,
    **unused: Any,
) -> Any:
    """Multiplies int8 exactly, then scales."""
    assert x1.dtype == x2.dtype == torch.int8, (x1.dtype, x2.dtype)
    assert group_sizes is None and scale.dtype != torch.int64
    y = x1.double() @ x2.double()
    if bias is not None and bias.dtype == torch.int32:
        y = y + bias.double()
    y = y.float() * scale.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale.float().unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    if not isinstance(output_dtype, torch.dtype):
        output_dtype = SCALAR_TYPES[1 if output_dtype is None else output_dtype]
    return y.to(output_dtype)


# ------------------------------------------------------------------------------------ sampling

_generators: dict[int, tuple[torch.Generator, torch.Generator]] = {}


def exponential_(self: Any, lambd: float = 1.0, *, generator: Any = None) -> Any:
    """Draws on the CPU, as the general CPU fallback cannot take a generator of the device."""
    if generator is not None and generator.device.type != "cpu":
        known = _generators.get(id(generator))
        if known is None or known[0] is not generator:
            known = (generator, torch.Generator().manual_seed(generator.initial_seed()))
            _generators[id(generator)] = known
        generator = known[1]
    drawn = torch.empty(self.shape, dtype=self.dtype).exponential_(lambd, generator=generator)
    return self.copy_(drawn)


def install_aten() -> None:
    """Registers what must replace a kernel of the general CPU fallback, after that is loaded."""
    global aten
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("exponential_", exponential_, "PrivateUse1", allow_override=True)
