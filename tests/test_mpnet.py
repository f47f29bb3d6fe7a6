"""Distances between tokens are those of MPNet, and so are a real model's embeddings."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bert_adapter
from bert_adapter.families import FAMILIES
from bert_adapter.families.mpnet import MpnetEncoder, bucket

STS_B = Path(__file__).parents[2] / "shared/data/glue/STS-B/dev.tsv"


def test_buckets_grow_by_the_square_root_of_two():
    """Eight distances of their own, and then the whole numbers from 8, 8 * 2**0.5, 16, 16 * 2**0.5, ... on."""
    far = np.arange(600)
    got = bucket(-far)
    first = [int(np.argmax(got == number)) for number in range(16)]
    assert first == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    assert np.all(np.diff(got) >= 0)
    np.testing.assert_array_equal(bucket(far[1:]), got[1:] + 16)


def test_buckets_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.mpnet.modeling_mpnet").MPNetEncoder.relative_position_bucket
    distances = np.arange(-600, 601)
    np.testing.assert_array_equal(bucket(distances), theirs(torch.tensor(distances)).numpy())


def test_other_numbers_of_buckets_are_refused():
    """transformers gives the table that many rows, and reads 32 of them."""
    with pytest.raises(ValueError, match="relative_attention_num_buckets: got 64, supported: 32"):
        FAMILIES["mpnet"].config({"relative_attention_num_buckets": 64})


def test_positions_are_more_than_padding_takes():
    with pytest.raises(ValueError, match="max_position_embeddings: got 2, wanted at least 3"):
        FAMILIES["mpnet"].config({"max_position_embeddings": 2})


@pytest.fixture(scope="module")
def real():
    """all-mpnet-base-v2, which benchmarks/README.md says how to get."""
    directory = os.environ.get("WLRA_MPNET") or pytest.skip("WLRA_MPNET names no directory of all-mpnet-base-v2")
    return bert_adapter.load(directory)


@pytest.mark.slow
def test_states_of_a_real_model_are_those_of_pytorch(real):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers").AutoModel.from_pretrained(os.environ["WLRA_MPNET"]).eval()
    texts = ["A man is dancing.", "The quick brown fox jumps over the lazy dog. " * 12, "Hello"]
    batch = bert_adapter.tokenizer(real)(texts)
    with torch.no_grad():
        given: Any = {name: torch.tensor(array).long() for name, array in batch.items()}
        wanted = theirs(**given, output_hidden_states=True)
    got: Any = jax.jit(MpnetEncoder(real.module.config).apply)({"params": real.params}, **batch)
    for ours, states in zip(got.hidden_states, wanted.hidden_states, strict=True):
        size = float(states.abs().max())  # 0.7 to 10.6, and rounding errors are of that size
        np.testing.assert_allclose(ours, states, rtol=0, atol=1e-5 * max(size, 1))
    np.testing.assert_allclose(got.pooler_output, wanted.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_real_embeddings_rank_sentence_pairs_as_published(real):
    if not STS_B.is_file():
        pytest.skip("STS-B is not here")
    scores = bert_adapter.score(real, bert_adapter.read_rows(STS_B))
    assert scores["spearman"] == pytest.approx(0.8811, abs=5e-5)  # a half of the last digit
