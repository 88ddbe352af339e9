"""Losses by hand, a teacher that is the student, gradients through the cache, truncation, checkpointing."""

import copy

import pytest
import torch
from tiny_models import OPTIONS, assert_close, prompt, tiny_model

import asymkv
from asymkv.distill import DistillSettings, Student
from asymkv.distill.losses import IGNORED, cross_entropy_sum, divergence_sum, next_tokens

CONFIG = {"method": "aagc", **OPTIONS["aagc"], "budget": 40, "window_size": 8}


def make_student(model, teacher=None, config=None, **settings):
    if teacher is None:
        settings.setdefault("distillation_weight", 0)
    config = asymkv.CompressionConfig(**{**CONFIG, **(config or {})})
    return Student(model, config, DistillSettings(**settings), teacher)


def gradients(student, ids, **kwargs):
    loss = student(ids, **kwargs)["loss"]
    named = student.trainable()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


# -- losses ----------------------------------------------------------------------------------------------------------
def test_worked_example_of_the_divergence():
    """z_T = [2, 0], z_S = [0, 0], T = 2: KL 0.110944, T^2 KL 0.443776, gradient T (p_S - p_T) = -+ 0.462117."""
    student = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    loss = divergence_sum(student, teacher, torch.zeros(1, 1, dtype=torch.long), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.443776, abs=1e-6)
    assert student.grad.flatten().tolist() == pytest.approx([-0.462117, 0.462117], abs=1e-6)
    assert teacher.grad is None


def test_ignored_positions_do_not_count():
    logits, other = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 3]])
    rows = [(0, 0), (0, 2), (1, 2)]
    entropy = -sum(logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in rows)
    assert_close("cross-entropy", entropy, cross_entropy_sum(logits, targets), 1e-6)
    each = [torch.nn.functional.kl_div(logits[b, t].log_softmax(-1), other[b, t].softmax(-1), reduction="sum")
            for b, t in rows]  # fmt: skip
    assert_close("divergence", sum(each), divergence_sum(logits, other, targets, 1.0), 1e-5)
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORED]]


def test_loss_is_that_of_the_patched_model():
    """Cross-entropy as the real compressed cache gives it; the divergence of its logits to the stock ones."""
    model, ids = tiny_model(dtype=torch.float64), prompt(100, batch=2)
    student = make_student(model, copy.deepcopy(model), temperature=3.0, distillation_weight=0.7)
    losses, real = student(ids), model(ids, labels=ids)
    assert losses["cross_entropy"].item() == pytest.approx(real.loss.item(), rel=1e-6)
    student.close()
    targets = next_tokens(ids)
    divergence = divergence_sum(real.logits, model(ids, use_cache=False).logits, targets, 3.0) / (2 * 99)
    assert losses["divergence"].item() == pytest.approx(divergence.item(), rel=1e-5) and divergence > 0.01
    assert losses["loss"].item() == pytest.approx((real.loss + 0.7 * divergence).item(), rel=1e-5)


# -- teacher ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_model_on_a_cache_for_all_rows_diverges_nowhere(family):
    """KL 0 and no gradient from it; with compression both are there."""
    model, ids = tiny_model(family, dtype=torch.float64), prompt(80)
    for budget, alike in ((100, True), (40, False)):
        student = make_student(model, copy.deepcopy(model), {"budget": budget}, distillation_weight=1e3)
        losses = student(ids)
        own = torch.autograd.grad(losses["loss"], list(student.trainable().values()))
        student.settings = DistillSettings(distillation_weight=0)
        plain = torch.autograd.grad(student(ids)["loss"], list(student.trainable().values()))
        gap = max((a - b).abs().max().item() for a, b in zip(own, plain, strict=True))
        assert (abs(losses["divergence"].item()) < 1e-10) == alike and (gap < 1e-6) == alike
        student.close()


def test_adapters_are_off_in_the_teacher():
    """Fresh adapters change nothing; trained ones change the student alone, and only they get gradients."""
    peft = pytest.importorskip("peft")
    base, ids = tiny_model(dtype=torch.float64), prompt(60)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    student = make_student(wrapped.double(), None, {"budget": 100}, distillation_weight=1.0)
    assert abs(student(ids)["divergence"].item()) < 1e-10
    assert student.trainable() and all("lora_" in name for name in student.trainable())
    with torch.no_grad():
        for name, p in student.trainable().items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    assert student(ids)["divergence"].item() > 1e-4
    assert all(g.abs().sum() > 0 for g in gradients(student, ids).values())


def test_a_missing_teacher_is_named():
    with pytest.raises(ValueError, match="needs a teacher: a frozen copy of the model, or a peft model"):
        make_student(tiny_model(), distillation_weight=0.5)
    model, teacher = tiny_model(), tiny_model()
    student = make_student(model, teacher)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name in student.state_dict())
    student.train()
    assert not student.model.training  # dropout would be divergence


def test_divergence_after_the_first_compaction_only():
    """The chunk that fills the cache is not counted."""
    model, ids = tiny_model(dtype=torch.float64), prompt(96)
    teacher = tiny_model(seed=1, dtype=torch.float64)
    pair = [make_student(copy.deepcopy(model), teacher, distill_positions=p) for p in ("all", "compressed")]
    labels = ids.clone()
    labels[:, : 64 + 1] = IGNORED  # the first two chunks of 32: the second one overfills the budget
    everywhere, later = pair[0](ids, labels)["divergence"].item(), pair[1](ids)["divergence"].item()
    assert later == pytest.approx(everywhere, rel=1e-9) and later > 0


# -- gradients through the cache -------------------------------------------------------------------------------------
def test_gradient_by_finite_differences_through_the_whole_model():
    """Chunks, folding, distillation: the directional derivative of the loss, choices not changing.

    GPT-2 is fp64 throughout; Llama's norms are fp32 whatever the model is.
    """
    model, ids = tiny_model("gpt2", dtype=torch.float64), prompt(70)
    student = make_student(model, tiny_model("gpt2", seed=1, dtype=torch.float64), bptt_chunks=9)
    found, named = gradients(student, ids), student.trainable()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"):
        direction = torch.randn_like(named[name])
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                named[name].add_(direction, alpha=sign * 1e-6)
                losses.append(student(ids)["loss"].item())
                named[name].sub_(direction, alpha=sign * 1e-6)
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((found[name] * direction).sum().item(), rel=1e-4), name


def test_truncation_cuts_where_it_says():
    """With one chunk nothing flows through the cache; two see the pair's; as many as there are, everything."""
    model, ids = tiny_model(dtype=torch.float64), prompt(128)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 97:] = ids[:, 97:]  # only the fourth chunk is judged
    reached = {}
    for chunks in (1, 2, 3, 4):
        student = make_student(model, bptt_chunks=chunks)
        states = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda m, args, at=states: at.append(args[0]))
        loss = student(ids, labels)["loss"]
        hook.remove()
        found = torch.autograd.grad(loss, states, allow_unused=True)
        reached[chunks] = [g is not None and bool(g.any()) for g in found]
        student.close()
    assert reached == {
        1: [False, False, False, True], 2: [False, False, True, True],
        3: [False, False, False, True],  # windows of three chunks: 0 to 2, then 3
        4: [True, True, True, True],
    }  # fmt: skip


@pytest.mark.parametrize("config", [
    CONFIG, {**CONFIG, "score_scope": "global"},
    {"method": "h2o", "budget": 40, "window_size": 8, "chunk_size": 32},
], ids=["aagc", "global", "h2o"])  # fmt: skip
def test_checkpointed_chunks_have_the_same_gradients(config):
    model, ids, results = tiny_model(), prompt(100), []
    for checkpoint in (False, True):
        settings = DistillSettings(distillation_weight=0, checkpoint_chunks=checkpoint, bptt_chunks=3)
        student = Student(model, asymkv.CompressionConfig(**config), settings)
        results.append(gradients(student, ids))
        student.close()
    for name, g in results[0].items():
        assert torch.equal(g, results[1][name]), name


def test_transformers_own_checkpointing_is_refused():
    model = tiny_model()
    student = make_student(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="drop the cache, and with it the compression.*checkpoint_chunks=True"):
        student(prompt(40))
    model.train()
    for grad in (False, True):  # with gradients too: what to do comes before what cannot be
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="drop the cache in training mode"):
            model(prompt(40))
    model.gradient_checkpointing_disable()
    student.close()
    assert student.model is model


def test_padding_is_refused():
    layer = asymkv.distill.functional.DifferentiableLayer()
    rows = torch.randn(2, 1, 4, 16)
    with pytest.raises(ValueError, match=r"blocks without padding.*found \[4, 3\] tokens in 4 columns"):
        layer.append_packed(rows, rows, torch.arange(4).expand(2, -1), [4, 3])


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": 0}, "temperature must be a number >= 1e-06; found 0"),
    ({"bptt_chunks": 0}, "bptt_chunks must be an integer >= 1; found 0"),
    ({"distillation_weight": -1}, "distillation_weight must be a number >= 0; found -1"),
    ({"distill_positions": "late"}, "distill_positions='late'; allowed: .*compressed"),
], ids=str)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**settings)


def test_bf16_autocast_trains():
    """Mixed precision: rows in bf16, means and scores in fp32, finite gradients in the weights' fp32."""
    model, ids = tiny_model(), prompt(100)
    student = make_student(model, copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(ids)["loss"]
    loss.backward()
    assert student.compactions and all(torch.isfinite(p.grad).all() for p in student.trainable().values())
    assert loss.item() == pytest.approx(student(ids)["loss"].item(), rel=0.05)
