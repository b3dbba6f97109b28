"""The operators of experts and of MLA, beside what their formulas say, each written out."""

import torch
import torch_npu
from cases import case, run_cases
from npusim_vllm import ops

torch.npu.set_device(0)
torch.npu.config.allow_internal_format = True
ops.install_custom()

DEVICE = "npu:0"
FRACTAL_NZ = 29
CUSTOM = torch.ops._C_ascend
TOKENS, EXPERTS, HIDDEN, INNER = 5, 4, 64, 32
COUNTS = torch.tensor([2, 0, 4, 1])  # rows of each expert; two rows more belong to none
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


def draw_int8(*shape):
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def npu(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def in_nz(tensor):
    return torch_npu.npu_format_cast(tensor.to(DEVICE), FRACTAL_NZ)


def equal(got, expected):
    assert torch.equal(got.cpu(), expected), (got.cpu(), expected)


def close(got, expected):
    assert torch.allclose(got.cpu().float(), expected, rtol=1e-5, atol=1e-5), (got.cpu(), expected)


def route(scores, bias=None, **changes):
    settings = {
        "k": 2,
        "k_group": 1,
        "group_count": 1,
        "group_select_mode": 1,
        "renorm": 0,
        "norm_type": 0,
        "out_flag": False,
        "routed_scaling_factor": 1.0,
        "eps": 1e-20,
    }
    bias = bias if bias is None else bias.to(DEVICE)
    made = CUSTOM.moe_gating_top_k(scores.to(DEVICE), bias_opt=bias, **settings | changes)
    return made[0].cpu(), made[1].cpu()


@case
def shares_of_the_softmax():
    weights, experts = route(torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    assert experts.tolist() == [[1, 3]]
    close(weights, torch.tensor([0.0, 3.0, 1.0, 2.0]).softmax(0)[[1, 3]].unsqueeze(0))
    weights, _ = route(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), renorm=1, routed_scaling_factor=2.0)
    close(weights, 2 * torch.tensor([[3.0, 2.0]]).softmax(1))


@case
def the_best_groups_by_their_two_best():
    # The last group has the best expert, and the first one the best two.
    scores = torch.tensor([[1.0, 1.0, -2.0, -2.0, 1.5, -9.0]])
    _, experts = route(scores, norm_type=1, k_group=1, group_count=3)
    assert sorted(experts[0].tolist()) == [0, 1]
    _, experts = route(scores, norm_type=1, k_group=2, group_count=3)
    assert experts[0].tolist()[0] == 4


@case
def a_bias_decides_but_does_not_count():
    scores, bias = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0])
    weights, experts = route(scores, bias, norm_type=1)
    assert experts.tolist() == [[2, 1]]
    chosen = scores.sigmoid()[:, [2, 1]]
    close(weights, chosen / chosen.sum())


def init_routing(x, experts, first, end, quant_mode):
    return CUSTOM.npu_moe_init_routing_custom(
        *npu(x, experts),
        scale=None,
        active_num=experts.numel(),
        expert_num=EXPERTS,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[first, end],
        quant_mode=quant_mode,
    )


@case
def copies_of_the_tokens_of_a_rank_s_experts():
    x = draw(3, HIDDEN)
    experts = torch.tensor([[3, 0], [2, 3], [1, 2]], dtype=torch.int32)
    copies, rows, counts, _ = init_routing(x, experts, 2, 4, -1)
    equal(counts, torch.tensor([2, 2]))
    equal(copies[:4], x[[1, 2, 0, 1]])
    equal(rows, torch.tensor([2, -1, 0, 3, -1, 1], dtype=torch.int32))
    quantized, _, _, scale = init_routing(x, experts, 2, 4, 1)
    close(scale[:4], x.abs().amax(1)[[1, 2, 0, 1]] / 127)
    assert (
        quantized[:4].cpu().float() * scale[:4, None].cpu() - copies[:4].cpu()
    ).abs().max() < 0.02


@case
def tokens_get_what_their_experts_made():
    made, shares = draw(4, HIDDEN), draw(3, 2)
    rows = torch.tensor([2, -1, 0, 3, -1, 1], dtype=torch.int32)
    got = torch_npu.npu_moe_token_unpermute(
        permuted_tokens=made.to(DEVICE), sorted_indices=rows.to(DEVICE), probs=shares.to(DEVICE)
    )
    expected = [
        shares[0, 0] * made[2],
        shares[1, 0] * made[0] + shares[1, 1] * made[3],
        shares[2, 1] * made[1],
    ]
    close(got, torch.stack(expected))


def by_expert(rows, matrices, scales):
    """Multiplies each row by its expert's matrix and scales; rows of none are zero."""
    expert = torch.arange(EXPERTS).repeat_interleave(COUNTS)
    out = torch.zeros(len(rows), matrices.shape[-1])
    for row, number in enumerate(expert.tolist()):
        sums = rows[row].long() @ matrices[number].long()
        out[row] = sums.float() * scales[number]
    return out


def grouped(rows, weight, scale, row_scale, bias=None, counts=COUNTS, list_type=1):
    return torch_npu.npu_grouped_matmul(
        x=[rows.to(DEVICE)],
        weight=[weight],
        scale=[scale.to(DEVICE)],
        bias=bias if bias is None else [bias.to(DEVICE)],
        per_token_scale=[row_scale.to(DEVICE)],
        split_item=2,
        group_list_type=list_type,
        group_type=0,
        group_list=counts.to(DEVICE),
        output_dtype=torch.float32,
    )[0]


@case
def int8_of_experts():
    rows, matrices = draw_int8(9, HIDDEN), draw_int8(EXPERTS, HIDDEN, INNER)
    scale, row_scale = draw(EXPERTS, INNER), draw(9)
    expected = by_expert(rows, matrices, scale) * row_scale[:, None]
    close(grouped(rows, in_nz(matrices), scale, row_scale), expected)
    ends = COUNTS.cumsum(0)
    close(grouped(rows, in_nz(matrices), scale, row_scale, None, ends, 0), expected)


@case
def int4_of_experts():
    rows = draw_int8(9, HIDDEN)
    matrices = torch.randint(-8, 8, (EXPERTS, HIDDEN, 64), generator=generator, dtype=torch.int8)
    packed = in_nz(matrices[..., 1::2] << 4 | matrices[..., ::2] & 15).view(torch.int32)
    scale, row_scale = draw(EXPERTS, 64), draw(9)
    bias = 8 * (matrices.float() * scale[:, None]).sum(1)
    as_int64 = scale.view(torch.int32).long()
    expected = by_expert(rows, matrices, scale) * row_scale[:, None]
    got = grouped(rows, packed, as_int64, row_scale, bias).cpu()
    assert torch.allclose(got, expected, rtol=1e-3, atol=0.05), (got - expected).abs().max()


@case
def int8_of_experts_gated_and_quantized():
    rows, matrices = draw_int8(9, HIDDEN), draw_int8(EXPERTS, HIDDEN, INNER)
    scale, row_scale = draw(EXPERTS, INNER) / 100, draw(9).abs() / 100
    gate, up = (by_expert(rows, matrices, scale) * row_scale[:, None]).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    quantized, scales, _ = CUSTOM.grouped_matmul_swiglu_quant_weight_nz(
        x=rows.to(DEVICE),
        weight=in_nz(matrices),
        weight_scale=scale.to(DEVICE),
        x_scale=row_scale.to(DEVICE),
        group_list=COUNTS.cumsum(0).to(DEVICE),
    )
    close(scales, expected.abs().amax(1) / 127)
    error = quantized.cpu().float() * scales.cpu()[:, None] - expected
    assert (error.abs() <= scales.cpu()[:, None] * 0.51).all()


@case
def int8_of_shared_experts_gated_and_quantized():
    sums = torch.randint(-9000, 9000, (TOKENS, INNER), generator=generator, dtype=torch.int32)
    scale, row_scale = draw(INNER) / 100, draw(TOKENS).abs() / 100
    gate, up = (sums.float() * scale * row_scale[:, None]).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    quantized, scales = CUSTOM.npu_dequant_swiglu_quant(
        x=sums.to(DEVICE),
        weight_scale=scale.to(DEVICE),
        activation_scale=row_scale.to(DEVICE),
        activate_left=True,
        quant_mode=1,
    )
    close(scales, expected.abs().amax(1) / 127)
    error = quantized.cpu().float() * scales.cpu()[:, None] - expected
    assert (error.abs() <= scales.cpu()[:, None] * 0.51).all()


@case
def latent_attention_of_several_tokens():
    heads, latent, rope, size, lengths = 2, 32, 16, 4, [7, 3]
    cache, ropes = draw(4, 1, size, latent), draw(4, 1, size, rope)
    table = torch.tensor([[2, 0], [3, 0]], dtype=torch.int32)
    query, query_rope = draw(3, heads, latent), draw(3, heads, rope)

    def attend(query, query_rope, layout, mode, ends, lengths, table):
        return torch_npu.npu_fused_infer_attention_score_v2(
            *npu(query, cache, cache),
            query_rope=query_rope.to(DEVICE),
            key_rope=ropes.to(DEVICE),
            num_query_heads=heads,
            num_key_value_heads=1,
            input_layout=layout,
            sparse_mode=mode,
            softmax_scale=0.1,
            block_table=table.to(DEVICE),
            block_size=size,
            actual_seq_qlen=ends,
            actual_seq_kvlen=lengths,
        )[0].cpu()

    # The first sequence has two new tokens, the first of which does not see the second.
    got = attend(query, query_rope, "TND_NTD", 3, [2, 3], lengths, table)
    assert got.shape == (heads, 3, latent)
    one_by_one = attend(
        query.unsqueeze(2),
        query_rope.unsqueeze(2),
        "BNSD_NBSD",
        0,
        None,
        [lengths[0] - 1, *lengths],
        table[[0, 0, 1]],
    )
    close(got, one_by_one.squeeze(2))


# As engines do; torch_npu differentiates some of these operators in a way of its own.
with torch.inference_mode():
    run_cases()
torch.npu.synchronize()
