"""Llama family."""

from asymkv.models.adapter import FamilyAdapter

ADAPTER = FamilyAdapter(
    model_type="llama",
    module="transformers.models.llama.modeling_llama",
    attention="LlamaAttention",
    causal_lm="LlamaForCausalLM",
)
