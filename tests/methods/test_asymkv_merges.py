"""AsymKV's ways to merge keys: turned or not, at the last position or the mean, against a loop over the runs."""

import pytest
import torch
from test_asymkv import chosen_pairs, make_view, method
from tiny_models import assert_close

from asymkv.config import CompressionConfig
from asymkv.layer import CompressedLayer
from asymkv.plan import contract_pairs, execute


@pytest.mark.parametrize("weights", ["curvature", "mean", "attention"])
@pytest.mark.parametrize(("keys", "position"), [("pre_rope", "last"), ("pre_rope", "mean"), ("post_rope", "last"),
                                                ("post_rope", "mean")])  # fmt: skip
def test_where_and_how_keys_merge(weights, keys, position):
    """Against a loop over the runs; "pre_rope" and "last" go through the executor, the others change the view."""
    layer, view = make_view()
    layer = CompressedLayer()
    layer.append(view.keys, view.values)
    layer.storage.write("cardinality", view.cardinality.flatten(0, 1))
    options = method(key_weights=weights, merged_keys=keys, merged_position=position)
    pairs = chosen_pairs(options, view)
    weight = options.key_weight(view, pairs, contract_pairs(pairs))
    weight = view.cardinality if weight is None else weight
    destination = contract_pairs(pairs)[0, 0]
    old = {"keys": view.keys[0, 0], "turned back": view.unrotate(view.keys)[0, 0], "values": view.values[0, 0],
           "n": view.cardinality[0, 0].double(), "at": view.positions[0, 0].double(), "weight": weight[0, 0].double()}
    old = {name: x.clone() for name, x in old.items()}  # fmt: skip
    storage = execute(options.carry_out(view, pairs), view, layer.storage, "original")
    wide = False
    for new, last in enumerate(destination.unique().tolist()):
        run = destination == last
        w, n = old["weight"][run], old["n"][run]
        at = round(float((n * old["at"][run]).sum() / n.sum())) if position == "mean" else old["at"][run][-1]
        key = (w[:, None] * old["keys" if keys == "post_rope" else "turned back"][run]).sum(0) / w.sum()
        if keys == "pre_rope" or len(w) == 1:
            key = old["keys"][run][0] if len(w) == 1 else view.rope.rotate(key, torch.tensor(int(at)))
        wide |= len(w) > 2
        assert storage.rows("position", 0)[new] == at and storage.rows("cardinality", 0)[new] == n.sum()
        assert_close("key", key, storage.rows("keys", 0)[new], 1e-6)
        value = (n[:, None] * old["values"][run]).sum(0) / n.sum()
        assert_close("value", value, storage.rows("values", 0)[new], 1e-6)
    assert wide, "runs of two tell little"


@pytest.mark.parametrize(("settings", "message"), [
    ({"merged_position": "first"}, "merged_position='first'.*'last', 'mean'"),
    ({"merged_keys": "post_rope", "curvature": "output"}, "curvature='output' weighs dimensions.*found 'post_rope'"),
    ({"merged_position": "mean", "position_policy": "compact"}, "need upstream_compat=False and position_policy"),
    ({"merged_position": "mean", "upstream_compat": True}, "found .*upstream_compat=True"),
], ids=str)  # fmt: skip
def test_ways_to_merge_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig("asymkv", budget=64, **settings)


@pytest.mark.parametrize("name", ["asymkv_evict", "asymkv_symmetric"])
def test_controls_have_no_other_way_to_merge(name):
    with pytest.raises(ValueError, match="merged_position 'last', found 'pre_rope' and 'mean'"):
        CompressionConfig(name, budget=64, merged_position="mean")
