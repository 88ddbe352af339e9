"""Training: the loss falls, a stopped run goes on bit for bit, text has one order, bad numbers stop it."""

import copy
import json
import math

import pytest
import torch
from accelerate import Accelerator
from tiny_models import OPTIONS, prompt, tiny_model, tiny_tokenizer

import asymkv
from asymkv.distill import DistillSettings, Student, checkpoints
from asymkv.distill.text import BlockOrder, to_blocks
from asymkv.distill.trainer import Trainer, TrainSettings
from asymkv.texts import read_files

CONFIG = asymkv.CompressionConfig("aagc", **OPTIONS["aagc"], budget=40, window_size=8)
QUICK = {"train_batch_size": 2, "eval_batch_size": 2, "learning_rate": 3e-3, "warmup_steps": 0, "max_steps": 4,
         "logging_steps": 1, "save_steps": 2, "eval_steps": 0}  # fmt: skip


def text_blocks(count=6, length=72):
    """Counting up by ones and twos: something to learn."""
    step = 1 + torch.arange(count) % 2
    return (3 + torch.arange(count)[:, None] + step[:, None] * torch.arange(length)) % 120 + 3


def make_trainer(folder, model=None, blocks=None, validation=None, weight=0.5, **settings):
    model = model or tiny_model()
    teacher = copy.deepcopy(model) if weight else None
    student = Student(model, CONFIG, DistillSettings(distillation_weight=weight, checkpoint_chunks=True), teacher)
    blocks = text_blocks() if blocks is None else blocks
    return Trainer(student, blocks, validation, folder, TrainSettings(**{**QUICK, **settings}), Accelerator(cpu=True))


def quiet(*args, **kwargs):
    """A progress bar that shows nothing."""
    from tqdm import tqdm

    return tqdm(*args, **{**kwargs, "disable": True})


def killed_after(updates):
    """A progress bar whose run dies when it has made one update more, before that one is saved."""
    class Bar:
        def __init__(self, **kwargs):
            self.left = updates

        def update(self):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1

        def set_postfix(self, values):
            pass

    return Bar


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.student.trainable().items()}


def test_loss_falls_in_twenty_steps(tmp_path):
    """On the compressed cache: cross-entropy in training, and the perplexity of the real cache in validation."""
    trainer = make_trainer(tmp_path, validation=text_blocks(2), weight=0.1, max_steps=20, save_steps=0, eval_steps=10)
    after = trainer.fit(quiet)
    log = log_of(tmp_path)
    losses = [entry["cross_entropy"] for entry in log if "cross_entropy" in entry]
    assert len(losses) == 20 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    validations = [entry for entry in log if "perplexity" in entry]
    assert [entry["step"] for entry in validations] == [0, 10, 20]
    assert after["perplexity"] == validations[-1]["perplexity"] < 0.7 * validations[0]["perplexity"]
    assert trainer.student.compactions > 0


def test_validation_is_the_real_caches_perplexity(tmp_path):
    blocks = prompt(72, batch=3)
    trainer = make_trainer(tmp_path, validation=blocks)
    found, model = trainer.evaluate(), trainer.student.lm
    compressed = torch.stack([model(row[None], labels=row[None]).loss for row in blocks]).mean().exp()
    full = torch.stack([model(row[None], labels=row[None], use_cache=False).loss for row in blocks]).mean().exp()
    assert found["perplexity"] == pytest.approx(compressed.item(), rel=1e-5)
    assert found["perplexity_full"] == pytest.approx(full.item(), rel=1e-5)
    assert found["perplexity"] != pytest.approx(full.item(), rel=1e-3)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop):
    """Weights, optimizer, schedule and order of the text, bit for bit; random states too."""
    whole = make_trainer(tmp_path / "whole", gradient_accumulation_steps=2)
    whole.fit(quiet)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "parts", gradient_accumulation_steps=2, save_steps=1).fit(killed_after(stop))
    torch.manual_seed(99)
    again = make_trainer(tmp_path / "parts", gradient_accumulation_steps=2)
    assert again.resume() == stop
    saved = checkpoints.read(checkpoints.found(tmp_path / "parts")[-1])["rng"][0]
    assert torch.equal(torch.get_rng_state(), saved["torch"]) and torch.initial_seed() != 99
    again.fit(quiet)
    assert all(torch.equal(p, weights(again)[name]) for name, p in weights(whole).items())
    a, b = (checkpoints.read(checkpoints.found(tmp_path / part)[-1]) for part in ("whole", "parts"))
    assert a["step"] == b["step"] == 4 and a["schedule"] == b["schedule"]
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(x, b["optimizer"]["state"][key][name]) for name, x in state.items())


def test_checkpoints_bind_the_run(tmp_path):
    """Another model, text or setting is named; what only shows progress may change."""
    make_trainer(tmp_path).fit(quiet)
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    for change, message in (
        ({"blocks": text_blocks(7)}, "of another run.*'text'"),
        ({"learning_rate": 1e-3}, "of another run.*'training'"),
        ({"model": tiny_model(hidden_size=32)}, "of another run.*'trainable'"),
        ({"model": tiny_model(seed=1)}, "of another run.*'first_weights'"),
        ({"weight": 0.9}, "of another run.*'distillation'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **change).resume()
    assert make_trainer(tmp_path, logging_steps=3, save_steps=1).resume() == 4
    assert make_trainer(tmp_path / "new").resume() == 0
    with pytest.raises(ValueError, match="holds no checkpoint"):
        make_trainer(tmp_path).resume(tmp_path / "checkpoint-3")


def test_an_interrupted_or_damaged_checkpoint_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.fit(quiet)
    real = torch.save

    def dies(state, path):
        real(state, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    trainer.step = 5
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    (tmp_path / "checkpoint-4" / checkpoints.FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="state.pt is damaged"):
        make_trainer(tmp_path).resume()
    assert make_trainer(tmp_path).resume(tmp_path / "checkpoint-2") == 2


@pytest.mark.parametrize("saved", [False, True])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, saved):
    trainer = make_trainer(tmp_path, save_steps=1)
    if saved:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(killed_after(1))
    with torch.no_grad():
        next(iter(trainer.student.trainable().values())).fill_(math.nan)
    where = "3 of 4.*checkpoint-1" if saved else r"1 of 4.*no checkpoint yet \(save_steps=1\): begin anew"
    with pytest.raises(FloatingPointError, match=rf"loss of blocks \[\d, \d\] is nan at update {where}"):
        trainer.fit(quiet)
    found = checkpoints.found(tmp_path)
    assert len(found) == saved
    if saved:
        assert all(torch.isfinite(w).all() for w in checkpoints.read(found[0])["weights"].values())


@pytest.mark.parametrize("settings", [
    {"max_steps": 1, "save_steps": 0}, {"max_steps": 1, "save_steps": 0, "eval_steps": None},
    {"max_steps": 3, "save_steps": 1},
], ids=["end", "validated", "between"])  # fmt: skip
def test_weights_that_have_diverged_are_never_a_checkpoint_or_a_success(tmp_path, settings):
    """The loss of an update's own weights is first seen by the update behind it; at the end there is none."""
    validation = text_blocks(2) if "eval_steps" in settings else None
    trainer = make_trainer(tmp_path, validation=validation, weight=0, learning_rate=1e30, **settings)
    with pytest.raises(FloatingPointError, match="(loss of blocks|validation|largest weight).*there is no checkpoint"):
        trainer.fit(quiet)
    assert not checkpoints.found(tmp_path)
    assert not [line for line in log_of(tmp_path) if not all(map(math.isfinite, line.values()))]


def test_a_weight_that_no_loss_sees_is_checked_too(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._check_weights()
    with torch.no_grad():
        trainer.student.lm.model.embed_tokens.weight[0] = math.inf  # of the padding token
    with pytest.raises(FloatingPointError, match="largest weight of .*embed_tokens.* is inf"):
        trainer.save()
    assert not checkpoints.found(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    make_trainer(tmp_path).fit(quiet)
    with pytest.raises(ValueError, match="holds checkpoints of another run, up to checkpoint-4; give --resume"):
        make_trainer(tmp_path, max_steps=2).fit(quiet)
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    make_trainer(tmp_path / "old").fit(quiet)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        make_trainer(tmp_path).resume(tmp_path / "old" / "checkpoint-2")


def test_a_run_from_an_older_checkpoint_keeps_its_own_and_sets_newer_ones_aside(tmp_path):
    make_trainer(tmp_path, max_steps=6, save_steps=2, keep_checkpoints=3).fit(quiet)
    again = make_trainer(tmp_path, max_steps=6, save_steps=1, keep_checkpoints=2)
    assert again.resume(tmp_path / "checkpoint-2") == 2
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-2"]
    with pytest.raises(KeyboardInterrupt):
        again.fit(killed_after(1))
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert {p.name for p in tmp_path.glob("aside-*")} == {"aside-checkpoint-4", "aside-checkpoint-6"}


def test_the_last_good_checkpoint_is_this_runs_own(tmp_path):
    make_trainer(tmp_path / "old").fit(quiet)
    trainer = make_trainer(tmp_path / "new", save_steps=0)
    trainer.resume(tmp_path / "old" / "checkpoint-2")
    with torch.no_grad():
        next(iter(trainer.student.trainable().values())).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="last good checkpoint is .*old/checkpoint-2"):
        trainer.fit(quiet)


def test_a_log_holds_every_step_once_after_a_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, validation=text_blocks(2), eval_steps=2).fit(killed_after(3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by the kill
    again = make_trainer(tmp_path, validation=text_blocks(2), eval_steps=2)
    assert again.resume() == 2
    again.fit(quiet)
    steps = [(entry["step"], "perplexity" in entry) for entry in log_of(tmp_path)]
    assert steps == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


@pytest.mark.parametrize(("settings", "message"), [
    ({"max_steps": 0}, "max_steps must be an integer >= 1; found 0"),
    ({"eval_steps": -1}, "eval_steps must be an integer >= 0; found -1"),
    ({"learning_rate": math.inf}, "learning_rate must be a number >= 0 and finite; found inf"),
])  # fmt: skip
def test_settings_that_train_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings)


def test_too_short_blocks_are_reported(tmp_path, caplog):
    trainer = make_trainer(tmp_path, blocks=prompt(30, batch=4), max_steps=1)
    trainer.fit(quiet)
    assert "no cache was compacted: blocks of 30 tokens stay below the budget" in caplog.text


def test_adapters_alone_are_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    student = Student(model, CONFIG, DistillSettings())
    trainer = Trainer(student, text_blocks(), None, tmp_path, TrainSettings(**QUICK), Accelerator(cpu=True))
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer.fit(quiet)
    saved = checkpoints.read(checkpoints.found(tmp_path)[-1])["weights"]
    assert saved and all("lora_" in name for name in saved)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert any(p.any() for n, p in saved.items() if "lora_B" in n)


# -- text ----------------------------------------------------------------------------------------------------------
def test_every_epoch_takes_every_block_once_and_processes_share_it():
    order = BlockOrder(blocks=13, batch=2, processes=3, seed=5)
    epochs = [[order.batch_of(e * order.per_epoch + n, p) for n in range(order.per_epoch) for p in range(3)]
              for e in range(2)]  # fmt: skip
    for batches in epochs:
        taken = [i for batch in batches for i in batch]
        assert len(taken) == len(set(taken)) == 12
    assert epochs[0] != epochs[1]
    one = BlockOrder(blocks=13, batch=6, processes=1, seed=5)
    assert one.batch_of(1, 0) == [i for p in range(3) for i in order.batch_of(1, p)]
    with pytest.raises(ValueError, match="5 blocks of text are fewer than one batch of 2 on each of 3"):
        BlockOrder(blocks=5, batch=2, processes=3, seed=5)


def test_blocks_join_documents(tmp_path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    (tmp_path / "b.jsonl").write_text('{"text": "w4 w5"}\n{"text": " "}\n{"text": "w6"}\n')
    texts = list(read_files([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
    assert to_blocks(texts, tokenizer, 4).tolist() == [[4, 5, 6, 2], [7, 8, 2, 9]]
    assert to_blocks(texts, tokenizer, 4, most=1).tolist() == [[4, 5, 6, 2]]
    with pytest.raises(ValueError, match="9 tokens, less than one block of max_length=10"):
        to_blocks(texts, tokenizer, 10)
    with pytest.raises(ValueError, match="no text file at"):
        list(read_files([tmp_path / "c.txt"]))
    with pytest.raises(ValueError, match=r"must end in one of .*found 'c.pdf'"):
        list(read_files([tmp_path / "c.pdf"]))
    (tmp_path / "d.jsonl").write_text('{"body": "w4"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:1: expected an object with \"text\""):
        list(read_files([tmp_path / "d.jsonl"]))
