"""The schemas of every operator of torch_npu that Moebius calls, and of the gradients that autograd calls for it.

A release of torch_npu that changes one has to be looked at before it is used: an argument that moves or a default that
changes would not fail by itself. Further kernels that are relied on are pinned by name.
"""

import pytest
import torch

SCHEMAS = {
    "npu_grouped_matmul": "(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
    "Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0, "
    "int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, "
    "int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, "
    "int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_moe_token_permute": "(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False) "
    "-> (Tensor, Tensor)",
    "npu_moe_token_permute_grad_v2": "(Tensor grad_permuted_tokens, Tensor sorted_indices, SymInt tokens_size_0, "
    "ScalarType tokens_dtype, SymInt num_topK, bool padded_mode=False) -> Tensor",
    "npu_moe_token_unpermute": "(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, "
    "bool padded_mode=False, int[]? restore_shape=None) -> Tensor",
    "npu_rms_norm": "(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)",
    "npu_rms_norm_backward": "(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)",
    "npu_swiglu": "(Tensor input, int dim=-1) -> Tensor",
    "npu_swiglu_backward": "(Tensor grad_output, Tensor input, int dim=-1) -> Tensor",
    "npu_rotary_mul": '(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
    "npu_fusion_attention": "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, '
    "int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
}
KERNELS = {  # of aten, on which speed or exactness depend
    "aten::_fused_adamw_": "the optimizer",
    "aten::mm.dtype": "weight gradients and logits of 16-bit operands in fp32",
    "aten::sort.stable": "sorting choices by expert",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_as_it_was_read(npu, name):
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_there(npu, name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"), KERNELS[name]


def test_no_kernel_for_what_is_done_without():
    for name in ("aten::_grouped_mm", "aten::segment_reduce"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"), f"{name} could be used now"


def test_the_fused_optimizer_takes_an_npu(npu):
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    assert npu.fused_adamw and "npu" in _get_fused_kernels_supported_devices()
