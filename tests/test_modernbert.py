"""What ModernBERT's config.json says of layers and rotations is honoured or refused, in the words of both releases."""

import numpy as np
import pytest

from bert_adapter.families import FAMILIES
from bert_adapter.families.modernbert import FULL, LOCAL, ModernBertConfig, near, older

read = FAMILIES["modernbert"].config


def rope(full, local):
    return {"rope_parameters": {FULL: {"rope_type": "default"} | full, LOCAL: {"rope_type": "default"} | local}}


@pytest.mark.parametrize(
    ("entries", "thetas"),
    [
        ({}, (160_000, 10_000)),
        ({"global_rope_theta": 500, "local_rope_theta": 20.5}, (500, 20.5)),
        ({"global_rope_theta": 500, "local_rope_theta": None}, (500, 500)),
        (rope({"rope_theta": 500}, {"rope_theta": 20.5}), (500, 20.5)),
        (rope({}, {}), (160_000, 10_000)),
        (rope({}, {}) | {"global_rope_theta": 500}, (500, 10_000)),
        (rope({"rope_theta": 500.0}, {}) | {"global_rope_theta": 500}, (500, 10_000)),
        ({"rope_parameters": None, "rope_scaling": None}, (160_000, 10_000)),
        ({"rope_parameters": {LOCAL: {"rope_theta": 5}}}, (160_000, 5)),
    ],
)
def test_bases_of_rotations_are_read_in_both_notations(entries, thetas):
    assert read(entries).thetas == thetas


@pytest.mark.parametrize(
    ("entries", "types"),
    [
        ({}, (FULL, LOCAL, LOCAL, FULL)),
        ({"global_attn_every_n_layers": 2}, (FULL, LOCAL, FULL, LOCAL)),
        ({"global_attn_every_n_layers": 1}, (FULL, FULL, FULL, FULL)),
        ({"layer_types": [LOCAL, FULL, LOCAL, LOCAL], "global_attn_every_n_layers": 3}, (LOCAL, FULL, LOCAL, LOCAL)),
    ],
)
def test_local_layers_are_counted_or_listed(entries, types):
    assert read({"num_hidden_layers": 4} | entries).layer_types == types


@pytest.mark.parametrize(
    ("types", "step"),
    [([FULL, LOCAL, LOCAL, FULL, LOCAL], 3), ([FULL, FULL], 1), ([FULL, LOCAL, LOCAL], 3), ([FULL], 1)],
)
def test_exports_say_the_same_to_older_releases(types, step):
    config = read(
        rope({"rope_theta": 500}, {"rope_theta": 20}) | {"layer_types": types, "num_hidden_layers": len(types)}
    )
    found = older(config)
    assert found == {"global_attn_every_n_layers": step, "global_rope_theta": 500, "local_rope_theta": 20}
    again = read(found | {"num_hidden_layers": len(types)})
    assert (again.layer_types, again.thetas) == (config.layer_types, config.thetas)


@pytest.mark.parametrize("types", [[LOCAL, FULL], [FULL, LOCAL, FULL, FULL], [FULL, FULL, LOCAL]])
def test_layers_that_older_releases_do_not_compute_are_not_exported(types):
    with pytest.raises(ValueError, match=r"layer_types: got .*transformers before 5 computes no others"):
        older(read({"layer_types": types, "num_hidden_layers": len(types)}))


def test_entries_are_read_under_their_own_names():
    got = read(
        {"norm_eps": 1e-6, "hidden_activation": "relu", "embedding_dropout": 0.1, "attention_dropout": 0.2}
        | {"mlp_dropout": 0.3, "classifier_dropout": 0.4, "norm_bias": True, "classifier_pooling": "mean"}
    )
    assert (got.layer_norm_eps, got.hidden_act, got.norm_bias) == (1e-6, "relu", True)
    assert (got.hidden_dropout_prob, got.attention_probs_dropout_prob) == (0.1, 0.2)
    assert (got.mlp_dropout, got.classifier_dropout, got.classifier_pooling) == (0.3, 0.4, "mean")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"layer_types": [FULL, LOCAL]}, "layer_types: got .*wanted 'full_attention' or .* for each of 22 layers"),
        ({"layer_types": [FULL] * 21 + ["chunked"]}, "layer_types: got .*wanted"),
        ({"rope_parameters": {"rope_theta": 5}}, "rope_parameters: got .*wanted an object with 'full_attention'"),
        (rope({"rope_theta": 0}, {}), "rope_parameters full_attention: got 0, wanted a positive number"),
        (rope({"rope_theta": True}, {}), "rope_parameters full_attention: got true, wanted a positive number"),
        (rope({}, {"rope_type": "yarn"}), "rope_parameters sliding_attention: got rope_type .yarn."),
        (rope({}, {"factor": 2}), "rope_parameters sliding_attention: got .*supported"),
        (rope({"rope_theta": 5}, {}) | {"global_rope_theta": 6}, "global_rope_theta: got 6, and 5 in rope_parameters"),
        ({"global_rope_theta": "5"}, "global_rope_theta: got .5., wanted a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling: got .*supported: None"),
        ({"rope_theta": 5}, "rope_theta: got 5, supported: None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, supported: 1.0"),
        ({"classifier_pooling": "max"}, "classifier_pooling: got 'max', supported: 'cls', 'mean'"),
        ({"norm_bias": 1}, "norm_bias: got 1, wanted true or false"),
        ({"local_attention": 0}, "local_attention: got 0, wanted a positive integer"),
        ({"hidden_activation": "silu"}, "hidden_activation: got .silu., wanted one of 'gelu'"),
        ({"classifier_activation": "silu"}, "classifier_activation: got .silu., wanted one of 'gelu'"),
        ({"hidden_size": 36}, "num_attention_heads: got 12, of size 3, wanted heads of an even size"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(entries, said):
    with pytest.raises(ValueError, match=said):
        read(entries)


@pytest.mark.parametrize(("width", "reach"), [(6, 3), (7, 3), (1, 0)])
def test_a_window_reaches_half_its_width_to_both_sides(width, reach):
    seen = np.asarray(near(9, ModernBertConfig(local_attention=width)))
    assert seen.shape == (1, 1, 9, 9)
    np.testing.assert_array_equal(seen[0, 0], abs(np.subtract.outer(np.arange(9), np.arange(9))) <= reach)
