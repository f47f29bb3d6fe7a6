"""What a model's output is for: heads as PyTorch computes them, their importance, losses, scores, rows and files."""

import functools
import itertools
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny import BATCH, CONFIG, EPS

import bert_adapter
from bert_adapter import (
    OUTPUTS,
    LabelledTexts,
    finetune,
    labelled_batches,
    load,
    save,
    score,
    text_batches,
    with_head,
    without_head,
)
from bert_adapter.checkpoint.names import by_path
from bert_adapter.cli import main
from bert_adapter.distributions import categorical, span
from bert_adapter.distributions.draw import Draw
from bert_adapter.families import label_count, module_for, output_of, predictive
from bert_adapter.heads import drawn
from bert_adapter.importance.measure import measure_importance
from bert_adapter.layers.running import parameter_shapes
from bert_adapter.losses import distillation, task_loss
from bert_adapter.outputs.definition import IGNORED
from bert_adapter.outputs.scores import entities, of_answers, of_entities, plain
from bert_adapter.tagged import read_tagged
from bert_adapter.vocabulary import tokenizer_of

NAMES = {
    "tokens": "BertForTokenClassification",
    "answer": "BertForQuestionAnswering",
    "words": "BertForMaskedLM",
    "choice": "BertForMultipleChoice",
}
LABELS = {"tokens": 3, "answer": 2, "words": 2, "choice": 2}
VALUE = "bert/encoder/layer/0/attention/self/value"
TEXTS = ["a red fox runs far", "it runs", "a dog runs from it .", "a red dog", "a fox", "it runs far from a dog"]
TAGS = {"id2label": {"0": "O", "1": "B-X", "2": "I-X"}, "label2id": {"O": 0, "B-X": 1, "I-X": 2}}
ROWS = {
    "tokens": LabelledTexts(
        [text.split() for text in TEXTS], [["B-X" if word == "a" else "O" for word in text.split()] for text in TEXTS]
    ),
    "answer": LabelledTexts(
        [("it runs far", text) for text in TEXTS],
        [{"text": [text.split()[0]], "answer_start": [0]} for text in TEXTS],
    ),
    "words": LabelledTexts(TEXTS, None),
    "choice": LabelledTexts([(text, ["runs", "a fox", "far ."]) for text in TEXTS], [0, 1, 2, 0, 1, 2]),
}
RNG = np.random.default_rng(0)


def slow_but(fast):
    """All heads, of which one is enough where a test compiles much."""
    return [pytest.param(head, marks=() if head == fast else pytest.mark.slow) for head in NAMES]


def config(head, **entries):
    return CONFIG | {"architectures": [NAMES[head]], "num_labels": LABELS[head]} | entries


@functools.cache
def model(head):
    entries = config(head) | (TAGS if head == "tokens" else {})
    module = module_for(entries)
    return bert_adapter.Model(module, tiny.random_params(module, size=0.8), entries, tiny.FILES)


def inputs_for(head):
    """Padded rows, and for choices two of them for each."""
    if head != "choice":
        return BATCH
    return {name: np.stack([array, array[::-1]], axis=1) for name, array in BATCH.items()}


def run(head, **inputs) -> Any:
    return np.asarray(bert_adapter.apply(model(head).module, model(head).params, **inputs))


def torch_model(head, **entries) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    known = {
        name: value for name, value in config(head, **entries).items() if name not in ("architectures", "model_type")
    }
    made = getattr(transformers, NAMES[head])(transformers.BertConfig(**known)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def torch_output(made, batch, **labels) -> Any:
    torch: Any = pytest.importorskip("torch")
    with torch.no_grad():
        tensors = {name: torch.tensor(np.array(array)).long() for name, array in (batch | labels).items()}
        return made(**tensors)


# As PyTorch and Flax compute them.


@pytest.mark.parametrize("head", NAMES)
def test_outputs_are_those_of_pytorch(head, tmp_path):
    made = torch_model(head)
    made.save_pretrained(tmp_path)
    batch = inputs_for(head)
    output, loaded = torch_output(made, batch), load(tmp_path)
    theirs = np.stack([output.start_logits, output.end_logits], axis=-1) if head == "answer" else output.logits.numpy()
    ours = bert_adapter.apply(loaded.module, loaded.params, **batch)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert output_of(loaded.module) == head


FAMILIES: dict[str, dict[str, Any]] = {
    "Roberta": {"pad_token_id": 0},
    "Bert": {},
    "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    "Electra": {"embedding_size": 8},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_of_every_family_are_those_of_pytorch(name, tmp_path):
    """And what is saved is what PyTorch reads, tied decoders among it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    common = {"vocab_size": 20, "max_position_embeddings": 20} | FAMILIES[name]
    if name != "DistilBert":
        common |= {name: CONFIG[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        common["intermediate_size"] = CONFIG["intermediate_size"]
    for head, kind in NAMES.items():
        if (name, head) == ("Electra", "choice"):
            continue
        torch.manual_seed(0)
        entries = getattr(transformers, f"{name}Config")(**common, num_labels=LABELS[head])
        made = getattr(transformers, kind.replace("Bert", name, 1))(entries).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(tmp_path / head)
        batch = {part: inputs_for(head)[part] for part in ("input_ids", "attention_mask")}
        output, loaded = torch_output(made, batch), load(tmp_path / head)
        theirs = np.stack([output.start_logits, output.end_logits], -1) if head == "answer" else output.logits.numpy()
        ours = bert_adapter.apply(loaded.module, loaded.params, **batch)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        save(loaded, tmp_path / "again")
        again, missing = type(made).from_pretrained(tmp_path / "again", output_loading_info=True)
        assert not missing["missing_keys"]
        output = torch_output(again.eval(), batch)
        same = np.stack([output.start_logits, output.end_logits], -1) if head == "answer" else output.logits.numpy()
        np.testing.assert_allclose(same, theirs, rtol=0, atol=1e-6)  # of the same weights; PyTorch adds up in any order


@pytest.mark.parametrize("head", NAMES)
def test_the_parameter_tree_is_that_of_flax_bert(head):
    ids = np.ones((1, 2, 4) if head == "choice" else (1, 4), np.int32)
    with jax.numpy_rank_promotion("allow"):
        reference = tiny.flax_bert(NAMES[head], num_labels=LABELS[head]).module
        init = functools.partial(reference.init, return_dict=False)
        theirs = jax.eval_shape(init, jax.random.key(0), ids, ids, ids, ids, None)["params"]
    shapes = {path: leaf.shape for path, leaf in by_path(theirs).items()}
    assert {path: leaf.shape for path, leaf in by_path(model(head).params).items()} == shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameter_trees_of_every_family_are_those_of_flax(name):
    transformers: Any = pytest.importorskip("transformers")
    common = {"vocab_size": 20, "max_position_embeddings": 20} | FAMILIES[name]
    family = bert_adapter.FAMILIES[name.lower()]
    for head, each in family.heads.items():
        reference = getattr(transformers, each.flax or "", None) or pytest.skip(
            f"transformers {transformers.__version__}"
        )
        config = getattr(transformers, f"{name}Config")(**common, num_labels=LABELS[head])
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            theirs = reference(config, input_shape=(1, 2, 4) if head == "choice" else (1, 4), _do_init=False)
            wanted = {path: leaf.shape for path, leaf in by_path(theirs.params_shape_tree).items()}
        params, _ = parameter_shapes(each.module(family.config(config.to_dict())))
        assert {path: leaf.shape for path, leaf in by_path(params).items()} == wanted


@pytest.mark.parametrize("head", NAMES)
def test_losses_are_those_of_pytorch(head, tmp_path):
    """Which averages over places, and over start and end; here the losses of all places of an example are added up."""
    made = torch_model(head)
    made.save_pretrained(tmp_path)
    batch = {name: array[..., :5] for name, array in inputs_for(head).items() if name != "attention_mask"}
    shape, count = {"choice": ((3,), 2), "answer": ((3, 2), 5)}.get(
        head, ((3, 5), {"tokens": 3, "words": 20}.get(head))
    )
    labels = RNG.integers(0, count, shape).astype(np.int32)
    if len(shape) == 2 and head != "answer":
        labels[0, 1:] = labels[2, 3] = -100
    if head == "answer":
        theirs = torch_output(made, batch, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
        places = 3 * 2
    else:
        theirs, places = torch_output(made, batch, labels=labels).loss, int(np.sum(labels != -100))
    loaded = load(tmp_path)
    output = bert_adapter.apply(loaded.module, loaded.params, **batch)
    ours = task_loss(loaded.module)(output, {**batch, "labels": labels})
    assert ours.shape == (3,)
    np.testing.assert_allclose(np.sum(ours) / places, float(theirs), rtol=1e-5)


def test_no_loss_of_an_answer_depends_on_padding():
    output, labels = RNG.normal(size=(2, 9, 2)).astype(np.float32), np.array([[1, 3], [0, 0]], np.int32)
    mask = (np.arange(9) < [[5], [7]]).astype(np.int32)
    longer = np.where(mask[:, :, None] > 0, output, 9)
    loss = task_loss(model("answer").module)
    one, two = (loss(jnp.asarray(each), {"attention_mask": mask, "labels": labels}) for each in (output, longer))
    np.testing.assert_array_equal(one, two)
    alone = [loss(jnp.asarray(output[i : i + 1, :n]), {"labels": labels[i : i + 1]})[0] for i, n in enumerate((5, 7))]
    np.testing.assert_allclose(one, alone, rtol=20 * EPS)


# Fisher information, beside sums over all labels.


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fisher(logits):
    """The expectation over labels, drawn at each place, of the gradients' outer product; of (places, classes)."""
    p, total = np.exp(log_softmax(logits)), 0.0
    for labels in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        gradient = (p - np.eye(logits.shape[1])[list(labels)]).ravel()
        total = total + np.prod(p[range(len(logits)), labels]) * np.outer(gradient, gradient)
    return total


def all_signs(shape):
    return np.array(list(itertools.product((-1.0, 1.0), repeat=int(np.prod(shape))))).reshape(-1, *shape)


def test_directions_are_in_expectation_what_all_labels_sum_to(x64):
    logits = RNG.normal(0, 2, (2, 3))
    signs = all_signs(logits.shape)
    many = jnp.broadcast_to(jnp.asarray(logits), signs.shape)
    found = np.asarray(categorical.combined(many, jnp.asarray(signs), jnp.ones(signs.shape[:2], bool)))
    flat = found.reshape(len(signs), -1)
    np.testing.assert_allclose(flat.T @ flat / len(signs), fisher(logits), rtol=0, atol=1e-13)


def test_directions_of_a_span_are_of_visible_tokens_in_expectation(x64):
    logits, mask = RNG.normal(0, 2, (1, 4, 2)), np.array([[1, 1, 1, 0]])
    ends = span.ends(jnp.asarray(logits), {"attention_mask": mask})
    signs = all_signs((2, 3))
    signs = np.concatenate([signs, np.ones((len(signs), 2, 1))], axis=2)
    many = jnp.broadcast_to(ends, signs.shape)
    found = np.asarray(categorical.combined(many, jnp.asarray(signs), jnp.ones(signs.shape[:2], bool)))
    assert not found[:, :, 3].any()
    flat = found[:, :, :3].reshape(len(signs), -1)
    np.testing.assert_allclose(flat.T @ flat / len(signs), fisher(logits[0, :3].T), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [[1, 1, 1], [1, 1, 1]]),
        ({"attention_mask": [[1, 1, 0], [1, 1, 1]]}, [[1, 1, 0], [1, 1, 1]]),
        ({"attention_mask": [[1, 1, 0], [1, 1, 1]], "labels": [[-100, 2, -100], [0, -100, 1]]}, [[0, 1, 0], [1, 0, 1]]),
        ({"labels": [1, 2]}, [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_places_count_that_are_visible_and_whose_label_if_any_is_not_ignored(given, wanted):
    batch = {name: np.array(array) for name, array in given.items()}
    np.testing.assert_array_equal(categorical.counted(jnp.zeros((2, 3, 4)), batch), np.array(wanted, bool))


def explicit_fisher(module, params, batch, losses):
    """Of one example: the sum over labels of their likelihood times the square of the gradient of the value kernel.

    losses: output -> minus the logarithms of the likelihoods of all labels.
    """

    def of_kernel(kernel):
        moved = jax.tree.map(lambda leaf: leaf, params)
        tiny.at(moved, VALUE)["kernel"] = kernel
        return losses(module.apply({"params": moved}, **batch))

    kernel = tiny.at(params, VALUE)["kernel"]
    gradients = jax.jit(jax.jacrev(of_kernel))(kernel)
    return np.einsum("l,lio->io", np.exp(-np.asarray(of_kernel(kernel))), np.asarray(gradients) ** 2)


def joint(log_p):
    """Minus the logarithms of the likelihoods of all labels of places with log_p (places, classes)."""
    total = -log_p[0]
    for row in log_p[1:]:
        total = (total[:, None] - row[None, :]).reshape(-1)
    return total


EXACT: dict[str, Any] = {  # a batch of one, and the likelihoods of all labels given its output
    "tokens": (
        {"input_ids": [[2, 6, 0]], "attention_mask": [[1, 1, 0]]},
        (2, 3),
        lambda output: joint(jax.nn.log_softmax(output[0, :2])),
    ),
    "answer": (
        {"input_ids": [[2, 6, 0]], "attention_mask": [[1, 1, 0]]},
        (2, 2),
        lambda output: joint(jax.nn.log_softmax(output[0, :2].T)),
    ),
    "choice": (
        {"input_ids": [[[2, 6, 0], [2, 7, 8], [2, 3, 9]]], "attention_mask": [[[1, 1, 0], [1, 1, 1], [1, 1, 1]]]},
        None,
        lambda output: -jax.nn.log_softmax(output[0]),
    ),
}


@pytest.mark.parametrize("head", [case for case in slow_but("tokens") if case.values[0] in EXACT])
def test_importance_is_the_fisher_information_summed_over_all_labels(head, x64, monkeypatch):
    """Of an example for each combination of signs, so that the mean over these is the expectation."""
    given, free, losses = EXACT[head]
    batch = {name: np.array(array, np.int32) for name, array in given.items()}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model(head).params)
    module = model(head).module.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    wanted = explicit_fisher(module, params, batch, losses)
    signs = np.ones((1, 1, 1)) if free is None else all_signs(free)
    times = len(signs)

    def enumerated(draw, sampler, like):
        full = np.ones((times, *like.shape[1:]))
        full[:, : signs.shape[1], : signs.shape[2]] = signs
        return jnp.asarray(full, like.dtype)

    monkeypatch.setattr(Draw, "rows", enumerated)
    got = measure_importance(
        lambda params, batch: module.apply({"params": params}, **batch),
        params,
        [{name: np.repeat(array, times, axis=0) for name, array in batch.items()}],
        [VALUE],
        gradients=predictive(module),
        statistics=("fisher", "row_gram", "inputs"),
        progress=False,
    )
    assert got.examples == times
    assert got.tokens == times * batch["attention_mask"].sum()
    found = np.asarray(got[VALUE].fisher).sum(axis=0) / times
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * wanted.max())  # sums in float32
    rows = np.diagonal(np.asarray(got[VALUE].row_gram)) / times
    np.testing.assert_allclose(rows, wanted.sum(axis=1), rtol=0, atol=1e-5 * wanted.sum(axis=1).max())


def test_a_softmax_of_one_choice_has_no_importance_and_is_refused():
    text = {name: array[:, None] for name, array in BATCH.items()}
    with pytest.raises(ValueError, match=r"logits of shape \(3, 1\), wanted two classes or more"):
        bert_adapter.compress(model("choice"), [text], rank=2, progress=False)


@pytest.mark.parametrize("head", NAMES)
def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(head):
    """As much as the loss is expected to be higher if labels are drawn from what is wanted."""
    one, two = RNG.normal(size=(2, 2, 3, 2)).astype(np.float32)
    one, two = (one[:, 0], two[:, 0]) if head == "choice" else (one, two)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    batch = {} if head == "choice" else {"attention_mask": mask}
    apart = distillation(model(head).module, 1.0)
    np.testing.assert_allclose(apart(jnp.asarray(one), jnp.asarray(one), batch), 0, atol=10 * EPS)
    got = apart(jnp.asarray(one), jnp.asarray(two), batch)
    for row in range(2):
        here = slice(None) if head == "choice" else slice(int(mask[row].sum()))
        a, b = (each[row : row + 1] if head == "choice" else each[row, here] for each in (one, two))
        a, b = (log_softmax(np.float64(each.T if head == "answer" else each)) for each in (a, b))
        np.testing.assert_allclose(got[row], np.sum(np.exp(b) * (b - a)), rtol=1e-4)


# Texts and labels.


def test_a_words_label_is_at_its_first_token_and_nowhere_else():
    """ "foxs" is "fox" and "##s"."""
    rows = LabelledTexts([["a", "foxs", "runs"]], [["O", "B-X", "I-X"]])
    (batch,) = labelled_batches(model("tokens"), rows)
    assert batch["input_ids"][0, :6].tolist() == [2, 5, 7, 14, 9, 3]
    assert batch["labels"][0, :7].tolist() == [-100, 0, 1, -100, 2, -100, -100]
    assert "labels" not in text_batches(model("tokens"), ["a foxs runs"])[0]


def test_a_word_without_a_label_does_not_count():
    rows = LabelledTexts([["a", "fox"], ["it", "runs"]], [["O", -100], [2, 0]])
    labels = labelled_batches(model("tokens"), rows)[0]["labels"][:, :3].tolist()
    assert sorted(labels) == [[-100, 0, -100], [-100, 2, 0]]


@pytest.mark.parametrize(("said", "start"), [("red foxs", 2), (" red foxs", 1), ("red foxs ", 2)])
def test_an_answers_tokens_are_found_by_its_letters(said, start):
    rows = LabelledTexts([("it runs", "A red foxs far.")], [{"text": [said], "answer_start": [start]}])
    (batch,) = labelled_batches(model("answer"), rows)
    assert batch["input_ids"][0, :11].tolist() == [2, 12, 9, 3, 5, 6, 7, 14, 10, 13, 3]
    assert batch["labels"].tolist() == [[5, 7]]


def test_a_long_text_is_read_in_rows_that_overlap():
    """Where the answer is not whole, it is none: the first token twice."""
    text = " ".join(["a red fox runs"] * 6)
    rows = LabelledTexts([("it", text)], [{"text": ["fox runs"], "answer_start": [21]}])
    batches = labelled_batches(model("answer"), rows, batch_size=1)
    read = [batch["input_ids"][0].tolist() for batch in batches]
    labels = [batch["labels"][0].tolist() for batch in batches]
    assert len(batches) > 1
    found = [ids[start : end + 1] for ids, (start, end) in zip(read, labels, strict=True) if end]
    assert found
    assert all(ids == [7, 9] for ids in found)


def test_masks_are_the_same_whenever_rows_are_read_and_hide_what_is_to_be_predicted():
    texts = TEXTS * 30
    batches = text_batches(model("words"), texts, batch_size=64)
    again = text_batches(model("words"), texts, batch_size=64)
    jax.tree.map(np.testing.assert_array_equal, batches, again)
    ids, labels, mask = (
        np.concatenate([batch[name].ravel() for batch in batches]) for name in ("input_ids", "labels", "attention_mask")
    )
    wanted = labels != -100
    assert not np.any(wanted & ((mask == 0) | np.isin(labels, [0, 2, 3])))  # neither padding nor special tokens
    assert wanted.sum() == len(texts)  # one of each text, which has fewer than ten tokens
    shares = [np.mean(ids[wanted] == 4), np.mean(ids[wanted] == labels[wanted])]
    np.testing.assert_allclose(shares, [0.8, 0.1], atol=0.1)  # of 180 draws: three standard deviations


def test_choices_have_an_axis_of_their_own():
    (batch,) = labelled_batches(model("choice"), ROWS["choice"])
    assert batch["input_ids"].shape == (6, 3, 16)
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]


REFUSED: list[tuple[str, Any, str]] = [
    (
        "tokens",
        LabelledTexts([["a", "fox"]], [["O"]]),
        "row 0, counted from 0: got 1 labels, wanted one for each of 2 words",
    ),
    ("tokens", LabelledTexts([["a", "fox"]], [["O", "B-Y"]]), "row 0.*got the label 'B-Y', wanted a class of the head"),
    ("tokens", LabelledTexts([["a", ""]], [["O", "O"]]), "row 0.*wanted a text .str. or a list of words"),
    ("tokens", LabelledTexts([["a"], ["it"]], [["O"]]), "labels: got 1, wanted a list for each of 2 texts"),
    ("tokens", LabelledTexts([["a"]], None), "labels: got NoneType"),
    (
        "answer",
        LabelledTexts(["it runs"], [{"text": [], "answer_start": []}]),
        "row 0.*got a single text, wanted a question",
    ),
    ("answer", LabelledTexts([("it", "a fox")], [{"text": ["fox"], "answer_start": [1]}]), "row 0.*got the answers"),
    ("answer", LabelledTexts([("it", "a fox")], [{"text": ["fox"]}]), "row 0.*wanted an object with 'text'"),
    ("answer", LabelledTexts([("it", "a fox")], [{"text": "fox", "answer_start": 2}]), "row 0.*got the answers"),
    ("answer", LabelledTexts([("it", "a fox")], [{"text": ["fox"], "answer_start": None}]), "row 0.*got the answers"),
    ("answer", LabelledTexts([("it", "a fox")], 3), "labels: got 3, wanted the answers to each of 1 questions"),
    ("tokens", LabelledTexts([["a"]], 3), "labels: got 3, wanted a list for each of 1 texts"),
    ("answer", LabelledTexts([("it", "a fox")], []), "labels: got 0, wanted the answers to each of 1 questions"),
    ("answer", LabelledTexts([("it runs " * 9, "a fox")], None), "labels: got NoneType"),
    ("words", LabelledTexts(TEXTS, [0] * 6), "labels: got list, wanted None"),
    ("choice", LabelledTexts([("a", ["b"])], [0]), "row 0.*wanted a text and a list of two or more choices"),
    ("choice", LabelledTexts([("a", ["it", "a"]), ("a", ["it"])], [0, 0]), "row 1.*a list of 2 choices, as the first"),
    ("choice", LabelledTexts([("a", ["it", "a"])], [2]), "row 0.*got the label 2, wanted a class of the head, 0 to 1"),
    ("choice", LabelledTexts([("a", ["it", "a"])], [0, 1]), "labels: got 2, wanted one for each of 1 texts"),
    ("tokens", LabelledTexts({"a dog", "it"}, [[0, 0], [0]]), "texts: got set, wanted a list of texts, or of lists"),
    ("tokens", LabelledTexts({"a dog": 1}, [[0, 0]]), "texts: got dict"),
    ("tokens", LabelledTexts("a dog", [[0, 0]]), "texts: got str"),
    ("tokens", LabelledTexts(None, [[0]]), "texts: got NoneType"),
    ("tokens", LabelledTexts([{"a", "dog"}], [[0, 0]]), "row 0.*wanted a text .str. or a list of words"),
    ("tokens", LabelledTexts([["a", "dog"]], [{0, 1}]), "row 0.*got 0 labels, wanted one for each of 2 words"),
    ("tokens", LabelledTexts([["a", "dog"]], {(0, 1)}), "labels: got .*, wanted a list for each of 1 texts"),
    ("tokens", LabelledTexts([["a", "\ud800"]], [[0, 0]]), "row 0.*which is no Unicode text"),
    ("choice", LabelledTexts([("a", ["it", "\ud800"])], [0]), "row 0.*which is no Unicode text"),
    ("choice", LabelledTexts(None, [0]), "texts: got NoneType, wanted rows of a text and a list of choices"),
]


@pytest.mark.parametrize(("head", "rows", "message"), REFUSED)
def test_rows_that_the_head_has_no_use_for_are_refused(head, rows, message):
    for use in (labelled_batches, score):
        with pytest.raises(ValueError, match=message):
            use(model(head), rows)


def test_a_question_that_leaves_no_room_for_the_text_is_refused():
    with pytest.raises(ValueError, match=r"row 0.*got a question of 21 tokens, wanted at most 12, to leave room"):
        text_batches(model("answer"), [("it runs " * 9, "a red fox " * 5)])


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("tokens", np.full((3, 8), 3, np.int32), "batch 0, row 0, place 0: got the label 3, wanted 0 to 2, or -100"),
        (
            "tokens",
            np.zeros(3, np.int32),
            r"batch 0: got labels of int32 and shape \(3,\), wanted integers of \(3, 8\)",
        ),
        (
            "answer",
            np.array([[0, 1], [0, 8], [0, 0]], np.int32),
            "batch 0, row 1, place 1: got the label 8, wanted 0 to 7",
        ),
        ("choice", np.array([0, 1, 2], np.int32), "batch 0, row 2: got the label 2, wanted 0 to 1"),
    ],
)
def test_labels_of_a_batch_that_the_head_cannot_have_are_refused(head, labels, message):
    with pytest.raises(ValueError, match=message):
        finetune(model(head), [{**inputs_for(head), "labels": labels}], progress=False)


def test_a_default_prompt_is_refused_where_texts_are_not_whole():
    said = json.dumps({"default_prompt_name": "q", "prompts": {"q": "find: "}}).encode()
    files = {**tiny.FILES, "config_sentence_transformers.json": said}
    for head in NAMES:
        with pytest.raises(ValueError, match="got the default prompt 'find: ', supported: none"):
            labelled_batches(model(head)._replace(files=files), ROWS[head])


@pytest.mark.parametrize("kept", [False, True])
def test_words_that_lose_the_spaces_between_them_are_named(kept):
    content = json.loads(tokenizer_of(tiny.model()).backend_tokenizer.to_str())
    spaces = {"type": "ByteLevel", "add_prefix_space": kept, "trim_offsets": True, "use_regex": True}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "add_prefix_space": kept}
    files = {"tokenizer.json": content | {"pre_tokenizer": spaces, "normalizer": None}, "tokenizer_config.json": kind}
    of_bytes = model("tokens")._replace(files={name: json.dumps(each).encode() for name, each in files.items()})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        text_batches(of_bytes, ["a red fox"])
    assert ["words are read without the spaces between them" in str(each.message) for each in said] == [True] * (
        not kept
    )


# Scores.


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [  # as seqeval 1.2.2 counts them
        ("B-X I-X O B-Y", {("X", 0, 1), ("Y", 3, 3)}),
        ("B-X B-X I-X", {("X", 0, 0), ("X", 1, 2)}),
        ("I-X I-X O I-Y", {("X", 0, 1), ("Y", 3, 3)}),
        ("B-X I-Y I-Y", {("X", 0, 0), ("Y", 1, 2)}),
        ("O I-X B-X", {("X", 1, 1), ("X", 2, 2)}),
        ("B-X I-X E-X S-Y I-Y", {("X", 0, 2), ("Y", 3, 3), ("Y", 4, 4)}),
        ("B-A-b I-A-b", {("A-b", 0, 1)}),
        ("O O", set()),
    ],
)
def test_entities_are_whole_spans_of_one_type(tags, wanted):
    assert entities(tags.split()) == wanted


def test_entities_are_those_of_seqeval():
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    names = ["O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y"]
    for _ in range(500):
        tags = RNG.choice(names, size=8).tolist()
        assert entities(tags) == set(labeling.get_entities(tags))


def test_f1_of_entities_is_over_all_rows():
    said, there = [["B-X", "I-X"], ["O", "B-Y"]], [["B-X", "O"], ["B-Y", "B-Y"]]
    assert of_entities(said, there) == pytest.approx({"f1": 0.4, "precision": 1 / 2, "recall": 1 / 3})
    assert of_entities([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0}


ANSWERS = ["The red fox!", "a Fox", "red dogs", "", "fox, fox fox", "the", "it"]


def test_answers_are_compared_as_squad_does():
    metrics = pytest.importorskip("transformers.data.metrics.squad_metrics")
    for said, there in itertools.product(ANSWERS, repeat=2):
        assert plain(said) == metrics.normalize_answer(said)
        got = of_answers([said], [[there] if there else []])
        wanted = [there] if metrics.normalize_answer(there) else [""]
        assert got["exact"] == max(metrics.compute_exact(one, said) for one in wanted)
        assert got["f1"] == pytest.approx(max(metrics.compute_f1(one, said) for one in wanted))


def test_the_best_of_several_answers_counts():
    assert of_answers(["a fox", "it"], [["dog", "Fox."], []]) == {"exact": 0.5, "f1": 0.5}


@pytest.mark.parametrize("head", NAMES)
def test_scores_are_those_of_predictions(head):
    """Of a head whose predictions are known: its kernel is zero, and its bias decides."""
    bias = {"tokens": np.array([1, 9, 0]), "words": 9 * np.eye(20)[7], "answer": np.zeros(2), "choice": np.zeros(1)}[
        head
    ]
    params: Any = jax.tree.map(np.zeros_like, model(head).params)
    place = {"tokens": "classifier", "words": "cls/predictions", "answer": "qa_outputs", "choice": "classifier"}[head]
    tiny.at(params, place)["bias"] = bias.astype(np.float32)
    still = model(head)._replace(params=params)
    got = score(still, ROWS[head])
    words = [word for text in TEXTS for word in text.split()]
    share = words.count("a") / len(words)
    if head == "tokens":  # every word begins an entity
        assert got == pytest.approx({"f1": 2 * share / (1 + share), "precision": share, "recall": 1, "accuracy": share})
    elif head == "answer":  # of equal sums the first one: the text's first token
        assert got == {"exact": 1, "f1": 1}
    elif head == "choice":
        assert got == {"accuracy": pytest.approx(1 / 3)}
    else:
        labels = np.concatenate([batch["labels"].ravel() for batch in text_batches(still, TEXTS)])
        right = np.mean(labels[labels != -100] == 7)
        log_p = 9 * (labels[labels != -100] == 7) - np.log(np.exp(9) + 19)
        assert got == pytest.approx({"perplexity": np.exp(-log_p.mean()), "accuracy": right}, rel=1e-5)


def test_an_answer_may_be_none_where_some_question_has_none():
    rows = LabelledTexts([("it", "a fox"), ("it", "a dog")], [{"text": ["fox"], "answer_start": [2]}, NONE])
    params: Any = jax.tree.map(np.zeros_like, model("answer").params)
    assert score(model("answer")._replace(params=params), rows) == {"exact": 0.5, "f1": 0.5}


NONE: dict[str, list] = {"text": [], "answer_start": []}


def test_words_beyond_the_longest_row_are_scored_as_no_entity():
    rows = LabelledTexts([["a"] * 10], [["B-X"] * 10])
    params: Any = jax.tree.map(np.zeros_like, model("tokens").params)
    params["classifier"]["bias"] = np.array([0, 9, 0], np.float32)
    got = score(model("tokens")._replace(params=params), rows, max_length=7)
    assert got["accuracy"] == 0.5
    assert (got["precision"], got["recall"]) == (1, 0.5)


# The whole way.


@pytest.mark.parametrize("head", slow_but("choice"))
def test_a_head_is_compressed_saved_loaded_scored_and_trained(head, tmp_path):
    dense = model(head)
    batches = text_batches(dense, ROWS[head].texts, batch_size=8)
    small, report = bert_adapter.compress(dense, batches, budget=0.5, progress=False)
    assert report.parameters_after <= 0.5 * report.parameters_before
    assert report.predicted is not None
    assert report.predicted > 0
    save(small, tmp_path / "small")
    again = load(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert again.module == small.module
    assert bert_adapter.loss_increase(dense, small, batches) > 0
    trained, losses = finetune(
        again, labelled_batches(again, ROWS[head], batch_size=8), teacher=dense, epochs=1, progress=False
    )
    assert np.isfinite(losses).all()
    assert all(np.isfinite(value) for value in score(trained, ROWS[head], batch_size=8).values())
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained.params, again.params)
    assert any(jax.tree.leaves(moved))


def test_a_rule_about_words_is_learnt():
    """Words that are "a" begin an entity."""
    made = with_head(tiny.model(size=0.2), 3, head="tokens")
    made = made._replace(config=made.config | TAGS)
    trained, losses = finetune(
        made, labelled_batches(made, ROWS["tokens"], batch_size=8), epochs=40, learning_rate=2e-2, progress=False
    )
    assert losses[-1] < 0.5 < losses[0]
    assert score(trained, ROWS["tokens"], batch_size=8)["f1"] > 0.9


# Checkpoints.


def test_a_decoder_that_is_tied_is_read_once_and_not_written(tmp_path):
    made = torch_model("words")
    made.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/model.safetensors"
    tensors, wanted = load_file(file), load(tmp_path / "theirs").params
    embeddings, bias = tensors["bert.embeddings.word_embeddings.weight"], tensors["cls.predictions.bias"]
    decoder = {"cls.predictions.decoder.weight": embeddings, "cls.predictions.decoder.bias": bias}
    other = {"cls.seq_relationship.weight": np.ones((2, 16), np.float32)}
    save_file(tensors | decoder | other, file, metadata={"format": "pt"})
    found = load(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted)
    save(found, tmp_path / "ours")
    assert not load_file(tmp_path / "ours/model.safetensors").keys() & (decoder.keys() | other.keys())
    del tensors["cls.predictions.bias"], tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | decoder, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "theirs").params, wanted)
    save_file(tensors | decoder | {"cls.predictions.bias": bias + 1}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="cls/predictions/decoder/bias: got other numbers than in cls/predictions/bias"
    ):
        load(tmp_path / "theirs")


def test_a_masked_language_model_is_its_encoder_where_its_files_say_that_it_embeds(tmp_path):
    save(model("words"), tmp_path / "model")
    assert output_of(load(tmp_path / "model").module) == "words"
    (tmp_path / "model/1_Pooling").mkdir()
    (tmp_path / "model/1_Pooling/config.json").write_text("{}")
    loaded = load(tmp_path / "model")
    assert output_of(loaded.module) == "embedding"
    assert loaded.config["architectures"] == ["BertModel"]


def test_a_decoder_that_is_not_tied_is_refused():
    for got in (False, "false", None):
        with pytest.raises(ValueError, match=f"tie_word_embeddings: got {json.dumps(got)}, supported: true"):
            module_for(config("words", tie_word_embeddings=got))


def test_an_answer_has_a_start_and_an_end():
    with pytest.raises(ValueError, match="num_labels: got 3, wanted 2"):
        tiny.random_params(module_for(config("answer", num_labels=3)))


@pytest.mark.parametrize("head", ["tokens", "answer", "choice"])
def test_heads_are_put_on_and_taken_off(head):
    """Of an encoder that is factorised, too."""
    kernel = "encoder/layer/0/attention/self/value"
    encoder = tiny.with_factors(tiny.model(), {kernel: 2, "pooler/dense": 2})
    headed = with_head(encoder, 3 if head == "tokens" else None, head=head)
    assert output_of(headed.module) == head
    assert label_count(headed.module) == {"tokens": 3, "answer": 2, "choice": 1}[head]
    assert headed.config["low_rank"]["ranks"].keys() >= {f"bert/{kernel}"}
    assert ("pooler" in headed.params["bert"]) == (head == "choice")
    with pytest.raises(ValueError, match="the model has a head already"):
        with_head(headed, 2)
    bare = without_head(headed)
    for name in ("embeddings", "encoder"):
        jax.tree.map(np.testing.assert_array_equal, bare.params[name], encoder.params[name])
    assert bare.module == encoder.module.clone(stages=bare.module.stages, add_pooling_layer=head == "choice")
    assert without_head(bare) is bare


def small_config(kind, name):
    """Of the family's class for a task, with the fewest entries that it takes."""
    entries = {"vocab_size": 20, "max_position_embeddings": 20, "hidden_size": 16, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
    return entries | sizes | {"model_type": kind.lower(), "architectures": [f"{kind}For{name}"]}


@functools.cache
def pretrained(kind):
    """A masked LM; BERT's has a pooler beside its head, as bert-base-uncased has."""
    entries = small_config(kind, "MaskedLM")
    module = module_for(entries)
    module = module.clone(add_pooling_layer=True) if kind == "Bert" else module
    return bert_adapter.Model(module, tiny.random_params(module), entries, {})


@pytest.mark.parametrize(
    ("kind", "head", "kept", "new"),
    [
        ("Bert", "labels", ["bert/pooler/dense"], ["classifier"]),
        ("Bert", "choice", ["bert/pooler/dense"], ["classifier"]),
        ("Bert", "tokens", [], ["classifier"]),
        ("ModernBert", "labels", ["head/dense", "head/norm"], ["classifier"]),
        ("ModernBert", "answer", ["head/dense", "head/norm"], ["classifier"]),
    ],
)
def test_a_new_head_takes_over_what_was_pretrained(kind, head, kept, new, tmp_path):
    """As transformers does it, and what is saved in between keeps it."""
    save(pretrained(kind), tmp_path / "words")
    masked = load(tmp_path / "words")
    headed = with_head(masked, {"labels": 2, "tokens": 2}.get(head), head=head)
    for path in kept:
        jax.tree.map(np.testing.assert_array_equal, tiny.at(headed.params, path), tiny.at(masked.params, path))
    assert drawn(masked, headed) == new


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch uses it, to open ModernBERT
@pytest.mark.parametrize(
    ("kind", "task", "labels"),
    [
        ("Bert", "SequenceClassification", 2),
        ("Bert", "MultipleChoice", None),
        ("ModernBert", "SequenceClassification", 2),
        ("ModernBert", "TokenClassification", 3),
    ],
)
def test_a_new_head_is_the_one_of_pytorch_but_for_what_is_drawn(kind, task, labels, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save(pretrained(kind), tmp_path / "words")
    head = {"SequenceClassification": "labels", "MultipleChoice": "choice", "TokenClassification": "tokens"}[task]
    headed = with_head(load(tmp_path / "words"), labels, head=head)
    more = {} if labels is None else {"num_labels": labels}
    theirs = getattr(transformers, f"{kind}For{task}").from_pretrained(tmp_path / "words", **more).eval()
    classifier = {"weight": headed.params["classifier"]["kernel"].T, "bias": headed.params["classifier"]["bias"]}
    theirs.classifier.load_state_dict({name: torch.tensor(np.array(each)) for name, each in classifier.items()})
    batch = {name: inputs_for(head)[name] for name in ("input_ids", "attention_mask")}
    ours = bert_adapter.apply(headed.module, headed.params, **batch)
    np.testing.assert_allclose(ours, torch_output(theirs, batch).logits.numpy(), rtol=0, atol=1e-5)


def test_a_pooler_outlasts_a_compression_of_a_masked_language_model(tmp_path):
    masked = tiny.with_factors(pretrained("Bert"), {VALUE: 2})
    save(masked, tmp_path / "small")
    headed = with_head(load(tmp_path / "small"), 2)
    pooler = pretrained("Bert").params["bert"]["pooler"]
    jax.tree.map(np.testing.assert_array_equal, headed.params["bert"]["pooler"], pooler)
    assert drawn(model("words"), with_head(model("words"), 2)) == ["bert/pooler/dense", "classifier"]
    jax.tree.map(np.testing.assert_array_equal, without_head(load(tmp_path / "small")).params["pooler"], pooler)


def test_a_pretraining_head_gives_way_to_a_classifier():
    headed = with_head(model("words"), 2)
    assert output_of(headed.module) == "labels"
    assert headed.params.keys() == {"bert", "classifier"}
    jax.tree.map(
        np.testing.assert_array_equal, headed.params["bert"]["encoder"], model("words").params["bert"]["encoder"]
    )


@pytest.mark.parametrize(
    ("labels", "head", "message"),
    [
        (None, "words", "wanted a checkpoint that has it"),
        (None, "labels", "labels: got None, wanted how many classes"),
        (1, "tokens", "labels: got 1, wanted how many classes a word can have"),
        (3, "answer", "labels: got 3, wanted None: an answer has a start and an end"),
        (4, "choice", "labels: got 4, wanted None: a batch says how many choices"),
        (2, "embedding", "'embedding', which is no head"),
        (2, "nothing", "head: got 'nothing', supported by models of this family: 'embedding', 'labels', 'tokens'"),
    ],
)
def test_heads_that_cannot_be_new_are_refused(labels, head, message):
    with pytest.raises(ValueError, match=message):
        with_head(tiny.model(), labels, head=head)


# Files and the command line.


@pytest.mark.parametrize(
    "content",
    ["# NN O\nAda NN B-PER\n", "#\tO\nAda\tB-PER\n", "1 O\nAda L-PER\n", "O O\nPER PER\n", "Word N\n", "1 I-X\n"],
)
def test_words_that_look_odd_are_words(content, tmp_path):
    (tmp_path / "file").write_text(content, "utf-8")
    assert read_tagged(tmp_path / "file").texts == [[line.split()[0] for line in content.splitlines()]]


def test_tagged_sentences_are_texts_without_their_tags(tmp_path):
    file = tmp_path / "file"
    for content, texts in (
        ("Ada NN B-PER\nruns VB O\n\nFar RB O\n", [["Ada", "runs"], ["Far"]]),
        ("a\nit O\n", ["a", "it O"]),
        ("Ada NOUN\nruns VERB\n\nFar ADV\n", [["Ada", "runs"], ["Far"]]),
        ("Ada 2\nruns -100\n\nFar 0\n", [["Ada", "runs"], ["Far"]]),
        ("a dog\n\nit runs\n", ["a dog", "it runs"]),
        ("a dog\nit runs\n\n", ["a dog", "it runs"]),
        ("a dog\nit\n\nit runs\n", ["a dog", "it", "it runs"]),
    ):
        file.write_text(content, "utf-8")
        assert OUTPUTS["tokens"].texts(file) == texts


def test_numbers_of_classes_are_read_from_files_and_minus_100_is_none(tmp_path):
    file = tmp_path / "tags.txt"
    for content, labels, names in (
        ("Ada 2\nruns -100\n\nFar 0\n", [[2, IGNORED], [0]], 3),
        ("Ada B-X\nruns -100\n\nFar O\n", [["B-X", IGNORED], ["O"]], ["O", "B-X"]),
    ):
        file.write_text(content, "utf-8")
        assert read_tagged(file).labels == labels
        assert OUTPUTS["tokens"].classes(read_tagged(file).labels) == names
    with pytest.raises(ValueError, match="labels: got none but -100"):
        OUTPUTS["tokens"].classes([[IGNORED], [IGNORED]])


def test_tagged_sentences_are_read_with_their_lines(tmp_path):
    file = tmp_path / "tags.txt"
    file.write_text("-DOCSTART- -X- O\n\nAda NNP B-PER\nruns VBZ O\n\n\nFar\tRB\tO\n", "utf-8")
    rows = read_tagged(file)
    assert (rows.texts, rows.labels) == ([["Ada", "runs"], ["Far"]], [["B-PER", "O"], ["O"]])
    assert rows.place(1) == f"{file}, line 7"


@pytest.mark.parametrize(
    ("head", "content", "message"),
    [
        ("tokens", "Ada B-PER\nruns\n", "line 2: got 'runs', wanted a word and its label"),
        ("tokens", "\n", "holds no sentence"),
        ("tokens", "Word\tTag\nAda\tB-PER\nruns\tO\n", "line 1: got a heading, 'Word' and 'Tag', wanted a word"),
        ("tokens", "word\tpos\nAda\tN\nruns\tV\n", "line 1: got a heading, 'word' and 'pos', wanted a word"),
        (
            "tokens",
            "Ada\tB-PER\nruns\tPER\n",
            "line 2: got the label 'PER', wanted O, or B-, I- and so on before a type",
        ),
        ("tokens", "# id 5\tdomain=en\nAda\tB-PER\nruns\tO\n", "line 1: got a comment, wanted none"),
        ("tokens", "# sent_id = 5\nAda\tB-PER\nruns\tO\n", "line 1: got a comment, wanted none"),
        ("tokens", "# newpar\nAda NOUN\nruns VERB\n", "line 1: got a comment, wanted none"),
        ("tokens", "1\tAda\tN\n2\truns\tV\n\n1\tit\tN\n", "line 1: got a first column that counts words"),
        ("tokens", "1-2\tAmy's\t_\n1\tAmy\tN\n2\t's\tV\n", "line 1: got a first column that counts words"),
        ("answer", '{"question": "it", "context": "a"}\n', "line 1: got no 'answers', wanted 'answers', an object"),
        ("answer", "[]\n", "line 1: got list, wanted an object"),
        ("choice", '{"text": "it", "choices": "a", "label": 0}\n', "line 1: got \"a\", wanted 'choices', a list"),
        (
            "choice",
            '\n{"text": "it", "choices": ["a"], "label": true}\n',
            "line 2: got true, wanted 'label', an integer",
        ),
        ("choice", "\n", "holds no rows"),
    ],
)
def test_files_that_are_not_the_heads_are_refused_with_the_line(head, content, message, tmp_path):
    (tmp_path / "file").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        OUTPUTS[head].read(tmp_path / "file")


def written(head, file):
    """The rows in a file of the head's."""
    texts, labels = ROWS[head].texts, ROWS[head].labels
    if head == "tokens":
        rows = [zip(words, tags, strict=True) for words, tags in zip(texts, labels, strict=True)]
        content = "\n\n".join("\n".join(f"{word} {tag}" for word, tag in row) for row in rows)
    elif head == "words":
        content = "\n".join(texts)
    else:
        names = {"answer": ("question", "context", "answers"), "choice": ("text", "choices", "label")}[head]
        rows = [(*text, label) for text, label in zip(texts, labels, strict=True)]
        content = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    file.write_text(content + "\n", "utf-8")
    return file


@pytest.mark.parametrize("head", slow_but("words"))
def test_the_command_line_compresses_and_trains(head, tmp_path, capsys):
    save(model(head), tmp_path / "dense")
    data, small = written(head, tmp_path / "rows"), str(tmp_path / "small")
    texts = data
    if head == "tokens":
        texts = tmp_path / "texts"
        texts.write_text("\n".join(TEXTS) + "\n", "utf-8")
    common = ["--batch-size", "8"]
    size = ["--rank", "4", "--signal", "svd"]
    assert main(["compress", str(tmp_path / "dense"), "--text", str(texts), *size, *common, "-o", small]) == 0
    tuned = str(tmp_path / "tuned")
    kind = ["--head", "words"] if head == "words" else []
    dev = written(head, tmp_path / "dev")
    rows = ["--data", str(data), "--dev", str(dev), "--teacher", str(tmp_path / "dense"), "--epochs", "1", *kind]
    assert main(["finetune", small, *rows, *common, "-o", tuned]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert printed.count("before: ") == printed.count("after: ") == 1
    assert output_of(load(tuned).module) == head


def test_the_command_line_puts_a_head_on_for_the_labels_of_words(tmp_path, capsys):
    save(tiny.model(), tmp_path / "dense")
    data = written("tokens", tmp_path / "rows")
    common = ["--head", "tokens", "--epochs", "1", "--batch-size", "8", "-o", str(tmp_path / "tuned")]
    assert main(["finetune", str(tmp_path / "dense"), "--data", str(data), *common]) == 0
    assert (
        "gets a new head of 2 outputs: a label for each word; drawn at random: classifier\n" in capsys.readouterr().out
    )
    assert load(tmp_path / "tuned").config["id2label"] == {"0": "O", "1": "B-X"}


@pytest.mark.parametrize("stale", [{"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, {"O": 0, "B-X": 2, "I-X": 1}])
def test_classes_are_called_what_id2label_says(stale):
    """As transformers does it, whatever label2id has."""
    model = bert_adapter.with_head(tiny.model(), 3, head="tokens")
    rows = bert_adapter.LabelledTexts([["a", "red", "fox"], ["a", "dog"]], [[0, 1, 2], [0, 1]])
    named, other = (
        model._replace(config=model.config | TAGS | {"label2id": each}) for each in (TAGS["label2id"], stale)
    )
    wanted = bert_adapter.score(named, rows, progress=False)
    assert "f1" in wanted
    assert bert_adapter.score(other, rows, progress=False) == wanted
