"""ZACK's bases and ranks: what is measured, what it is made of, and what is refused (arXiv 2408.04107)."""


import pytest
import torch
from tiny_models import assert_close, prompt, tiny_model
from zack_bases import BASES, zack

import asymkv
from asymkv import CompressedCache
from asymkv.analysis import zack_basis
from asymkv.analysis.zack_basis import calibrate, gram, grams_of, joint_gram
from asymkv.dimensions.basis import MANIFEST, OBJECTIVES, TENSORS, UNFINISHED, Basis, factors, load, spectrum
from asymkv.dimensions.projection import narrowed
from asymkv.dimensions.ranks import choose_ranks

LAYERS, HEADS, SIZE = 2, 2, 16


def filled(tokens=100, method="zack", *, batch=1, dimensions=None, model=None, **settings):
    """Model and cache after a prompt."""
    model = model or tiny_model()
    with asymkv.replace("llama", model=model, method=method, dimensions=dimensions or zack(), **settings):
        return model, model(prompt(tokens, batch=batch)).past_key_values


# -- bases -------------------------------------------------------------------------------------------------------------
def test_worked_example():
    queries = torch.tensor([[[1, 1], [2, 2], [1, 1.2]]])
    keys = torch.tensor([[[1, 1], [3, 3], [0.5, 0.6]]])
    energy, vectors = spectrum(joint_gram(queries, keys))
    assert energy[0].sqrt().tolist() == pytest.approx([5.7469, 0.1507], abs=1e-4)
    assert vectors[0, :, 0].abs().tolist() == pytest.approx([0.70119, 0.71297], abs=1e-5)
    # "Energy" is of squared singular values; of the values themselves the first has 0.97445.
    assert (energy[0, 0] / energy[0].sum()).item() == pytest.approx(0.99931, abs=1e-5)
    assert (energy[0, 0].sqrt() / energy[0].sqrt().sum()).item() == pytest.approx(0.97445, abs=1e-5)
    short = [narrowed(x[None], vectors[:, :, :1]) for x in (queries.double(), keys.double())]
    error = short[0] @ short[1].mT - (queries @ keys.mT)[None]
    assert error.abs().max().item() == pytest.approx(0.00825, abs=1e-5)


def test_keys_count_once_for_every_query_head():
    queries, keys = torch.randn(6, 30, 8), torch.randn(2, 30, 8)
    rows = [torch.cat([*queries[3 * g : 3 * g + 3], keys[g], keys[g], keys[g]]).double() for g in range(2)]
    assert_close("gram", torch.stack([x.T @ x for x in rows]), joint_gram(queries, keys), 1e-12)


def test_grams_do_not_leave_the_range_of_half_types():
    rows = torch.full((1, 64, 4), 200.0, dtype=torch.float16)
    assert gram(rows)[0, 0, 0] == 64 * 200.0**2


def test_basis_is_orthonormal_and_orders_energy():
    basis = load(BASES, tiny_model()).joint
    assert basis.queries is basis.keys and basis.outputs is basis.values
    for vectors, energy in ((basis.keys, basis.key_energy), (basis.values, basis.value_energy)):
        assert vectors.shape == (LAYERS, HEADS, SIZE, SIZE)
        assert_close("identity", torch.eye(SIZE).expand_as(vectors), vectors.mT @ vectors, 1e-5)
        assert (energy.diff(dim=-1) <= 0).all() and (energy >= 0).all()


def test_values_share_their_basis_with_the_output_projection():
    """The basis diagonalises V^T V + W_O^T W_O of the group; W_O alone where no value is."""
    model, ids = tiny_model(), prompt(64, seed=9)[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
            layer.self_attn.v_proj.bias.zero_()
    basis = calibrate(model, [ids]).joint
    weight = model.model.layers[1].self_attn.o_proj.weight.double()
    for head in range(HEADS):
        columns = weight[:, head * 2 * SIZE : (head + 1) * 2 * SIZE].unflatten(1, (2, SIZE)).flatten(0, 1)
        assert_close("energy", torch.linalg.svdvals(columns).square(), basis.value_energy[1, head], 1e-9)


# -- bases of what attention makes of them -----------------------------------------------------------------------------
def cut_product(left, right, a, b, rank):
    return (left @ a[:, :rank]) @ (right @ b[:, :rank]).mT


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_are_the_best_for_products(rank):
    """Of rank r nothing is nearer to ``X Y^T`` than its truncated SVD, and these reach it (Eckart-Young)."""
    torch.manual_seed(0)
    left, right = torch.randn(40, 6).double() @ torch.randn(6, 6).double(), torch.randn(50, 6).double()
    a, b, energy = factors(gram(left), gram(right))
    singular = torch.linalg.svdvals(left @ right.mT)[:6]
    assert_close("energy", singular.square(), energy, 1e-9)
    assert_close("identity", torch.eye(6, dtype=torch.double), a @ b.mT, 1e-9)
    error = (left @ right.mT - cut_product(left, right, a, b, rank)).square().sum()
    assert error.item() == pytest.approx(singular[rank:].square().sum().item(), abs=1e-8)
    joint = spectrum(gram(left) + gram(right))[1]
    assert error <= (left @ right.mT - cut_product(left, right, joint, joint, rank)).square().sum() + 1e-8
    sizes = [(x @ m).square().sum(0) for x, m in ((left, a), (right, b))]
    assert_close("balance", *sizes, 1e-9)


def test_factors_of_rows_that_lack_a_direction():
    left, right = torch.randn(30, 4).double(), torch.randn(30, 4).double()
    left[:, 2] = 0
    a, b, energy = factors(gram(left), gram(right))
    assert a.isfinite().all() and b.isfinite().all() and energy[-1] < 1e-6 * energy[0]
    assert_close("identity", torch.eye(4, dtype=torch.double), a @ b.mT, 1e-6)
    assert_close("product", left @ right.mT, cut_product(left, right, a, b, 3), 1e-3)


def test_attention_is_summed_as_the_stock_model_computes_it():
    """Weights and outputs of eager attention, one head at a time; the second block of queries begins in the middle."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(4, 700, 8), torch.randn(2, 700, 8), torch.randn(2, 700, 8)
    found = grams_of(queries, keys, values, 0.3)
    for group in range(2):
        received, outputs = torch.zeros(700, dtype=torch.double), torch.zeros(8, 8, dtype=torch.double)
        for query in queries[2 * group : 2 * group + 2].double():
            logits = 0.3 * query @ keys[group].double().T
            weights = logits.masked_fill(torch.ones(700, 700).triu(1).bool(), -torch.inf).softmax(-1)
            received += weights.sum(0)
            outputs += gram(weights @ values[group].double())
        attended = (received[:, None] * keys[group].double()).T @ keys[group].double()
        assert_close("attended", attended, found["attended"][group], 1e-5)
        assert_close("outputs", outputs, found["outputs"][group], 1e-5)
        assert_close("queries", gram(queries[2 * group : 2 * group + 2].flatten(0, 1)), found["queries"][group], 1e-9)


def test_directions_of_attention_are_exact_when_none_is_cut():
    model = tiny_model()
    ids = prompt(100)
    ref = model(ids).logits
    for objective in ("joint", "attention"):
        for fold in (False, True):
            rows = zack(1.0, objective=objective, fold=fold)
            with asymkv.replace("llama", model=model, method="zack", dimensions=rows):
                assert_close(f"{objective} {fold}", ref, model(ids).logits, 1e-4)


def test_directions_of_attention_lose_less_of_its_output(tmp_path):
    """On the text that they were measured on, at the same ranks, with one layer to look at."""
    model, ids = tiny_model(num_hidden_layers=1), prompt(64, seed=9)
    calibrate(model, [ids[0]]).save(tmp_path)
    whole, errors = attention_output(model, ids), {}
    for objective in OBJECTIVES:
        rows = zack(0.25, objective=objective, ranks="uniform", keys=False, basis=str(tmp_path))
        with asymkv.replace("llama", model=model, method="zack", dimensions=rows):
            errors[objective] = (attention_output(model, ids) - whole).square().sum().item()
    assert 0 < errors["attention"] < errors["joint"]


def attention_output(model, ids):
    """What the first layer's attention adds to the residual stream."""
    found = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: found.append(out[0]))
    model(ids)
    handle.remove()
    return found[0]


# -- ranks -------------------------------------------------------------------------------------------------------------
ENERGY = torch.tensor([[[8.0, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625], [1.0] * 8], [[9.0, 1, 0, 0, 0, 0, 0, 0], [1.0] * 8]])


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("policy", ["layer", "energy"])
def test_ranks_sum_to_the_budget(policy, ratio):
    ranks = choose_ranks(ENERGY, ratio, policy, multiple=2, least=2)
    units = 2 if policy == "layer" else 4
    blocks = int(ratio * units * 4 + 1e-9)
    assert ranks.sum() == blocks * 2 * (4 // units)
    assert (ranks >= 2).all() and (ranks <= 8).all() and (ranks % 2 == 0).all()
    assert policy == "energy" or (ranks[:, 0] == ranks[:, 1]).all()


def test_ranks_go_where_the_energy_is():
    """Flat heads take what peaked ones do not need; no other choice of as many blocks keeps more energy."""
    assert choose_ranks(ENERGY, 0.5, "energy", multiple=2, least=2).tolist() == [[2, 6], [2, 6]]
    share = (ENERGY / ENERGY.sum(-1, keepdim=True)).flatten(0, 1)

    def kept(ranks):
        return sum(share[u, :r].sum().item() for u, r in enumerate(ranks))

    best = max(kept((a, b, c, 16 - a - b - c)) for a in (2, 4, 6, 8) for b in (2, 4, 6, 8) for c in (2, 4, 6, 8)
               if 16 - a - b - c in (2, 4, 6, 8))  # fmt: skip
    assert kept(choose_ranks(ENERGY, 0.5, "energy", multiple=2, least=2).flatten().tolist()) == pytest.approx(best)


def test_more_budget_never_takes_dimensions_away():
    for policy in ("layer", "energy", "uniform"):
        steps = [choose_ranks(ENERGY, r / 8, policy, multiple=2, least=2) for r in range(2, 9)]
        assert all((b >= a).all() for a, b in zip(steps, steps[1:], strict=False))
        assert (steps[-1] == 8).all()


def test_uniform_ranks_round_up():
    assert (choose_ranks(ENERGY, 0.3, "uniform", multiple=2, least=2) == 4).all()
    assert (choose_ranks(ENERGY, 0.1, "uniform", multiple=2, least=2) == 2).all()


@pytest.mark.parametrize(("given", "message"), [
    ({"ratio": 0.1}, r"ratio=0.1 leaves 1 blocks.*4 heads or layers, which keep 1 of 4"),
    ({"multiple": 6}, r"multiple=6 does not divide the head size 8; allowed: \[2, 4, 8\]"),
    ({"least": 10}, "least=10 is above the head size 8"),
])  # fmt: skip
def test_ranks_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        choose_ranks(ENERGY, **{"ratio": 0.5, "policy": "energy", "multiple": 2, "least": 2, **given})


def test_given_ranks_are_stored(tmp_path):
    """One for all, one a layer, one a head, and keys apart from values; an odd one has a zero behind it."""
    cases = [
        (6, [[6, 6]] * 2, [[6, 6]] * 2), ([4, 9], [[4, 4], [9, 9]], [[4, 4], [9, 9]]),
        ({"keys": [[2, 16], 3], "values": 16}, [[2, 16], [3, 3]], [[16, 16]] * 2),
    ]  # fmt: skip
    for ranks, keys, values in cases:
        _, cache = filled(dimensions=zack(None, ranks=ranks))
        for layer, own in enumerate(zip(keys, values, strict=True)):
            assert cache.projections[layer].widths(SIZE) == tuple(max(each) + max(each) % 2 for each in own)
            for stored, rank in zip((cache.keys(layer)[0], cache.values(layer)[0]), own, strict=True):
                for head, n in enumerate(rank):
                    assert (stored[head][:, n:] == 0).all() and (stored[head][:, :n] != 0).any()
        cache.save(tmp_path / str(ranks))
        again = CompressedCache.load(tmp_path / str(ranks), tiny_model())
        assert again.projections[0].widths(SIZE) == cache.projections[0].widths(SIZE)


@pytest.mark.parametrize(("ranks", "message"), [
    (0, "a rank of dimensions='zack' must be an integer >= 1; found 0"),
    ([8, [8, -1]], "a rank of dimensions='zack' must be an integer >= 1; found -1"),
    (2.5, "a rank of dimensions='zack' must be an integer >= 1; found 2.5"),
    ({"keys": 8}, r"must name keys and values; found \['keys'\]"),
    (17, "for keys of layer 0: 17 is above the head size 16; allowed: 1 to 16"),
    ({"keys": 8, "values": [8, [16, 20]]}, "for values of layer 1: 20 is above the head size 16"),
    ([8, 8, 8], "are of 3 layers; the model has 2"),
    ([8, [8, 8, 8]], "of layer 1 are of 3 heads; the model has 2 KV heads"),
])  # fmt: skip
def test_given_ranks_that_cannot_be(ranks, message):
    with pytest.raises(ValueError, match=message):
        filled(dimensions=zack(None, ranks=ranks))


# -- files -------------------------------------------------------------------------------------------------------------
def test_a_basis_belongs_to_its_model(tmp_path):
    calibrate(tiny_model(), [prompt(64)[0]]).save(tmp_path)
    with pytest.raises(ValueError, match="holds a basis of .*weights_sha256"):
        filled(model=tiny_model(seed=5), dimensions={"kind": "zack", "basis": str(tmp_path)})


def test_a_missing_basis_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="is missing; python scripts/calibrate_zack.py --model"):
        filled(dimensions="zack")
    calibrate(tiny_model(), [prompt(64)[0]]).save()
    _, cache = filled(dimensions={"kind": "zack"})
    assert cache.projections[0].widths(SIZE) == (8, 8)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_damage_is_noticed(tmp_path, name):
    calibrate(tiny_model(), [prompt(64)[0]]).save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) * 3 // 4] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path, tiny_model())


def test_an_interrupted_calibration_goes_on(tmp_path):
    model, samples = tiny_model(), [prompt(40, seed=s)[0] for s in range(4)]

    def interrupt(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, folder=tmp_path, progress=interrupt)
    with pytest.raises(ValueError, match="is not finished; .*goes on where it was interrupted"):
        load(tmp_path, model)
    with pytest.raises(ValueError, match="of other samples .*2 of them done"):
        calibrate(model, samples[:3], folder=tmp_path)
    seen = []
    resumed = calibrate(model, samples, folder=tmp_path, progress=seen.append)
    whole = calibrate(model, samples)
    assert seen == [3, 4]
    for kind in OBJECTIVES:
        for name, expected in whole.of(kind).tensors().items():
            assert torch.equal(resumed.of(kind).tensors()[name], expected), (kind, name)


@pytest.mark.parametrize("place", [20, 200, -9], ids=["header", "told", "sums"])
def test_sums_of_an_interrupted_calibration_are_checked(tmp_path, place):
    model, samples = tiny_model(), [prompt(40, seed=s)[0] for s in range(2)]
    sums = zack_basis.Sums.resume(model, samples, None)
    sums.add(model, samples[0])
    sums.save(tmp_path)
    data = bytearray((tmp_path / UNFINISHED).read_bytes())
    data[place] ^= 1
    (tmp_path / UNFINISHED).write_bytes(data)
    with pytest.raises(ValueError, match=UNFINISHED + " (is damaged|is no unfinished).*remove it to begin anew"):
        calibrate(model, samples, folder=tmp_path)


def test_a_kill_while_sums_are_saved_leaves_those_of_before(tmp_path, monkeypatch):
    """One file holds the sums and how many samples are in them: it is replaced or it is not."""
    model, samples = tiny_model(), [prompt(40, seed=s)[0] for s in range(3)]
    sums = zack_basis.Sums.resume(model, samples, None)
    sums.add(model, samples[0])
    sums.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]
    sums.add(model, samples[1])
    with monkeypatch.context() as patch:
        patch.setattr(zack_basis, "replace_file", killed(zack_basis.replace_file))
        with pytest.raises(KeyboardInterrupt):
            sums.save(tmp_path)
    resumed = zack_basis.Sums.resume(model, samples, tmp_path)
    assert resumed.samples == 1
    resumed, whole = calibrate(model, samples, folder=tmp_path), calibrate(model, samples)
    assert torch.equal(resumed.joint.keys, whole.joint.keys)


def killed(replace_file):
    """Dies when the new file has been written and not yet moved into place."""
    def write(path, fill):
        def dies(target):
            fill(target)
            raise KeyboardInterrupt

        return replace_file(path, dies)

    return write


def test_an_interruption_finds_sums_of_whole_samples(monkeypatch):
    """Whatever is added last: all sums and their count change together."""
    model, sample = tiny_model(), prompt(40)[0]
    sums = zack_basis.Sums.resume(model, [sample], None)

    class Interrupted(torch.Tensor):
        def __radd__(self, other):
            raise KeyboardInterrupt

        __add__ = __iadd__ = __radd__

    last = list(sums.grams)[-1]
    sums.total = ({**sums.grams, last: sums.grams[last].as_subclass(Interrupted)}, 0)
    with pytest.raises(KeyboardInterrupt):
        sums.add(model, sample)
    assert sums.samples == 0 and not any(gram.any() for gram in sums.grams.values())


def test_sums_survive_an_interruption_of_the_bases_themselves(tmp_path, monkeypatch):
    model, samples = tiny_model(), [prompt(40, seed=s)[0] for s in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(zack_basis, "output_grams", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, samples, folder=tmp_path)
    seen = []
    calibrate(model, samples, folder=tmp_path, progress=seen.append)
    assert not seen


def test_sums_of_another_model_are_refused(tmp_path):
    sample = prompt(40)[0]
    sums = zack_basis.Sums.resume(tiny_model(), [sample], None)
    sums.add(tiny_model(), sample)
    sums.save(tmp_path)
    with pytest.raises(ValueError, match="holds an unfinished calibration of .*weights_sha256"):
        calibrate(tiny_model(seed=5), [sample], folder=tmp_path)


def test_states_that_are_not_finite_are_not_summed():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="of sample 0 are not finite"):
        calibrate(model, [prompt(64)[0]])
    with pytest.raises(ValueError, match="needs at least as many tokens; found 10 in 1 samples"):
        calibrate(tiny_model(), [prompt(10)[0]])


def test_a_basis_keeps_what_it_was_measured_on(tmp_path):
    made = calibrate(tiny_model(), [prompt(64)[0]])
    made.save(tmp_path)
    found = load(tmp_path, tiny_model())
    assert isinstance(found, Basis) and found.measured["tokens"] == 64
    assert found.sha256
    for kind in OBJECTIVES:
        for name, tensor in made.of(kind).tensors().items():
            assert torch.equal(found.of(kind).tensors()[name], tensor), (kind, name)


