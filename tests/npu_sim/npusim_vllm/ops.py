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


def npu_fused_infer_attention_score(
    query: Any, key: Any, value: Any, *, block_table: Any = None, **more: Any
) -> Any:
    """Reads a cache where it is, as copying all of it takes longer than the rest."""
    if block_table is not None:
        key, value = host(key), host(value)
    return on_cpu(attention)(query, key, value, block_table=block_table, **more)


npu.impl(
    "npu_fused_infer_attention_score",
    npu_fused_infer_attention_score,
    "PrivateUse1",
    allow_override=True,
)


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
    actual_seq_qlen: Sequence[int] | None = None,
    atten_mask: Any = None,
    sparse_mode: int = 0,
    **others: Any,
) -> Any:
    """MLA's attention of the last tokens of each sequence, all heads to the same latents in blocks.

    Without a draft there is one such token per sequence.
    """
    assert num_key_value_heads == 1 and not others, (num_key_value_heads, others)
    queries = torch.cat([query.cpu(), query_rope.cpu()], -1)
    if input_layout == "BNSD_NBSD":
        assert queries.shape[2] == 1 and sparse_mode == 0, (queries.shape, sparse_mode)
        queries, ends = queries.squeeze(2), range(1, len(queries) + 1)
    else:
        assert input_layout == "TND_NTD" and sparse_mode == 3, (input_layout, sparse_mode)
        assert actual_seq_qlen is not None
        ends = actual_seq_qlen
    table = block_table.cpu().long()
    out = torch.zeros(num_query_heads, len(queries), value.shape[-1], dtype=query.dtype)
    start = 0
    for i, end in enumerate(ends):
        end, length = min(int(end), len(queries)), int(actual_seq_kvlen[i])
        blocks = table[i, : (length + block_size - 1) // block_size]
        latents, ropes, v = (
            host(x)[blocks].reshape(-1, 1, x.shape[-1])[:length] for x in (key, key_rope, value)
        )
        k = torch.cat([latents, ropes], -1)
        if end > start and length:
            attended = _attend(queries[start:end], k, v, num_query_heads, 1, softmax_scale)
            out[:, start:end] = attended.transpose(0, 1)
        start = end
    if input_layout == "BNSD_NBSD":
        out = out.unsqueeze(2)
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
    """The best experts of each token in its best groups of them, and what each contributes.

    That is a share of the softmax over all, or the sigmoid. A bias counts for the choice only.
    """
    assert (group_select_mode, out_flag) == (1, False), (group_select_mode, out_flag)
    assert norm_type in (0, 1), norm_type
    scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    choice = scores if bias_opt is None else scores + bias_opt.float()
    if k_group < group_count:
        groups = choice.view(len(x), group_count, -1)
        best = groups.topk(2)[0].sum(-1).topk(k_group)[1]
        out = torch.ones(groups.shape[:2], dtype=torch.bool).scatter_(1, best, value=False)
        choice = groups.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(1)
    experts = choice.topk(k)[1]
    weights = scores.gather(1, experts)
    if norm_type or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
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

    Tokens of experts outside of the range have no copy, and -1 as row; what a device leaves in the
    rows behind is not known, here it is zero. Each copy is quantized by its own scale if asked for.
    """
    assert scale is None and quant_mode in (-1, 1), quant_mode
    assert expert_tokens_num_flag and expert_tokens_num_type == 1, expert_tokens_num_type
    assert active_num == expert_idx.numel(), active_num
    first, end = active_expert_range
    assert 0 <= first < end <= expert_num, (active_expert_range, expert_num)
    experts = expert_idx.flatten()
    here = (experts >= first) & (experts < end)
    order = torch.where(here, experts, expert_num).argsort(stable=True)[: int(here.sum())]
    copies = x.new_zeros(len(experts), x.shape[1])
    copies[: len(order)] = x[order // expert_idx.shape[1]]
    rows = torch.full_like(experts, -1, dtype=torch.int32)
    rows[order] = torch.arange(len(order), dtype=torch.int32)
    counts = (experts[here] - first).bincount(minlength=end - first)
    if quant_mode == -1:
        return copies, rows, counts, torch.empty(0)
    quantized, scales = quantized_by_row(copies)
    return quantized, rows, counts, scales


def npu_grouped_matmul(
    x: Any,
    weight: Any,
    *,
    group_list: Any,
    bias: Any = None,
    scale: Any = None,
    per_token_scale: Any = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    output_dtype: Any = None,
    **others: Any,
) -> Any:
    """Multiplies the rows of each expert by its matrix, int8 by int8 or int4 exactly.

    Rows that belong to no expert come out as zero; a device leaves them as they are.
    """
    assert (split_item, group_type) in ((2, 0), (3, 0)) and not others, (split_item, others)
    [rows], [matrices] = x, weight
    int4 = matrices.dtype == torch.int32
    matrices = unpacked_int4(matrices) if int4 else matrices.cpu()
    counts = group_list.cpu()
    if group_list_type == 0:
        counts = counts.diff(prepend=counts.new_zeros(1))
    products = _products(rows.cpu(), matrices, counts, shifted=8 if int4 else 0)
    if scale is not None:
        factors = [scale[0].cpu(), None if bias is None else bias[0].cpu()]
        products = _dequantized(products, counts, *factors)
    if per_token_scale is not None:
        products = products * per_token_scale[0].cpu().float().unsqueeze(-1)
    if not isinstance(output_dtype, torch.dtype):
        output_dtype = rows.dtype if output_dtype is None else SCALAR_TYPES[output_dtype]
    return [products.to(output_dtype).to(rows.device)]


npu.impl("npu_grouped_matmul", npu_grouped_matmul, "PrivateUse1", allow_override=True)


def _products(
    rows: torch.Tensor, matrices: torch.Tensor, counts: torch.Tensor, shifted: int = 0
) -> torch.Tensor:
    """Returns the rows of each expert times its matrix: float32 sums, or exact ones as float64."""
    wide = torch.float64 if rows.dtype == torch.int8 else torch.float32
    out = torch.zeros(len(rows), matrices.shape[-1], dtype=wide)
    start = 0
    for matrix, count in zip(matrices, counts.tolist(), strict=True):
        end = start + count
        out[start:end] = (rows[start:end].to(wide) - shifted) @ matrix.to(wide)
        start = end
    return out


def _dequantized(
    products: torch.Tensor, counts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns sums of integers times the scale of each column, plus what belongs to that scale."""
    if scale.dtype == torch.int64:  # a float in the lower half
        scale = scale.to(torch.int32).view(torch.float32)
    experts = torch.arange(len(counts)).repeat_interleave(counts)
    out = torch.zeros(products.shape)
    of_row = scale.float().view(len(counts), -1)[experts]
    out[: len(experts)] = products[: len(experts)].float() * of_row
    if bias is not None:
        out[: len(experts)] += bias.float().view(len(counts), -1)[experts]
    return out


def unpacked_int4(packed: torch.Tensor) -> torch.Tensor:
    """Returns int4 of which each int32 on a device has eight, as int8 on the CPU.

    The device has int8 in FRACTAL_NZ, of which the int32 is a view.
    """
    pairs = packed.view(torch.int8).cpu()
    low, high = pairs << 4 >> 4, pairs >> 4
    return torch.stack([low, high], -1).flatten(-2)


def grouped_matmul_swiglu_quant_weight_nz(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiplies the rows of each expert by its matrix, and gates and quantizes what comes out."""
    assert bias is None and not swiglu_limit, (bias, swiglu_limit)
    counts = group_list.diff(prepend=group_list.new_zeros(1))
    sums = _dequantized(_products(x, weight, counts), counts, weight_scale, None)
    return *gated_and_quantized(sums * x_scale.unsqueeze(-1)), torch.empty(0)


def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor,
    activation_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and quantizes a product of int8, of whose columns the left half is the gate.

    CANN documents `swiglu_mode` 1 for columns that alternate. vLLM Ascend's own kernel gets it for
    those of shared experts, which do not, and what else it means there is not known.
    """
    assert bias is None and quant_scale is None and quant_offset is None
    assert group_index is None or group_index.tolist() == [len(x)], group_index
    assert (activate_left, quant_mode, clamp_limit) == (True, 1, 0.0), (activate_left, quant_mode)
    sums = x.float() * weight_scale.float() * activation_scale.float().view(-1, 1)
    return gated_and_quantized(sums)


def gated_and_quantized(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns SiLU of the left half times the right half as int8, and the scale of each row."""
    return quantized_by_row(npu_swiglu(sums))


@op("npu_moe_token_unpermute")
def npu_moe_token_unpermute(permuted_tokens: Any, sorted_indices: Any, probs: Any) -> Any:
    """Each token's sum of what its experts made of it; -1 stands for none."""
    here = (sorted_indices >= 0).view(*probs.shape, 1)
    rows = permuted_tokens[sorted_indices.clamp(min=0)].view(*probs.shape, -1).float()
    return (rows * probs.float().unsqueeze(-1) * here).sum(1).to(permuted_tokens.dtype)


def install_custom() -> None:
    """Defines those operators of vLLM Ascend's own library, which is not built here."""
    global custom
    custom = torch.library.Library("_C_ascend", "FRAGMENT")
    for kernel in (
        grouped_matmul_swiglu_quant_weight_nz,
        moe_gating_top_k,
        npu_dequant_swiglu_quant,
        npu_moe_init_routing_custom,
    ):
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
    return quantized_by_row(input if smooth_scales is None else input * smooth_scales.float())


def quantized_by_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int8, and the scale by which each row's largest number is 127."""
    x = x.float()
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
