"""Mistral family."""

from asymkv.models.adapter import FamilyAdapter

ADAPTER = FamilyAdapter(
    model_type="mistral",
    module="transformers.models.mistral.modeling_mistral",
    attention="MistralAttention",
    causal_lm="MistralForCausalLM",
)
