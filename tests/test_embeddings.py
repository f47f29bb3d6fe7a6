"""Tables of words are factorised as kernels are: looked up, tied to decoders, measured, planned, saved, exported."""

import dataclasses
import functools
import resource
import sys
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families
import tiny
from safetensors.numpy import load_file
from tiny import BATCH

import bert_adapter
from bert_adapter import load, merge, save, select_kernels
from bert_adapter.checkpoint.names import by_path
from bert_adapter.cli import main
from bert_adapter.families import architectures_of, module_for
from bert_adapter.importance.measure import measure_importance
from bert_adapter.importance.sums import STATISTICS, Sums
from bert_adapter.model import Model
from bert_adapter.report import summary
from bert_adapter.signals import DEFAULT, SIGNALS
from bert_adapter.signals.definition import Evidence, TableWeights
from bert_adapter.signals.weights import table_weights
from bert_adapter.tables import PRIORS, decompose_table
from wlra import components, tall

WORDS = "embeddings/word_embeddings"
RNG = np.random.default_rng(0)
IDS = np.array([[1, 4, 4, 1, 9, 0], [2, 4, 2, 2, 0, 0], [9, 9, 9, 9, 9, 9]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)


class Net(nn.Module):
    """A table that is looked up twice, one in a block that is computed again, and one whose decoder is tied."""

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        table, again = nn.Embed(11, 6, name="table"), nn.remat(nn.Embed)(11, 6, name="again")
        x = table(input_ids) * again(input_ids) + table(input_ids[:, ::-1])
        x = jnp.tanh(x) * attention_mask[:, :, None].astype(x.dtype)
        tied = nn.Embed(11, 6, name="tied")
        return tied.attend(nn.Dense(6, name="dense")(x.sum(axis=1)) + tied(input_ids[:, 0]))


NET = Net()
TEXTS = {"input_ids": IDS, "attention_mask": MASK}


@functools.cache
def net_params() -> Any:
    return tiny.random_params(NET, IDS, MASK)


def run_net(params, batch):
    return bert_adapter.apply(NET, params, batch["input_ids"], batch["attention_mask"])


def sines(output, _):
    return jnp.sum(jnp.sin(output), axis=1)


@functools.cache
def measured() -> Any:
    """Of both tables that are only looked up, all that there is to measure."""
    return measure_importance(
        run_net, net_params(), [TEXTS], ["table", "again"], gradients=sines, statistics=STATISTICS, progress=False
    )


@functools.cache
def gradients() -> Any:
    """By path, of each example, by automatic differentiation."""
    ones = {name: jnp.asarray(array)[:, None] for name, array in TEXTS.items()}

    def loss(params: Any, batch: Any) -> Any:
        return sines(run_net(params, batch), batch)[0]

    found = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(net_params(), ones)
    return {path: np.asarray(each["embedding"], np.float64) for path, each in found.items() if "embedding" in each}


# Running.


@functools.cache
def factorised_net() -> dict[str, Any]:
    return tiny.with_factors(Model(NET, net_params(), {}, {}), dict.fromkeys(("table", "again", "tied"), 3)).params


def test_a_table_is_looked_up_in_its_factors_and_a_tied_decoder_multiplies_by_both():
    small = factorised_net()
    assert {path.rpartition("/")[2] for path in by_path(small) if path.startswith("tied")} == {"left", "right"}
    np.testing.assert_allclose(run_net(small, TEXTS), run_net(merge(small), TEXTS), rtol=0, atol=1e-5)


def test_a_factorised_table_that_is_run_without_the_interceptor_says_what_to_do():
    with pytest.raises(TypeError, match="run the model inside"):
        NET.apply({"params": factorised_net()}, IDS, MASK)


def test_numbers_that_are_no_rows_are_refused():
    table = {"embedding": bert_adapter.FACTORISED, "left": np.ones((3, 1)), "right": np.ones((1, 2))}
    with pytest.raises(ValueError, match="ids: got float32, wanted integers"):
        bert_adapter.apply(nn.Embed(3, 2), table, np.ones(2, np.float32))


def test_a_table_with_a_lookup_of_its_own_is_refused_by_name():
    class Scaled(nn.Embed):
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    module = nn.Sequential([Scaled(5, 4, name="scaled")])
    params = module.init(jax.random.key(0), IDS[:, :2] % 5)["params"]
    model = bert_adapter.as_model(
        (module, params), forward=lambda params, batch: module.apply({"params": params}, **batch)
    )
    with pytest.raises(ValueError, match="Scaled: its class has a call of its own"):
        select_kernels(model, include="scaled", batch={"inputs": IDS[:, :2] % 5})


def words_of(case: str) -> Model:
    """A masked language model of the family with a factorised table."""
    name, known = test_families.CASES[case]
    kind = architectures_of(bert_adapter.FAMILIES[name])["words"].names[0]
    config = {"model_type": name, "architectures": [kind], **known}
    dense = Model(module := module_for(config), tiny.random_params(module, size=0.3), config, {})
    (path,) = select_kernels(dense, include=bert_adapter.FAMILIES[name].words)
    return tiny.with_factors(dense, {path: 3})


TIED = [pytest.param(case, marks=() if case == "BERT" else pytest.mark.slow) for case in test_families.DISTINCT]


@pytest.mark.parametrize("case", TIED)
def test_every_familys_decoder_stays_tied_to_its_table_and_is_saved_once(case, tmp_path):
    small = words_of(case)
    inputs = test_families.batch_of(case)
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    got, dense = bert_adapter.apply(small.module, small.params, **batch), merge(small)
    np.testing.assert_allclose(got, bert_adapter.apply(dense.module, dense.params, **batch), rtol=0, atol=1e-4)
    save(small, tmp_path)
    rows, tensors = dense.config["vocab_size"], load_file(tmp_path / "factorised.safetensors")
    tables = {name: array.shape for name, array in tensors.items() if rows in array.shape and array.ndim == 2}
    assert [shape for name, shape in tables.items() if "position" not in name] == [(rows, 3)]
    again = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    np.testing.assert_array_equal(bert_adapter.apply(again.module, again.params, **batch), got)


# What is selected.


def test_tables_are_selected_when_they_are_asked_for():
    model, kernels = tiny.model(), set(select_kernels(tiny.model()))
    assert set(select_kernels(model, embeddings=True)) == kernels | {WORDS}
    assert set(select_kernels(model, include="word_embeddings")) == {WORDS}
    assert set(select_kernels(model, include="query", embeddings=True)) >= {WORDS}
    assert WORDS not in select_kernels(model, embeddings=True, exclude="word")
    assert select_kernels(model, embeddings=True)[WORDS] == (20, 16)


def test_tables_of_positions_stay_dense():
    with pytest.raises(ValueError, match="select none of"):
        select_kernels(tiny.model(), include="position_embeddings|token_type")


# Importance.


@pytest.mark.parametrize("path", ["table", "again"])
def test_importance_of_a_table_is_that_of_the_gradients_of_its_rows(path):
    each, sums = gradients()[path], measured()[path]
    near = partial(np.testing.assert_allclose, rtol=1e-4)  # sums of some ten terms in float32, which cancel little
    squares = np.sum(each**2, axis=2)
    near(sums.token_squares, [squares[0::2].sum(0), squares[1::2].sum(0)], atol=1e-5)
    near(sums.fisher, [(each[0::2] ** 2).sum(0), (each[1::2] ** 2).sum(0)], atol=1e-5)
    near(sums.col_gram, np.einsum("bvi,bvj->ij", each, each), atol=1e-4)
    near(sums.gram_squares, sum(np.sum((one @ one.T) ** 2) for one in each), atol=1e-4)


def test_how_often_a_row_is_looked_up_is_counted_without_padding():
    counts = np.array([np.bincount(ids[mask > 0], minlength=11) for ids, mask in zip(IDS, MASK, strict=True)])
    np.testing.assert_array_equal(measured()["again"].token_counts, [counts[0] + counts[2], counts[1]])
    np.testing.assert_array_equal(measured()["table"].token_counts.sum(), 2 * MASK.sum())  # of two calls, one reversed


def test_what_is_measured_of_tables_is_kept_in_a_file(tmp_path):
    bert_adapter.save_importance(measured(), tmp_path / "importance")
    again = bert_adapter.load_importance(tmp_path / "importance")
    jax.tree.map(np.testing.assert_array_equal, again.sums, measured().sums)


def test_measurements_of_tables_add_up():
    both = measured() + dataclasses.replace(measured(), texts=())
    np.testing.assert_allclose(both["table"].token_squares, 2 * measured()["table"].token_squares)


# The closed form.


def optimum(table, row, col, rank):
    """The least trace(diag(row) E col E') of all E that a table of that rank leaves, in float64 by SVD."""
    root = np.linalg.cholesky(col) if col.ndim == 2 else np.diag(np.sqrt(col))
    values = np.linalg.svd(np.sqrt(row)[:, None] * table @ root, compute_uv=False)
    return np.sum(values[rank:] ** 2)


def some_table(rows=40, columns=8):
    table = RNG.normal(size=(rows, columns)).astype(np.float32)
    half = RNG.normal(size=(columns, columns))
    return table, half @ half.T


@pytest.mark.parametrize("matrix", [True, False])
def test_the_closed_form_of_a_tall_matrix_is_the_optimum(matrix):
    table, col = some_table()
    col = col if matrix else np.diag(col).copy()
    row = RNG.uniform(0.1, 5, len(table))
    found = tall.components(table, tall.gram(table, row), col, rank=6)
    for rank in (1, 3, 6):
        left, right = components.cut(found, rank)
        error = table - left.astype(np.float64) @ right
        got = np.einsum("i,ij,jk,ik->", row, error, col if matrix else np.diag(col), error)
        wanted = optimum(table, row, col, rank)
        np.testing.assert_allclose(got, wanted, rtol=1e-4)  # factors are of float32
        np.testing.assert_allclose(found.squares[rank:].sum(), wanted, rtol=1e-9)


def test_rows_that_were_never_seen_are_fitted_along_the_same_directions():
    """Their weight only helps to choose the directions: with all of these, nothing is lost of any row."""
    table, col = some_table()
    table[:, 4:] = table[:, :4] @ RNG.normal(size=(4, 4))
    rows = np.stack([np.arange(40) < 20, np.arange(40) < 10]).astype(float)
    found, tokens = decompose_table(table, TableWeights(rows, col), rank=4)
    left, right = components.cut(found, 4)
    np.testing.assert_allclose(left @ right, table, atol=1e-4)
    assert (tokens.seen, tokens.rows) == (20, 40)
    assert tokens.lost_unseen[4] < 1e-9 < tokens.lost_unseen[3] < 1


def test_ranks_may_be_planned_by_other_rows_than_those_that_factors_are_made_by():
    """What is planned is then what these factors lose in the weights of those."""
    table, col = some_table()
    rows, planned = RNG.uniform(0.1, 5, (2, 2, len(table)))
    factors, _ = decompose_table(table, TableWeights(rows, col), rank=6, prior=0.0)
    found, _ = decompose_table(table, TableWeights(rows, col, planned), rank=6, prior=0.0)
    np.testing.assert_array_equal(found.left, factors.left)
    for rank in (1, 3, 6):
        left, right = components.cut(found, rank)
        error = table - left.astype(np.float64) @ right
        wanted = np.einsum("i,ij,jk,ik->", planned.sum(axis=0), error, col, error)
        np.testing.assert_allclose(found.squares[rank:].sum(), wanted, rtol=1e-4)  # factors are of float32


def test_of_rows_that_a_norm_sizes_up_again_ranks_lose_more_by_how_much_shorter_they_are():
    table, col = some_table()
    rows, planned = RNG.uniform(0.1, 5, (2, 2, len(table)))
    found, _ = decompose_table(table, TableWeights(rows, col, planned, normed=True), rank=7, prior=0.0)
    none, _ = decompose_table(table, TableWeights(rows, col, planned, normed=True), rank=0, prior=0.0)
    np.testing.assert_array_equal(none.squares, found.squares)
    weights, lost = planned.sum(axis=0), []
    for rank in range(8):
        left, right = components.cut(found, rank)
        left, error = left.astype(np.float64), table - left.astype(np.float64) @ right
        beyond = np.einsum("i,ij,jk,ik->", weights, error, col, error)
        left, right = components.cut(found, max(rank, 1))
        longer = (weights @ table**2).sum() / (weights @ (left.astype(np.float64) @ right) ** 2).sum()
        lost.append(min([beyond * max(longer, 1), *lost]))
    np.testing.assert_allclose([found.squares[rank:].sum() for rank in range(8)], lost, rtol=1e-4)
    assert lost[4] > 1.01 * decompose_table(table, TableWeights(rows, col, planned), 0, 0.0)[0].squares[4:].sum()


def test_a_row_that_no_gradient_counts_sizes_nothing_up_without_end():
    rows, planned = np.array([[5.0, 0.1, 0.1]] * 2), np.array([[0.0, 1.0, 1.0]] * 2)
    found, _ = decompose_table(np.eye(3), TableWeights(rows, np.ones(3), planned, normed=True), rank=3, prior=0.0)
    assert np.all(np.isfinite(found.squares))
    assert found.squares.sum() <= 1001 * 4


def test_the_default_makes_a_tables_factors_by_how_often_words_occur_and_plans_by_gradients():
    counts, squares, eye = jnp.ones((2, 5)), jnp.full((2, 5), 2.0), jnp.eye(3)
    sums = Sums(token_counts=counts, token_squares=squares, col_gram=eye, gram_squares=jnp.float32(1))
    weights = table_weights(Evidence(sums, 10, (5, 3)), SIGNALS["combined"], "words", None)
    np.testing.assert_array_equal(weights.rows, counts)
    np.testing.assert_array_equal(np.asarray(weights.ranks), squares)
    assert weights.normed


def test_the_prior_is_the_one_that_loses_least_on_the_other_half():
    table, col = some_table(60, 6)
    table *= np.linspace(3, 0.2, 6)
    table[:8] = table[:8, ::-1]  # frequent rows lie in other directions
    rows = np.where(np.arange(60) < 8, 5, RNG.uniform(size=(2, 60)) < 0.3) * RNG.exponential(size=(2, 60))
    root = np.linalg.cholesky(col)

    def held_out(prior: float) -> float:
        loss = 0.0
        for fitted, held in (rows, rows[::-1]):
            weights = (1 - prior) * fitted / fitted.sum() + prior / len(table)
            _, _, directions = np.linalg.svd(np.sqrt(weights)[:, None] * table @ root)
            left = np.cumsum(((np.sqrt(held)[:, None] * table @ root @ directions.T) ** 2).sum(axis=0)[::-1])[::-1]
            loss += float(np.sum(np.log(left[1:] / left[0])))
        return loss

    _, tokens = decompose_table(table.astype(np.float64), TableWeights(rows, col), rank=3)
    assert tokens.prior == min(PRIORS, key=held_out)
    assert tokens.prior < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": np.nan}, "the table has values that are NaN or infinite"),
        ({"rows": np.nan}, "weights of the table's rows must be finite"),
        ({"rows": 0.0}, "weights of the table's rows must be finite, not negative, and not all 0"),
        ({"col": np.inf}, "weights of the table's columns must be finite"),
    ],
)
def test_values_that_cannot_be_are_refused(change, message):
    table, col = some_table()
    table, col = table * change.get("table", 1), col * change.get("col", 1)
    with pytest.raises(ValueError, match=message):
        decompose_table(table, TableWeights(np.ones((2, 40)) * change.get("rows", 1), col), rank=2)


@pytest.mark.slow
def test_a_table_of_a_quarter_of_a_million_words_takes_seconds_and_no_more_than_itself_twice():
    """As large as XLM-R's; the table itself and its components are 1.5 GB of the memory."""
    import time

    rng = np.random.default_rng(0)
    table = rng.standard_normal((250_002, 768), np.float32)
    half = rng.normal(size=(768, 768))
    seen = np.where(rng.uniform(size=(2, len(table))) < 0.02, 1.0, 0.0)
    began, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, _ = decompose_table(table, TableWeights(seen, half @ half.T), rank=384)
    assert found.left is not None
    assert time.process_time() - began < 120  # CPU seconds; 20 on two quiet cores
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * unit < 2.2e9


# The whole way.


@functools.cache
def compressed():
    model = tiny.model()
    return bert_adapter.compress(model, [BATCH], budget=0.6, embeddings=True, progress=False)


def test_a_model_is_compressed_with_its_table(tmp_path):
    small, report = compressed()
    ranks = small.config["low_rank"]["ranks"]
    assert WORDS in ranks
    assert small.params["embeddings"]["word_embeddings"]["left"].shape == (20, ranks[WORDS])
    assert report.parameters_after <= 0.6 * report.parameters_before
    save(small, tmp_path)
    again = load(tmp_path)
    np.testing.assert_array_equal(
        bert_adapter.apply(small.module, small.params, **BATCH), bert_adapter.apply(again.module, again.params, **BATCH)
    )
    assert "Of embeddings/word_embeddings the texts looked up 10 of 20 rows" in summary(report)
    assert report.tokens[WORDS].lost_unseen[0] == 1


WITH_TABLES = [name for name, signal in SIGNALS.items() if signal.tables is not None]


@pytest.mark.parametrize(
    "signal", [pytest.param(name, marks=() if name == DEFAULT else pytest.mark.slow) for name in WITH_TABLES]
)
def test_every_signal_that_has_weights_for_tables_factorises_them(signal):
    model = tiny.model()
    small, _ = bert_adapter.compress(model, [BATCH], rank=4, include="word_embeddings", signal=signal, progress=False)
    error = (
        merge(small).params["embeddings"]["word_embeddings"]["embedding"] - tiny.at(model.params, WORDS)["embedding"]
    )
    assert 0 < np.linalg.norm(error) < np.linalg.norm(tiny.at(model.params, WORDS)["embedding"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"signal": "exact"},
            f"{WORDS}: signal 'exact' has no weights for a table, wanted one of 'combined', 'shampoo'",
        ),
        ({"signal": "svd", "method": "em"}, f"method: got 'em' for the table {WORDS}, wanted the closed form"),
    ],
)
def test_what_a_table_cannot_take_is_refused_before_work_starts(options, message):
    with pytest.raises(ValueError, match=message):
        bert_adapter.compress(tiny.model(), [{"none": np.ones(1)}], budget=0.5, embeddings=True, **options)


def test_operations_leave_a_table_dense():
    """A row of a dense table is found without any."""
    model = tiny.model()
    shapes = select_kernels(model, embeddings=True)
    planned = bert_adapter.plan(model.params, None, 0.5, signal="svd", of="flops", kernels=shapes)
    assert planned.ranks[WORDS] >= 20 * 16 / 36
    assert planned.share <= 0.5


def test_gradients_reach_the_factors_of_tables():
    found = jax.grad(lambda params: jnp.sum(sines(run_net(params, TEXTS), TEXTS)))(factorised_net())
    for path in ("table", "again", "tied"):
        assert np.any(found[path]["left"])
        assert np.any(found[path]["right"])


@pytest.mark.slow  # a training is compiled
def test_a_factorised_table_is_trained():
    small, _ = compressed()
    rows = tiny.row_batches()
    classifier = bert_adapter.with_head(small, 2)
    trained, _ = bert_adapter.finetune(classifier, rows[:1], epochs=1, learning_rate=1e-2, warmup=0.0, progress=False)
    for name in ("left", "right"):
        before, after = (tiny.at(one.params, f"bert/{WORDS}")[name] for one in (classifier, trained))
        assert np.abs(after - before).max() > 0


def test_a_model_of_ones_own_goes_the_whole_way(tmp_path):
    dense = NET, net_params()
    small, _ = bert_adapter.compress(dense, [TEXTS], rank=3, embeddings=True, signal="svd", progress=False)
    assert set(small.config["low_rank"]["ranks"]) >= {"table", "again", "tied"}
    save(small, tmp_path)
    again = bert_adapter.load_into(tmp_path, dense)
    np.testing.assert_array_equal(run_net(again.params, TEXTS), run_net(small.params, TEXTS))


@pytest.mark.slow  # a measurement is compiled, and a page drawn
def test_the_command_line_takes_the_table_too(tmp_path, capsys):
    save(tiny.model(), tmp_path / "dense")
    (tmp_path / "texts").write_text("a red fox\na dog runs far\n")
    options = ["--text", str(tmp_path / "texts"), "-o", str(tmp_path / "small"), "--budget", "0.6", "--embeddings"]
    assert main(["compress", str(tmp_path / "dense"), *options, "--signal", "fwsvd"]) == 0
    assert "the texts looked up" in capsys.readouterr().out
    assert WORDS in load(tmp_path / "small").config["low_rank"]["ranks"]


# Elsewhere.


def test_a_factorised_table_is_multiplied_out_for_transformers(tmp_path):
    small, _ = compressed()
    bert_adapter.export(small, tmp_path, to="transformers-dense")
    again = load(tmp_path)
    np.testing.assert_allclose(
        bert_adapter.apply(again.module, again.params, **BATCH),
        bert_adapter.apply(small.module, small.params, **BATCH),
        atol=1e-5,
    )


def test_a_factorised_table_is_looked_up_in_pytorch(tmp_path, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    small, _ = compressed()
    bert_adapter.export(small, tmp_path / "model", to="transformers")
    made = transformers.AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    ids, mask, types = (torch.tensor(BATCH[name]).long() for name in ("input_ids", "attention_mask", "token_type_ids"))
    with torch.no_grad():
        states = made(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    rows = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    got = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(got, bert_adapter.apply(small.module, small.params, **BATCH), atol=1e-5)
    ranks = small.config["low_rank"]["ranks"]
    assert made.embeddings.word_embeddings.left.weight.shape == (20, ranks[WORDS])


def test_a_factorised_table_with_a_tied_decoder_is_refused_by_name(tmp_path):
    for to in ("transformers", "sentence-transformers"):
        with pytest.raises(ValueError, match=f"{WORDS}: got a factorised table with a decoder that is tied to it"):
            bert_adapter.export(words_of("BERT"), tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


def test_a_factorised_table_is_a_graph(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    small, _ = compressed()
    bert_adapter.export(small, tmp_path, to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(["sentence_embedding"], {name: array.astype(np.int64) for name, array in BATCH.items()})[0]
    np.testing.assert_allclose(got, bert_adapter.apply(small.module, small.params, **BATCH), atol=1e-4)
