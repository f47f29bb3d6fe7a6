"""Patterns select kernels, and budgets choose their ranks."""

import jax.numpy as jnp
import numpy as np
import pytest

from bert_adapter.kernels import break_even, choose_ranks, parameter_count, select_kernels
from bert_adapter.layers.marker import FACTORISED

KERNEL = np.zeros((4, 6), np.float32)
QUERY, KEY, OUT = (f"encoder/layer/{name}" for name in ("0/self/query", "0/self/key", "1/output"))
PARAMS = {
    "embeddings": {"word_embeddings": {"embedding": KERNEL}},
    "encoder": {
        "layer": {
            "0": {
                "self": {"query": {"kernel": KERNEL, "bias": np.zeros(6, np.float32)}, "key": {"kernel": KERNEL}},
                "LayerNorm": {"scale": np.zeros(6, np.float32)},
            },
            "1": {"output": {"kernel": jnp.zeros((6, 4))}, "convolution": {"kernel": np.zeros((3, 4, 6), np.float32)}},
        }
    },
    "pooler": {"dense": {"kernel": KERNEL}},
}
SHAPES = {"wide": (4, 12), "square": (8, 8)}  # break even at 3 and 4


def test_default_selects_the_kernels_of_the_encoder_with_their_shapes():
    assert select_kernels(PARAMS) == {QUERY: (4, 6), KEY: (4, 6), OUT: (6, 4)}


def test_default_selects_the_encoder_below_a_classifier():
    assert set(select_kernels({"bert": PARAMS, "classifier": {"kernel": KERNEL}})) == {
        f"bert/{path}" for path in (QUERY, KEY, OUT)
    }


def test_include_is_searched_anywhere_in_the_path():
    assert set(select_kernels(PARAMS, include="query|pooler")) == {QUERY, "pooler/dense"}


def test_exclude_takes_away_what_include_found():
    assert set(select_kernels(PARAMS, exclude=r"/(key|query)$")) == {OUT}


def test_patterns_see_the_path_of_the_module_alone():
    with pytest.raises(ValueError, match="select none of"):
        select_kernels(PARAMS, include="kernel")


def test_nothing_selected_names_both_patterns_and_what_there_is():
    with pytest.raises(ValueError, match=r"include='decoder' and exclude='x' select none of \['encoder/layer/0.*pool"):
        select_kernels(PARAMS, include="decoder", exclude="x")


@pytest.fixture
def half_done():
    done = {"kernel": FACTORISED, "left": np.zeros((4, 1)), "right": np.zeros((1, 6))}
    return PARAMS | {"pooler": {"dense": done}}


def test_selected_kernel_that_is_factorised_already_is_named(half_done):
    with pytest.raises(ValueError, match=r"1 of the selected kernels are factorised already, 'pooler/dense' first"):
        select_kernels(half_done, include="encoder|pooler")


def test_factorised_kernels_that_are_not_selected_do_not_matter(half_done):
    assert select_kernels(half_done) == select_kernels(PARAMS)


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
    assert parameter_count({"a": KERNEL, "b": {"kernel": FACTORISED, "left": jnp.zeros((4, 2))}}) == 32
