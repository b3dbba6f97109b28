"""CPU kernels for the operators that vLLM Ascend calls for a dense model, for MoE and for MLA.

They follow the operators' documented meaning, for the arguments that such a model passes.
"""

import ctypes
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

# A registration lasts as long as its Library.
npu = torch.library.Library("npu", "IMPL")
atb: torch.library.Library
aten: torch.library.Library
custom: torch.library.Library


def op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of CPU tensors as the operator's kernel."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        npu.impl(name, on_cpu(function), "PrivateUse1", allow_override=True)
        return function

    return register


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the kernel for a device's tensors of a function of CPU tensors."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        device = next(x.device for x in leaves if isinstance(x, torch.Tensor))
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.cpu(), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: x.to(device), function(*args, **kwargs))

    return kernel


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


@op("npu_interleave_rope")
def npu_interleave_rope(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary embeddings of neighbours, the first ones of which then come before the second ones."""
    a, b = x[..., ::2].float(), x[..., 1::2].float()
    rotated = torch.cat([a, b], -1) * cos.float() + torch.cat([-b, a], -1) * sin.float()
    return rotated.to(x.dtype)


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
    query_rope: Any = None,
    key_rope: Any = None,
    sparse_mode: int = 0,
    softmax_lse_flag: bool = False,
    **unused: Any,
) -> Any:
    """Causal attention of sequences one after another, their keys and values in blocks or not."""
    assert input_layout == "TND", input_layout
    if query_rope is not None:
        assert block_table is None and sparse_mode == 3, sparse_mode
        query, key = torch.cat([query, query_rope], -1), torch.cat([key, key_rope], -1)
    head_size = query.shape[-1] if block_table is not None else value.shape[-1]
    out = torch.empty(*query.shape[:-1], head_size, dtype=query.dtype)
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
    # MLA asks for the sums in case that a prefill comes in parts, and such a one is not simulated.
    lse = torch.full((*query.shape[:-1], 1), torch.nan) if softmax_lse_flag else torch.zeros(1)
    return out, lse


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


def npu_kv_rmsnorm_rope_cache(
    kv: Any,
    gamma: Any,
    cos: Any,
    sin: Any,
    index: Any,
    k_cache: Any,
    ckv_cache: Any,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    **others: Any,
) -> Any:
    """Norms MLA's latents and rotates its keys, and writes both to their slots."""
    assert cache_mode == "PA" and not others, (cache_mode, others)
    latents, keys = kv.cpu().split([gamma.shape[0], cos.shape[-1]], -1)
    latents, _ = npu_rms_norm(latents, gamma.cpu(), epsilon)
    keys = npu_interleave_rope(keys, cos.cpu(), sin.cpu())
    reshape_and_cache(keys, latents, k_cache, ckv_cache, index)
    return k_cache, ckv_cache, keys.to(kv.device), latents.to(kv.device)


npu.impl("npu_kv_rmsnorm_rope_cache", npu_kv_rmsnorm_rope_cache, "PrivateUse1", allow_override=True)


def latent_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    query_rope: Any,
    key_rope: Any,
    actual_seq_kvlen: Sequence[int],
    block_table: Any,
    num_query_heads: int,
    num_key_value_heads: int,
    softmax_scale: float,
    input_layout: str,
    block_size: int,
    **others: Any,
) -> Any:
    """MLA's attention of one new token per sequence, all heads to the same latents in blocks."""
    assert input_layout == "BNSD_NBSD" and query.shape[2] == 1, (input_layout, query.shape)
    assert num_key_value_heads == 1 and not others, (num_key_value_heads, others)
    queries = torch.cat([query.cpu(), query_rope.cpu()], -1).transpose(1, 2)
    table = block_table.cpu().long()
    out = torch.empty(num_query_heads, len(queries), 1, value.shape[-1], dtype=query.dtype)
    for i, q in enumerate(queries):
        length = int(actual_seq_kvlen[i])
        blocks = table[i, : (length + block_size - 1) // block_size]
        latents, ropes, v = (
            host(x)[blocks].reshape(-1, 1, x.shape[-1])[:length] for x in (key, key_rope, value)
        )
        k = torch.cat([latents, ropes], -1)
        out[:, i] = _attend(q, k, v, num_query_heads, 1, softmax_scale).transpose(0, 1)
    return out.to(query.device), torch.empty(0, device=query.device)


npu.impl("npu_fused_infer_attention_score_v2", latent_attention, "PrivateUse1", allow_override=True)


@op("npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: Any, weight: Any, *, perm_y: Sequence[int], **others: Any
) -> Any:
    """Multiplies matrices by matrices and permutes the dimensions of what comes out."""
    assert not others, others
    y = (input.float() @ weight.float()).to(input.dtype)
    return y.permute(*perm_y).contiguous()


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


# ------------------------------------------------------------------------------------ experts


def moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best experts of each token, and their shares of the softmax over all."""
    assert (k_group, group_count) == (1, 1), (k_group, group_count)
    assert (renorm, norm_type, out_flag) == (0, 0, False), (renorm, norm_type, out_flag)
    assert bias_opt is None
    weights, experts = x.float().softmax(-1).topk(k)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), torch.empty(0)


def npu_moe_init_routing_custom(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    active_expert_range: Sequence[int],
    quant_mode: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of the tokens sorted by expert, the row of each copy, and the rows of each expert.

    Those of experts outside of the range come last, which belongs to no expert.
    """
    assert scale is None and quant_mode == -1, quant_mode
    assert expert_tokens_num_flag and expert_tokens_num_type == 1, expert_tokens_num_type
    assert active_num == expert_idx.numel(), active_num
    first, end = active_expert_range
    assert 0 <= first < end <= expert_num, (active_expert_range, expert_num)
    experts = expert_idx.flatten()
    here = (first <= experts) & (experts < end)
    order = torch.where(here, experts, expert_num).argsort(stable=True)
    copies = x[order // expert_idx.shape[1]]
    counts = (experts[here] - first).bincount(minlength=end - first)
    return copies, order.argsort().int(), counts, torch.empty(0)


@op("npu_grouped_matmul")
def npu_grouped_matmul(
    x: Any,
    weight: Any,
    *,
    group_list: Any,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **others: Any,
) -> Any:
    """Multiplies the rows of each expert by its matrix; those behind belong to none."""
    assert (split_item, group_type, group_list_type) == (2, 0, 1) and not others, others
    [rows], [matrices] = x, weight
    out = rows.new_zeros(len(rows), matrices.shape[-1])
    start = 0
    for matrix, count in zip(matrices, group_list.tolist(), strict=True):
        end = start + count
        out[start:end] = rows[start:end].float() @ matrix.float()
        start = end
    return [out]


@op("npu_moe_token_unpermute")
def npu_moe_token_unpermute(permuted_tokens: Any, sorted_indices: Any, probs: Any) -> Any:
    """Each token's sum of what its experts made of it."""
    rows = permuted_tokens[sorted_indices].view(*probs.shape, -1)
    return (rows.float() * probs.float().unsqueeze(-1)).sum(1).to(rows.dtype)


def install_custom() -> None:
    """Defines those operators of vLLM Ascend's own library, which is not built here."""
    global custom
    custom = torch.library.Library("_C_ascend", "FRAGMENT")
    for kernel in (moe_gating_top_k, npu_moe_init_routing_custom):
        if not hasattr(torch.ops._C_ascend, kernel.__name__):
            schema = torch.library.infer_schema(kernel, mutates_args=())
            custom.define(kernel.__name__ + schema)
            custom.impl(kernel.__name__, on_cpu(kernel), "PrivateUse1")


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
    """Multiplies int8 exactly, then scales unless the result is int32."""
    assert x1.dtype == x2.dtype == torch.int8, (x1.dtype, x2.dtype)
    assert group_sizes is None and scale.dtype != torch.int64
    y = x1.double() @ x2.double()
    if output_dtype in (3, torch.int32):  # the sums as they are, whatever the scale
        assert bias is None and pertoken_scale is None
        return y.to(torch.int32)
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
