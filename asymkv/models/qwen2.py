"""Qwen2 family."""

from asymkv.models.adapter import FamilyAdapter

ADAPTER = FamilyAdapter(
    model_type="qwen2",
    module="transformers.models.qwen2.modeling_qwen2",
    attention="Qwen2Attention",
    causal_lm="Qwen2ForCausalLM",
)
