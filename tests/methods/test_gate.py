"""Gates: what they are fitted on, their files, and the rows that they keep."""

import json
from pathlib import Path

import pytest
import torch
from gate_files import GATES, random_gate
from safetensors.torch import save_file
from tiny_models import assert_close, assert_same_rows, left_padded, prompt, tiny_model, tiny_tokenizer

import asymkv
from asymkv import CompressedCache, CompressionConfig
from asymkv.gates import collect, fit, gate
from asymkv.head_scores import model_of
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.longbench.sample import sample_sha256
from asymkv.paths import config_path
from scripts.train_gate import main as train_gate

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
def test_the_best_rows_of_the_whole_cache_are_kept(model):
    """One threshold over layers and heads; sinks and window stay whatever they score."""
    ids = prompt(120)
    whole = read(model, ids, method="full")
    keys = torch.stack([whole.rope.rotate(x.dense("keys"), -x.dense("position").long())[0] for x in whole.layers])
    scores = random_gate(model).score(keys, torch.stack([x.dense("values")[0] for x in whole.layers]))
    cache = read(model, ids, layer_budgets="global")
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


def test_scores_depend_on_nothing_but_the_row(model):
    """Keys of layer 0 follow from the embedding alone: chunks change nothing there, though rows are lost in between."""
    ids = prompt(130)
    one, many = (read(model, ids, layer_budgets="uniform", chunk_size=chunk) for chunk in ("prompt", 16))
    assert many.compactions > one.compactions
    assert positions(one, 0) == positions(many, 0)


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
    assert torch.equal(made.score(keys, values), found.score(keys, values))
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
    with pytest.raises(ValueError, match="scale of the gate holds numbers that are not finite"):
        gate.Gate({**made.weights, "scale": made.weights["scale"] * torch.inf}, made.model)


@pytest.mark.parametrize(("settings", "message"), [
    ({"file": 3}, "file must be the path of a gate or None; found 3"),
    ({"dimensions": {"kind": "zack"}}, "dimensions must be None, found"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig("gate", **settings)


# -- training ----------------------------------------------------------------------------------------------------------
def planted_rows(name, count=400):
    """Scores that follow from the features, by another rule in every head."""
    rule = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) / 3
    x = torch.randn(4, count, 12).bfloat16()
    log_score = (x.float() * rule[:, None]).sum(-1) * 2 + x[..., 0].float().abs() - 5
    return fit.Rows(name, x, log_score.clamp(max=0).exp(), (2, 2))


def test_a_fit_finds_what_was_planted():
    """On rows that it has not seen."""
    seen = []
    train, test = [planted_rows(f"p{i}") for i in range(4)], [planted_rows("held out")]
    settings = fit.Fit(hidden=16, steps=200, batch=128, rate=1e-2)
    weights, found = fit.fit(train, test, settings, report_every=80, progress=lambda *step: seen.append(step))
    assert found["error"] < 0.2 * found["error_of_means"]
    assert found["overlap"]["0.25"] > 0.8 and found["mass"]["0.25"] > 0.9
    assert (found["passages"], found["rows_per_head"], found["held_out"]) == (4, 1600, 1)
    assert len(seen) == 200 and [step for step, measured in seen if measured] == [80, 160, 200]
    short = fit.Fit(hidden=4, steps=5, seed=1)
    (one, _), (two, _) = (fit.fit(train, test, short) for _ in range(2))
    assert all(torch.equal(x, two[name]) for name, x in one.items()), "a seed gives one gate"
    assert weights["weight_in"].shape == (2, 2, 12, 16) and weights["bias_out"].shape == (2, 2)


def test_agreement_of_a_perfect_and_of_a_blind_gate():
    rows = planted_rows("p")
    x = fit.target_of(rows.score)[..., None].bfloat16()
    exact = fit.Rows("p", x, x[..., 0].float().exp(), (2, 2))
    line = {"mean": torch.zeros(2, 2, 1), "scale": torch.ones(2, 2, 1), "bias_in": torch.full((2, 2, 1), 60.0),
            "weight_in": torch.ones(2, 2, 1, 1), "weight_out": torch.ones(2, 2, 1),
            "bias_out": torch.full((2, 2), -60.0)}  # fmt: skip
    best = fit.measure(line, [exact], ratios=(0.25,))
    assert best["error"] < 1e-6 and best["overlap"]["0.25"] > 0.99 and best["mass"]["0.25"] > 0.999
    blind = fit.measure({**line, "weight_out": -line["weight_out"]}, [exact], ratios=(0.25,))
    assert blind["overlap"]["0.25"] < 0.01


def test_a_collection_holds_what_kvzip_says(model, tmp_path):
    """A share of the rows of a window, with KVzip's own scores; done work is not done again, nor mixed with other."""
    tokenizer, recipe = tiny_tokenizer(), collect.Recipe(max_tokens=120, share=0.5)
    passage, folder = collect.Passage("kind", WORDS), collect.Folder(tmp_path)
    folder.claim(model, recipe)
    folder.add(model, tokenizer, passage, recipe)
    (path,) = folder.files()
    written = path.stat().st_mtime_ns
    folder.add(model, tokenizer, passage, recipe)
    assert path.stat().st_mtime_ns == written
    found = collect.score_rows(model, tokenizer, passage, recipe)
    kept = found["positions"]
    assert 30 < len(kept) < 90 and int(kept.max()) < 130 and found["scores"].min() >= 0
    rows = fit.read_rows(path)
    judged = (found["scores"] > 0).flatten(0, 1).any(0)
    use = (kept >= fit.SINKS) & judged
    assert_close("scores", found["scores"][:, :, use].flatten(0, 1), rows.score, 0)
    assert rows.x.shape == (4, int(use.sum()), 32) and rows.score.max() > 0
    with pytest.raises(ValueError, match="collected otherwise; take another folder"):
        folder.claim(model, collect.Recipe(max_tokens=120, share=1.0))
    for other in ({"half": "tune"}, {"left_out": collect.digest({"a context"})}, {"min_tokens": 100}):
        with pytest.raises(ValueError, match=f"take another folder.*{next(iter(other))}"):
            folder.claim(model, collect.Recipe(max_tokens=120, share=0.5, **other))
    assert collect.digest(["a", "b"]) == collect.digest({"b", "a"}) != collect.digest(["ab"]) and not collect.digest([])
    with pytest.raises(ValueError, match="was collected for .*weights_sha256"):
        folder.claim(tiny_model(seed=1), recipe)
    with pytest.raises(ValueError, match="at most max_tokens; found min_tokens = 200, max_tokens = 120"):
        collect.Recipe(max_tokens=120, min_tokens=200)
    with pytest.raises(ValueError, match="at least 64 are needed"):
        folder.add(model, tokenizer, collect.Passage("kind", "w1 w2"), recipe)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="delete it, and the collection makes it again"):
        fit.read_rows(path)


def test_a_chat_template_is_not_learnt_as_worthless(model, tmp_path):
    """KVzip keeps what stands before a context, and judges none of it: no score is no low score."""
    tokenizer, recipe = tiny_tokenizer(), collect.Recipe(max_tokens=120, share=1.0)
    tokenizer.chat_template = "{% for m in messages %}" + "w9 " * 20 + "{{ m.content }}{% endfor %}"
    folder, passage = collect.Folder(tmp_path), collect.Passage("kind", WORDS)
    folder.add(model, tokenizer, passage, recipe)
    found = collect.score_rows(model, tokenizer, passage, recipe)
    unjudged = (found["scores"] == 0).flatten(0, 1).all(0)
    assert unjudged[: int(unjudged.sum())].all() and int(unjudged.sum()) >= 20 > fit.SINKS
    (path,) = folder.files()
    assert fit.read_rows(path).score.shape[1] == len(unjudged) - int(unjudged.sum())


def test_a_passage_is_trained_on_or_measured_on(tmp_path):
    """Also where two folders hold it."""
    files = [tmp_path / folder / f"p{i}.safetensors" for folder in "ab" for i in range(8)]
    train, measured = fit.split(files, 4)
    assert len(train) == 12 and len(measured) == 4
    assert not {f.stem for f in train} & {f.stem for f in measured}


class Letters:
    """Tokenizes into characters."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) for letter in text]}


def test_contexts_of_one_half_and_none_of_a_sample(tmp_path):
    rows = [{"_id": f"{i}", "context": f"text {i:03} " * (9 + i), "input": "q", "answers": ["a"], "length": 9,
             "dataset": "qasper", "language": "en", "all_classes": None} for i in range(30)]  # fmt: skip
    (tmp_path / "qasper.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def passages(count=99, left_out=(), **recipe):
        given = Letters(), collect.Recipe(**recipe), left_out
        return [p.text for p in collect.task_passages("qasper", tmp_path, count, *given)]

    halves = [set(passages(half=half)) for half in ("tune", "report")]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 30
    assert passages(half="tune", left_out=halves[0]) == []
    assert len(passages(3)) == 3
    assert sorted(map(len, passages(min_tokens=9 * 36))) == [9 * n for n in range(36, 39)]
    text = rows[0]["context"]
    again = {**rows[0], "_id": "again", "context": "".join(map(chr, range(400, 700))) + text * 2}
    (tmp_path / "qasper.jsonl").write_text("\n".join(map(json.dumps, [rows[0], again])), encoding="utf-8")
    assert len(passages()) == 2
    assert passages(left_out={text}) == [], "made of a left out context's text"
    groups = [[collect.Passage(kind, str(i)) for i in range(n)] for kind, n in (("a", 1), ("b", 3))]
    assert [p.kind + p.text for p in collect.take_turns(groups)] == ["a0", "b0", "b1", "b2"]


def test_no_passage_shares_text_with_a_sample_of_another_task(tmp_path):
    """A haystack may be the report of another task, or a page of a book."""
    report, other = ("".join(map(chr, range(start, start + 300))) for start in (400, 1000))
    row = {"_id": "0", "input": "q", "answers": ["a"], "length": 9, "language": "en", "all_classes": None}
    for task, contexts in {"gov_report": [report], "needle": [report + "!", other]}.items():
        lines = [json.dumps({**row, "_id": str(i), "context": c, "dataset": task}) for i, c in enumerate(contexts)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sample = tmp_path / "sample.json"
    tasks = {"gov_report": ["0"]}
    content = {"tasks": tasks, "sha256": sample_sha256(tasks), "max_prompt_tokens": 99}
    sample.write_text(json.dumps(content), encoding="utf-8")
    left_out = collect.sample_contexts([sample], tmp_path)
    assert left_out == {report}
    recipe = collect.Recipe(max_tokens=64)
    assert [p.text for p in collect.task_passages("needle", tmp_path, 9, Letters(), recipe, left_out)] == [other]
    book = tmp_path / "book.txt"
    book.write_text(" ".join(["w1"] * 80), encoding="utf-8")
    assert len(collect.file_passages(book, 2, tiny_tokenizer(), recipe)) == 2
    assert collect.file_passages(book, 2, tiny_tokenizer(), recipe, {" ".join(["w1"] * 90)}) == []


def test_the_script_trains_a_gate_that_the_method_takes(model, tmp_path, monkeypatch):
    """Both stages on a text; what is missing is said."""
    text, folder = tmp_path / "text.txt", str(tmp_path / "model")
    text.write_text(WORDS, encoding="utf-8")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cache"))
    given = ["--model", folder, "--work", str(tmp_path / "work"), "--dtype", "float32", "--device", "cpu"]
    with pytest.raises(ValueError, match="holds no collection"):
        train_gate([*given, "--stage", "fit"])
    given += ["--texts", str(text), "--windows", "3", "--max-tokens", "100", "--steps", "30", "--hidden", "4"]
    with pytest.raises(ValueError, match="3 passages are too few to hold out one of 6"):
        train_gate(given)
    assert train_gate([*given, "--held-out", "3"]) == 0
    report = json.loads(gate.default_path(model_of(model)).with_suffix(".json").read_text(encoding="utf-8"))
    assert (report["passages"], report["held_out"], report["kinds"]) == (2, 1, ["text"])
    assert report["error"] < report["error_of_means"] * 1.5
    assert read(model, prompt(100), file=None).num_rows(0).sum() > 0
    text.write_text("w1 w2", encoding="utf-8")
    with pytest.raises(ValueError, match="text.txt has 2 tokens; a passage takes 100"):
        train_gate(given)


@pytest.mark.smollm2
def test_smollm2_has_a_gate_that_finds_what_kvzip_keeps():
    """On a text that it was not trained on."""
    spec = resolve_spec("smollm2")
    smollm2, tokenizer = load_model(spec, dtype="bfloat16"), load_tokenizer(spec)
    path = gate.find(smollm2)
    assert path == config_path("gates/smollm2.safetensors") and path.stat().st_size < 1_000_000
    shipped = gate.load(path, smollm2)
    text = collect.Passage("license", (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"))
    found = collect.score_rows(smollm2, tokenizer, text, collect.Recipe(max_tokens=300, share=1.0))
    x = gate.features(found["keys"], found["values"])[:, :, fit.SINKS :]
    rows = fit.Rows("license", x.flatten(0, 1), found["scores"][:, :, fit.SINKS :].flatten(0, 1), (30, 3))
    measured = fit.measure(shipped.weights, [rows])
    assert measured["overlap"]["0.25"] > 0.65 and measured["mass"]["0.25"] > 0.9
