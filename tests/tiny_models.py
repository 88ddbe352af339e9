"""Tiny random models of every family, with sharp attention and biases that are not zero."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from asymkv.methods.gate import GateMethod
from asymkv.models import families, get_adapter

FAMILIES = families()
VOCAB = 128
# What a method needs on a tiny model: intervals that a short text reaches; the request to repeat, as token ids.
OPTIONS = {
    "aagc": {"pruning_interval": 32, "lookback_window": 16},
    "kvzip": {"repeat_ids": (5, 90, 17), "continue_ids": (5, 91), "suffix_ids": (33,), "replay_chunk": 70},
}
OPTIONS["echo"] = OPTIONS["kvzip"]
# One score per layer and KV head of a tiny model; the best head is not in layer 0.
HEAD_SCORES = [[0.1, 0.2], [0.9, 0.3]]


def tiny_config(family: str, **overrides):
    adapter = get_adapter(family)
    name = adapter.causal_lm.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Config"
    cls = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), name)
    settings = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 2048, "eos_token_id": None,
        "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "gpt2":
        settings["num_attention_heads"] = settings.pop("num_key_value_heads")  # every head has keys of its own
        settings["n_inner"] = settings.pop("intermediate_size")
    if family == "llama":
        settings["attention_bias"] = True
    return cls(**{**settings, **overrides})


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> nn.Module:
    torch.manual_seed(seed)
    model = get_adapter(family).causal_lm_class()(tiny_config(family, **overrides)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.normal_(std=0.35)  # logits of several units: attention that picks
            elif name.endswith("c_attn.weight"):
                p.normal_(std=0.15)
                p[:, : 2 * p.shape[0]] *= 0.35 / 0.15
            elif name.endswith("bias"):
                p.normal_(std=0.3)
            elif p.ndim > 1:
                p.normal_(std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def head_scores(method: type) -> dict:
    """Scores inline, for a method that wants some; gates, for one that wants those."""
    if issubclass(method, GateMethod):
        from gate_files import GATES

        return {"file": GATES}
    return {"head_scores": HEAD_SCORES} if "head_scores" in method.__dataclass_fields__ else {}


def tiny_tokenizer():
    """Words w0 ... w124, padded on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(125)]])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", padding_side="left")


def prompt(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids and mask of a left-padded batch, and its rows alone."""
    rows = [prompt(n, seed=seed + i)[0] for i, n in enumerate(lengths)]
    width = max(lengths)
    ids = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return ids, mask, [r[None] for r in rows]


def assert_close(name: str, ref: Tensor, out: Tensor, rtol: float) -> None:
    """Fails with the largest and the relative root-mean-square error; rtol bounds the latter and 10x the former."""
    if not ref.numel():
        assert ref.shape == out.shape, f"{name}: {tuple(ref.shape)} != {tuple(out.shape)}"
        return
    ref, out = ref.double(), out.double()
    worst = (ref - out).abs().max().item()
    scale = ref.square().mean().sqrt().clamp(min=1e-12).item()
    rms = (ref - out).square().mean().sqrt().item() / scale
    assert rms <= rtol and worst <= 10 * rtol * max(scale, ref.abs().max().item()), (
        f"{name}: max abs {worst:.3g}, relative RMSE {rms:.3g} > {rtol:.3g}"
    )


def assert_lse(ref: Tensor, out: Tensor, tol: float) -> None:
    """Log-sum-exps agree: relative to 1 where they are near zero, -inf in the same places."""
    assert torch.equal(torch.isneginf(ref), torch.isneginf(out))
    ref, out = (x.double().nan_to_num(neginf=0) for x in (ref, out))
    worst = ((ref - out).abs() / ref.abs().clamp(min=1)).max().item() if ref.numel() else 0.0
    assert worst <= tol, f"lse: error {worst:.3g} > {tol:.3g}"


def assert_same_rows(a, b, *, row_a: int = 0, row_b: int = 0, rtol: float = 1e-5) -> None:
    """Two caches hold the same rows for a sequence of their batches."""
    for layer in range(len(a.layers)):
        for name in ("positions", "cardinality"):
            for x, y in zip(getattr(a, name)(layer)[row_a], getattr(b, name)(layer)[row_b], strict=True):
                assert torch.equal(x, y), f"layer {layer} {name}: {x.tolist()} != {y.tolist()}"
        for name in ("keys", "values"):
            for x, y in zip(getattr(a, name)(layer)[row_a], getattr(b, name)(layer)[row_b], strict=True):
                assert_close(f"layer {layer} {name}", x, y, rtol)
