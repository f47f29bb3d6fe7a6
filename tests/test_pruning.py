"""The pruning that the default is compared with does what its paper says."""

import jax
import jax.numpy as jnp
import numpy as np

import bert_adapter
from benchmarks import pruning
from benchmarks.candidates import with_leaves
from bert_adapter.checkpoint.names import by_path
from bert_adapter.sample import sample_model

RNG = np.random.default_rng(0)


def test_gradients_of_masks_are_those_of_autodiff():
    model = sample_model()
    (batch,) = bert_adapter.text_batches(model, ["a red fox runs", "a dog"])
    groups, direction = pruning.groups_of(model), RNG.normal(size=(2, 16)).astype(np.float32)
    found = pruning.mask_gradients(model, [batch], groups, lambda output, batch, key: direction)
    kernels, run = by_path(model.params), bert_adapter.forward(model)

    def output(masks):
        leaves = {
            f"{group.path}/kernel": jnp.repeat(mask, group.size)[:, None] * kernels[f"{group.path}/kernel"]
            for group, mask in zip(groups, masks, strict=True)
        }
        return jnp.sum(run(with_leaves(model, leaves).params, batch) * direction, axis=1)

    ones = [jnp.ones(each.shape[1]) for each in found]
    for got, wanted in zip(found, jax.jit(jax.jacrev(output))(ones), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_the_search_keeps_what_matters_within_the_budget():
    groups = [pruning.Group("a", "", 4, 40), pruning.Group("b", "", 1, 10)] * 2
    importance = [RNG.uniform(size=count) for count in (3, 20, 3, 20)]
    masks = pruning.searched(groups, importance, 0.4)
    total, left = (
        sum(group.cost * int(np.sum(mask)) for group, mask in zip(groups, each, strict=True))
        for each in ([np.ones(len(one)) for one in importance], masks)
    )
    assert 0.4 * total - 10 < left <= 0.4 * total
    neurons = np.concatenate(importance[1::2]), np.concatenate(masks[1::2])
    assert neurons[0][neurons[1]].min() > neurons[0][~neurons[1]].max()


def test_dealing_anew_keeps_the_count_and_lessens_what_is_lost_together():
    gradients = RNG.normal(size=(50, 1)) * RNG.choice([-1, 1], size=12) + 0.3 * RNG.normal(size=(50, 12))
    mask = np.arange(12) < 6
    anew = pruning.rearranged(mask, gradients)
    assert anew.sum() == 6
    before, after = (np.sum(gradients[:, ~each].sum(axis=1) ** 2) for each in (mask, anew))
    assert after < 0.5 * before


def test_normal_equations_are_those_of_least_squares():
    entered, kernel, wanted = RNG.normal(size=(40, 12)), RNG.normal(size=(12, 5)), RNG.normal(size=(40, 5))
    gram, across = pruning.normal_equations(wanted, entered, kernel, 3)
    parts = [(entered[:, i : i + 3] @ kernel[i : i + 3]).ravel() for i in range(0, 12, 3)]
    best = np.linalg.lstsq(np.stack(parts, axis=1), wanted.ravel(), rcond=None)[0]
    np.testing.assert_allclose(np.linalg.solve(gram, across), best, rtol=1e-9)
