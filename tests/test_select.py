"""Patterns select kernels, and budgets choose their ranks."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from bert_adapter.factorisation import factorise
from bert_adapter.kernels import break_even, choose_ranks, parameter_count, select_kernels, shape_of_kernel, split_axes
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.places import in_brief
from bert_adapter.sample import sample_model

MODEL = sample_model(hidden_size=8, intermediate_size=12)
CLASSIFIER = sample_model(hidden_size=8, intermediate_size=12, architectures=["BertForSequenceClassification"])
LAYER = "encoder/layer/0"
QUERY, KEY, VALUE = (f"{LAYER}/attention/self/{name}" for name in ("query", "key", "value"))
OUT, UP, DOWN = (f"{LAYER}/{name}/dense" for name in ("attention/output", "intermediate", "output"))
SHAPES = {"wide": (4, 12), "square": (8, 8)}  # break even at 3 and 4


def test_default_selects_the_kernels_of_the_encoder_with_their_shapes():
    square = dict.fromkeys((QUERY, KEY, VALUE, OUT), (8, 8))
    assert select_kernels(MODEL) == square | {UP: (8, 12), DOWN: (12, 8)}


def test_default_selects_the_encoder_below_a_classifier():
    assert select_kernels(CLASSIFIER) == {f"bert/{path}": shape for path, shape in select_kernels(MODEL).items()}


def test_include_is_searched_anywhere_in_the_path():
    assert set(select_kernels(MODEL, include="query|pooler")) == {QUERY, "pooler/dense"}


def test_exclude_takes_away_what_include_found():
    assert set(select_kernels(MODEL, exclude=r"/(key|query|value)$")) == {OUT, UP, DOWN}


def test_patterns_see_the_path_of_the_module_alone():
    with pytest.raises(ValueError, match="select none of"):
        select_kernels(MODEL, include="kernel")


def test_nothing_selected_names_both_patterns_and_what_could_be():
    with pytest.raises(
        ValueError, match=r"include='decoder' and exclude='x' select none of \['embeddings/word.*'encoder/layer/0.*pool"
    ):
        select_kernels(MODEL, include="decoder", exclude="x")


def test_a_message_names_one_path_for_those_of_a_kind_and_no_more_than_twelve():
    assert in_brief([f"layer/{i}/query" for i in range(24)] + ["pooler"]) == "['layer/#/query', 'pooler']"
    assert in_brief(f"{letter}/0" for letter in "abcdefghijklmn").endswith("'l/0'] and 2 more")


@pytest.fixture(scope="module")
def half_done():
    done = {"kernel": FACTORISED, "left": np.zeros((8, 1)), "right": np.zeros((1, 8)), "bias": np.zeros(8)}
    return MODEL._replace(params=MODEL.params | {"pooler": {"dense": done}})


def test_selected_kernel_that_is_factorised_already_is_named(half_done):
    with pytest.raises(ValueError, match=r"1 of the selected kernels are factorised already, 'pooler/dense' first"):
        select_kernels(half_done, include="encoder|pooler")


def test_factorised_kernels_that_are_not_selected_do_not_matter(half_done):
    assert select_kernels(half_done) == select_kernels(MODEL)


def test_axes_are_split_where_both_sides_fit():
    assert split_axes("a", (6, 2, 3), (6, 6)) == ((6,), (2, 3))
    assert split_axes("a", (2, 3, 6), (6, 6)) == ((2, 3), (6,))


def test_kernel_of_several_axes_needs_its_shape():
    with pytest.raises(ValueError, match=r"a: wanted the shape \(m, n\) of a kernel with axes \(6, 2, 3\)"):
        shape_of_kernel("a", np.zeros((6, 2, 3)), None)
    with pytest.raises(ValueError, match=re.escape("a: a kernel with axes (6, 2, 3) is no matrix of shape (4, 9)")):
        factorise({"a": {"kernel": np.zeros((6, 2, 3))}}, {"a": None}, {"a": 1}, shapes={"a": (4, 9)}, progress=False)


@pytest.mark.parametrize("shape", [(4, 12), (8, 8), (384, 1536)])
def test_factors_of_the_break_even_rank_hold_as_many_numbers_as_the_kernel(shape):
    assert break_even(shape) * sum(shape) == shape[0] * shape[1]  # whole numbers, exact


def test_one_rank_is_for_all():
    assert choose_ranks(SHAPES, 2) == {"wide": 2, "square": 2}


def test_ranks_may_be_given_by_path():
    assert choose_ranks(SHAPES, {"square": 3, "wide": 1}) == {"square": 3, "wide": 1}


def test_ranks_beyond_break_even_stay_in_the_plan():
    assert choose_ranks(SHAPES, 100) == {"wide": 100, "square": 100}


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_named(rank):
    with pytest.raises(ValueError, match=f"rank of square must be at least 1; got {rank}"):
        choose_ranks(SHAPES, {"wide": 2, "square": rank})


@pytest.mark.parametrize("ranks", [{"wide": 2}, {"wide": 2, "square": 2, "round": 2}], ids=["missing", "left over"])
def test_ranks_by_path_fit_the_selection_exactly(ranks):
    odd = "square" if len(ranks) == 1 else "round"
    with pytest.raises(ValueError, match=rf"missing or left over: \['{odd}'\]"):
        choose_ranks(SHAPES, ranks)


def test_every_number_is_counted():
    kernel = np.zeros((4, 6), np.float32)
    assert parameter_count({"a": kernel, "b": {"kernel": FACTORISED, "left": jnp.zeros((4, 2))}}) == 32
