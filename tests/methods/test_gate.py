"""Gates: what they are fitted on, their files, and the rows that they keep."""

import math
from unittest.mock import patch

import pytest
import torch
from gate_files import GATES, random_gate
from safetensors.torch import save_file
from tiny_models import assert_close, assert_same_rows, left_padded, prompt, tiny_model

import asymkv
from asymkv import CompressedCache, CompressionConfig
from asymkv.gates import gate
from asymkv.gates.gate import features, log_score
from asymkv.head_scores import model_of

SETTINGS = {"method": "gate", "file": GATES, "window_size": 8, "budget": 40}
WORDS = " ".join(f"w{i}" for i in prompt(400, seed=5)[0].tolist())


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def read(model, ids, mask=None, **settings):
    """The cache of a prompt; by the random gate, unless ``settings`` name another method."""
    given = settings if "method" in settings else {**SETTINGS, **settings}
    with asymkv.replace("llama", model=model, **given), torch.no_grad():
        return model(ids, attention_mask=mask).past_key_values


def positions(cache, layer, row=0):
    return [found.tolist() for found in cache.positions(layer)[row]]


# -- what is kept ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [False, True])
def test_the_best_rows_of_the_whole_cache_are_kept(model, tmp_path, lengths):
    """One threshold over layers and heads; sinks and window stay whatever they score."""
    ids = prompt(120)
    whole = read(model, ids, method="full")
    keys = torch.stack([whole.rope.rotate(x.dense("keys"), -x.dense("position").long())[0] for x in whole.layers])
    values = torch.stack([x.dense("values")[0] for x in whole.layers])
    made = random_gate(model, lengths=lengths)
    scores = made.score(keys, values, 120 if lengths else None)
    cache = read(model, ids, layer_budgets="global", file=str(made.save(tmp_path / "gate.safetensors")))
    free = torch.zeros(120, dtype=torch.bool)
    free[4:-8] = True
    kept = scores.masked_fill(~free, -torch.inf).flatten().topk((40 - 12) * 4).indices
    wanted = (~free).expand_as(scores).flatten().index_fill(0, kept, True).view_as(scores)
    for layer in range(2):
        assert positions(cache, layer) == [row.nonzero().flatten().tolist() for row in wanted[layer]]
    assert len({n for layer in range(2) for n in cache.num_rows(layer)[0].tolist()}) > 1, "heads share by their scores"


def test_a_gate_serves_the_same_weights_in_every_class(tmp_path):
    """Llama stores no biases, Qwen2 zeros; where one is not zero, it is another model."""
    models = {family: tiny_model(family) for family in ("mistral", "qwen2")}
    models["llama"] = tiny_model(attention_bias=False)
    with torch.no_grad():
        for name, bias in models["qwen2"].named_parameters():
            if name.endswith("proj.bias"):
                bias.zero_()
    for other in ("mistral", "qwen2"):
        assert not models[other].load_state_dict(models["llama"].state_dict(), strict=False).unexpected_keys
    file = str(random_gate(models["llama"]).save(tmp_path / "one.safetensors"))
    kept = {}
    for family, each in models.items():
        settings = {**SETTINGS, "file": file}
        with asymkv.replace(family, model=each, **settings), torch.no_grad():
            cache = each(prompt(120)).past_key_values
        kept[family] = [positions(cache, layer) for layer in range(2)]
    assert kept["llama"] == kept["mistral"] == kept["qwen2"]
    with torch.no_grad():
        models["qwen2"].model.layers[0].self_attn.k_proj.bias[0] = -0.1
    with pytest.raises(ValueError, match="weights_sha256"):
        gate.load(file, models["qwen2"])


def test_a_floor_keeps_rows_in_every_head(model):
    least = {}
    for floor in (0.0, 0.5):
        cache = read(model, prompt(120), layer_budgets={"kind": "global", "floor": floor})
        least[floor] = min(int(cache.num_rows(layer).min()) for layer in range(2))
    assert least[0.0] < 20 <= least[0.5]


def test_scores_depend_on_nothing_but_the_row_and_the_length(model):
    """Keys of layer 0 follow from the embedding alone: chunks change nothing there, though rows are lost in between.

    How long the prompt will be is known from its first chunk on.
    """
    ids = prompt(130)
    one, many = (read(model, ids, layer_budgets="uniform", chunk_size=chunk) for chunk in ("prompt", 16))
    assert many.compactions > one.compactions
    assert positions(one, 0) == positions(many, 0)


def test_a_context_counts_as_long_as_it_was_announced_or_has_become(model):
    """What comes in parts that nobody announced counts up to where it is; every row of a batch by itself."""
    layer, seen = "asymkv.methods.gate.log_score", []
    noted = patch(layer, lambda w, x, tokens: seen.append(tokens.flatten().tolist()) or log_score(w, x, tokens))
    ids, mask, _ = left_padded([130, 70])
    settings = {**SETTINGS, "chunk_size": 64, "decode_interval": 2}
    with asymkv.replace("llama", model=model, **settings), torch.no_grad(), noted:
        cache = model(ids, attention_mask=mask).past_key_values
        assert {tuple(each) for each in seen} == {(130, 70)}
        seen.clear()
        model(prompt(20, batch=2), past_key_values=cache)
        for token in prompt(2)[0]:
            model(token.expand(2, 1), past_key_values=cache)
    assert seen == [[150, 90]] * 2 + [[152, 92]] * 2, "two layers each"


def test_lengths_are_those_that_were_taught():
    """Shorter and longer contexts count as the shortest and the longest; without a length there is no score."""
    made = random_gate(tiny_model(), seed=2)
    keys, values = torch.randn(2, 2, 2, 9, 16)
    scores = {tokens: made.score(keys, values, tokens) for tokens in (1, 60, 300, 1000, 9999)}
    assert torch.equal(scores[1], scores[60]) and torch.equal(scores[1000], scores[9999])
    assert not torch.equal(scores[60], scores[300]) and not torch.equal(scores[300], scores[1000])
    x = features(keys.double(), values.double())
    w = {name: each.double() for name, each in made.weights.items()}
    hidden = torch.einsum("lhtf,lhfu->lhtu", x, w["weight_in"]) + w["bias_in"][:, :, None]
    hidden = hidden + math.log(300 / 2048) * w["weight_length"][:, :, None]
    wanted = torch.einsum("lhtu,lhu->lht", hidden * hidden.sigmoid(), w["weight_out"]) + w["bias_out"][..., None]
    assert_close("score", scores[300].double(), wanted, 1e-4)
    with pytest.raises(ValueError, match="was taught how long contexts are: give 'tokens'"):
        made.score(keys, values)


def test_padding_changes_nothing(model):
    ids, mask, rows = left_padded([130, 70])
    batch = read(model, ids, mask)
    for row, alone in enumerate(rows):
        assert_same_rows(batch, read(model, alone), row_a=row)


def test_the_gate_stays_with_the_cache(model, tmp_path):
    """Through fork, save and load: later turns and tokens are judged as before, and decode keeps the budget."""
    cache, turn = read(model, prompt(100)), prompt(60, seed=4)
    cache.save(tmp_path)
    ends = []
    for each in (cache.fork(), CompressedCache.load(tmp_path, model), cache):
        with asymkv.replace("llama", model=model, **SETTINGS), torch.no_grad():
            model(turn, past_key_values=each)
            for token in prompt(6, seed=6)[0]:
                model(token[None, None], past_key_values=each)
        ends.append(each)
    assert_same_rows(ends[0], ends[2])
    assert_same_rows(ends[1], ends[2])
    config = CompressionConfig(**{**SETTINGS, "decode_interval": 3})
    with asymkv.replace("llama", config, model=model), torch.no_grad():
        decoded = model.generate(prompt(100), max_new_tokens=20, return_dict_in_generate=True).past_key_values
    assert sum(int(decoded.num_rows(layer).sum()) for layer in range(2)) <= (40 + 3) * 4


def test_caches_share_the_weights(model):
    """They belong to no cache, and are counted by none: a second one must not widen them again."""
    first, second = (read(model, prompt(100)) for _ in range(2))
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.learned["weight_in"].dtype == torch.float32
        for name, weights in a.learned.items():
            assert weights.data_ptr() == b.learned[name].data_ptr(), name


# -- files -------------------------------------------------------------------------------------------------------------
def test_a_file_gives_the_gate_back(model, tmp_path):
    made = random_gate(model, seed=3)
    path = made.save(tmp_path / "gate.safetensors")
    found = gate.load(path, model)
    assert (found.model, found.trained) == (made.model, {"seed": 3})
    for name, weights in made.weights.items():
        assert torch.equal(weights, found.weights[name]), name
    keys, values = torch.randn(2, 2, 2, 9, 16)
    assert torch.equal(made.score(keys, values, 99), found.score(keys, values, 99))
    random_gate(model, seed=4).save(path)
    assert gate.load(path, model).trained == {"seed": 4}, "a file that changed is read anew"


def test_the_users_own_gate_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"no gate of .*scripts/train_gate.py --model"):
        read(model, prompt(50), file=None)
    random_gate(model).save()
    assert_same_rows(read(model, prompt(100)), read(model, prompt(100), file=None))


def test_a_gate_of_another_model_is_refused(model, tmp_path):
    other = random_gate(tiny_model(seed=1)).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds a gate of .*weights_sha256"):
        read(model, prompt(50), file=str(other))
    narrow = random_gate(tiny_model(head_dim=8))
    narrow.model.update(model_of(model))
    with pytest.raises(ValueError, match="for keys and values of 8 dimensions; the model's have 16"):
        read(model, prompt(50), file=str(narrow.save(tmp_path / "narrow.safetensors")))


def test_damage_is_noticed(model, tmp_path):
    path = random_gate(model).save(tmp_path / "gate.safetensors")
    whole = path.read_bytes()
    for damaged, message in [(whole[:-9], "damaged"), (whole[:-9] + bytes(9), "its checksum is"), (b"{}", "damaged")]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            gate.load(path)
    for entry, message in [("[1]", "unknown format 'list'"), ("null", "unknown format 'NoneType'"), ("{", "damaged")]:
        save_file(dict(random_gate(model).weights), path, {gate.ENTRY: entry})
        with pytest.raises(ValueError, match=message):
            gate.load(path)
    with pytest.raises(ValueError, match="does not exist; the option 'file'"):
        gate.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="bias_in of the gate must be .2, 2, 8.; found .2, 2, 7."):
        made = random_gate(model)
        gate.Gate({**made.weights, "bias_in": made.weights["bias_in"][..., 1:]}, made.model)
    with pytest.raises(ValueError, match="a gate has the tensors .*'lengths'.*; found"):
        gate.Gate({name: x for name, x in made.weights.items() if name != "lengths"}, made.model)
    with pytest.raises(ValueError, match="scale of the gate holds numbers that are not finite"):
        gate.Gate({**made.weights, "scale": made.weights["scale"] * torch.inf}, made.model)


@pytest.mark.parametrize(("settings", "message"), [
    ({"file": 3}, "file must be the path of a gate or None; found 3"),
    ({"dimensions": {"kind": "zack"}}, "dimensions must be None, found"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig("gate", **settings)
