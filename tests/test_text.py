"""Texts and labels come through one door each: right, or refused with the row's number or the file's line."""

import codecs
import functools
import itertools
import random
from collections import UserList
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import CLASSIFIER

from bert_adapter.evaluate import embed, of_values, score
from bert_adapter.labels import as_labels, with_head_for
from bert_adapter.outputs import OUTPUTS
from bert_adapter.reading import read_rows, read_texts
from bert_adapter.text import PROGRAM, LabelledTexts, as_texts, few_lengths, labelled_batches, text_batches, tokenizer

TEXTS = ["a red fox", "a dog runs far", ""]
PAIRS = [("a red fox", "a dog"), ("it", "")]


class Frame:
    """As pandas has it: what is iterated are the names of its columns."""

    def __init__(self, values):
        self.values = np.array(values, object)

    def to_numpy(self):
        return self.values

    def __iter__(self):
        return iter(["sentence1", "sentence2"])


@functools.cache
def encode():
    return tokenizer(tiny.model())


@pytest.mark.parametrize(
    "texts",
    [
        TEXTS,
        tuple(TEXTS),
        UserList(TEXTS),
        (text for text in list(TEXTS)),
        dict.fromkeys(TEXTS).keys(),
        np.array(TEXTS),
        np.array(TEXTS, object),
        Frame(TEXTS),
    ],
    ids=["list", "tuple", "UserList", "generator", "keys", "str array", "object array", "Series"],
)
def test_containers_of_texts_are_lists_of_them(texts):
    found = as_texts(texts)
    assert found == TEXTS
    assert {type(text) for text in found} == {str}


@pytest.mark.parametrize(
    "pairs",
    [PAIRS, [list(pair) for pair in PAIRS], np.array(PAIRS), Frame(PAIRS), zip(*zip(*PAIRS, strict=True), strict=True)],
    ids=["tuples", "lists", "array", "DataFrame", "zip"],
)
def test_containers_of_pairs_are_lists_of_them(pairs):
    assert as_texts(pairs) == PAIRS


@pytest.mark.parametrize("text", ["a red fox", np.str_("a red fox"), np.array("a red fox")])
def test_one_text_is_one_row(text):
    got, wanted = encode()(text), encode()(["a red fox"])
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
    np.testing.assert_array_equal(embed(tiny.model(), text), embed(tiny.model(), ["a red fox"]))


def test_an_empty_text_is_special_tokens_alone():
    assert encode()(["a dog", ""])["attention_mask"].sum(axis=1).tolist() == [4, 2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts: got none, wanted at least one"),
        (iter(()), "texts: got none"),
        (["a", None], r"row 1, counted from 0: got None, wanted a text \(str\) or a pair of texts"),
        (["a", float("nan")], "row 1, counted from 0: got nan"),
        (["a", 3], "row 1, counted from 0: got 3"),
        (["a", b"dog"], "row 1, counted from 0: got b'dog'"),
        (["a", {"text": "dog"}], "row 1, counted from 0: got {'text'"),
        (["a", ("it", "dog")], "row 1, counted from 0: got a pair of texts, wanted a single text, as the first row is"),
        ([("it", "dog"), "a"], "row 1, counted from 0: got a single text, wanted a pair of texts"),
        ([("it", "dog"), ("it", None)], r"row 1, counted from 0: got \('it', None\)"),
        ([("it", "dog"), ("it", "dog", "fox")], "row 1, counted from 0: got .*, wanted a text"),
        ([("it",)], "row 0, counted from 0: got .*, wanted a text"),
        (np.array([["a"], ["b"]]), "row 0, counted from 0: got .*, wanted a text"),
        (np.array(3), "row 0, counted from 0: got 3, wanted a text"),
        (np.arange(3), "row 0, counted from 0: got .*, wanted a text"),
        (["a", "\ud800"], "row 1, counted from 0: got .*, which is no Unicode text"),
        ({"a": "b"}, "texts: got dict, wanted a list of str"),
        ({"a", "b"}, "texts: got set, wanted a list of str"),
        (b"a dog", "texts: got bytes, wanted a list of str"),
    ],
)
def test_what_is_no_text_is_refused_everywhere_with_its_row(texts, message):
    calls = [encode(), functools.partial(text_batches, tiny.model()), functools.partial(embed, tiny.model())]
    for call in calls if isinstance(texts, list) else calls[:1]:
        with pytest.raises(ValueError, match=message):
            call(texts)


def test_integers_beyond_int32_are_labels_of_an_embedder():
    large = np.array([3_000_000_000, 1])
    assert as_labels(tiny.model(), large).tolist() == as_labels(tiny.model(), large.tolist()).tolist() == [3e9, 1]
    pairs = [("a dog", "it runs"), ("a dog", "a red fox"), ("far", "from"), ("it", "it")]
    both = [score(tiny.model(), LabelledTexts(pairs, np.arange(1, 5) * scale)) for scale in (1, 10**9)]
    assert both[0]["spearman"] == both[1]["spearman"]


@pytest.mark.parametrize("labels", [frozenset([0, 1]), {0: 1}.keys(), {0, 1}, {0: 1, 1: 0}])
def test_labels_without_an_order_are_refused(labels):
    call = functools.partial(as_labels, tiny.model(CLASSIFIER, num_labels=2), labels)
    if isinstance(labels, set | frozenset | dict):
        with pytest.raises(ValueError, match=r"labels: got .*, wanted one for each row, as a list"):
            call()
    else:
        assert call().tolist() == [0]


def test_values_that_are_all_the_same_are_not_scored():
    pairs = [("a dog", "it runs"), ("far", "from")]
    with pytest.raises(ValueError, match="labels: got 3 for all of 2 rows, wanted two values or more"):
        score(tiny.model(), LabelledTexts(pairs, [3, 3]))
    assert of_values(np.ones(3), np.arange(3)) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x", 1], "labels: got 1 beside 'x', wanted names of classes, or numbers"),
        (["x", None], "labels: got None beside 'x'"),
        ([], "labels: got none"),
        ([["x"], ["y", "z"]], "labels: got "),
    ],
)
def test_labels_that_make_no_head_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        with_head_for(tiny.model(), labels)


@pytest.mark.parametrize(
    "labels", [Frame(["x", "y"]), np.array(["x", "y"], object), (name for name in "xy"), ["x", "y"]]
)
def test_names_in_any_container_make_a_head(labels):
    assert with_head_for(tiny.model(), labels).config["label2id"] == {"x": 0, "y": 1}


def test_a_new_head_has_the_order_of_a_model_of_the_same_names():
    labels, model = ["x", "y"], tiny.model()
    for order, numbers in ((("y", "x"), {"y": 0, "x": 1}), (("y", "z"), {"x": 0, "y": 1})):
        like = model._replace(config=model.config | {"id2label": {str(i): name for i, name in enumerate(order)}})
        assert with_head_for(tiny.model(), labels, like=like).config["label2id"] == numbers


def test_texts_are_cut_where_the_model_says_and_not_before():
    long, model = "fox " * 400, tiny.model(max_position_embeddings=300)
    assert tokenizer(model)(long)["input_ids"].shape == (1, 300)
    assert tokenizer(model, max_length=200)(long)["input_ids"].shape == (1, 200)


def cost(rows, left):
    """Of padding each row to the shortest length that is left and holds it, and of the lengths that are left."""
    return sum(rows[each] * (min(to for to in left if to >= each) - each) for each in rows) + PROGRAM * len(left)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_lengths_costs_less(seed):
    rng = random.Random(seed)
    rows = {each: rng.randint(1, 100) for each in rng.sample(range(1, 200), 6)}
    found, longest = few_lengths(rows), max(rows)
    ways = itertools.chain.from_iterable(itertools.combinations(rows, count) for count in range(len(rows) + 1))
    assert set(found) == set(rows)
    assert cost(rows, set(found.values())) == min(cost(rows, {*way, longest}) for way in ways)


@pytest.mark.parametrize("limit", [64, 50])
def test_batches_of_a_rare_length_are_padded_to_the_next(limit):
    model, many = tiny.model(max_position_embeddings=64), ["a dog"] * 60
    texts = ["fox " * 60, "fox " * 30, *many]
    padded = text_batches(model, texts, batch_size=1, max_length=limit)
    assert [batch["input_ids"].shape[1] for batch in padded] == [limit, limit] + [16] * 60
    for batch, text in zip(padded, texts, strict=True):
        (alone,) = text_batches(model, [text], max_length=limit)
        for name, array in batch.items():
            rest = batch["attention_mask"] == 0
            assert np.array_equal(array[~rest], alone[name][alone["attention_mask"] == 1])
            assert not rest.any() or len(np.unique(array[rest])) == 1
    labelled = labelled_batches(model, LabelledTexts([(text, text) for text in texts], np.ones(62)), 1, limit)
    assert {batch["input_ids"].shape[1] for batch in labelled} == {16, limit}


def test_lengths_that_leave_no_room_for_a_token_are_refused():
    assert tokenizer(tiny.model(), 3)(["a dog"])["input_ids"].shape == (1, 3)
    assert tokenizer(tiny.model(), 5)([("a dog", "it")])["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="max_length: got 2, wanted at least 3 for a text: 2 tokens are special"):
        tokenizer(tiny.model(), 2)
    with pytest.raises(ValueError, match="max_length: got 4, wanted at least 5 for a pair of texts: 3 tokens"):
        tokenizer(tiny.model(), 4)([("a dog", "it")])
    numbers: list[dict[str, Any]] = [{"max_length": 0}, {"batch_size": 0}]
    for options in numbers:
        with pytest.raises(ValueError, match="must be"):
            text_batches(tiny.model(), TEXTS, **options)


@functools.cache
def head(labels, **entries):
    return tiny.model(CLASSIFIER, num_labels=labels, **entries)


def named(entries):
    return head(2)._replace(config=head(2).config | entries)


NAMED = {"label2id": {"no": 0, "yes": 1}, "id2label": {"0": "no", "1": "yes"}}


STARS = {"id2label": {"0": "1", "1": "2"}, "label2id": {"1": 0, "2": 1}}


@pytest.mark.parametrize("labels", [[1], np.array([1, 1]), [np.int64(1)]])
def test_integers_that_are_other_classes_names_are_refused(labels):
    """A file's "1" may be the class 1 or the class of that name."""
    with pytest.raises(ValueError, match="got the integer 1, a class's number, and in id2label the name of class 0"):
        as_labels(named(STARS), labels)
    assert as_labels(named(STARS), ["1", "2"]).tolist() == [0, 1]
    assert as_labels(named(STARS), [0, 1]).tolist() == [0, 1]  # no class is called 0
    assert as_labels(named({"id2label": {"0": "0", "1": "1"}}), [0, 1]).tolist() == [0, 1]


def test_name_of_two_classes_names_none():
    model = named({"label2id": {"no": 0, "yes": 1}, "id2label": {"0": "yes", "1": "other"}})
    assert as_labels(model, ["no", "other"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"got the label 'yes', wanted .* or one of 'no', 'other'"):
        as_labels(model, ["yes"])


@pytest.mark.parametrize(
    ("model", "labels", "wanted"),
    [
        (lambda: head(3), [0, 2, 1], np.array([0, 2, 1], np.int32)),
        (lambda: head(3), np.array([0.0, 2.0, 1.0]), np.array([0, 2, 1], np.int32)),
        (lambda: head(3), np.array([[0], [2], [1]], np.uint8), np.array([0, 2, 1], np.int32)),
        (lambda: head(3), Frame([0, 2, 1]), np.array([0, 2, 1], np.int32)),
        (lambda: head(3), iter([0, 2, 1]), np.array([0, 2, 1], np.int32)),
        (lambda: head(2), [True, False, True], np.array([1, 0, 1], np.int32)),
        (lambda: named(NAMED), ["yes", "no", 1], np.array([1, 0, 1], np.int32)),
        (lambda: named(NAMED), np.array(["yes", "no"]), np.array([1, 0], np.int32)),
        (lambda: named(NAMED | {"label2id": {"LABEL_0": 0, "LABEL_1": 1}}), ["yes", "LABEL_0"], np.array([1, 0], "i4")),
        (lambda: head(1), [0, -2.5, 1e30], np.array([0, -2.5, 1e30], np.float32)),
        (lambda: tiny.model(), np.array([-1, 5]), np.array([-1, 5], np.int32)),
    ],
)
def test_labels_are_those_of_the_head(model, labels, wanted):
    got = as_labels(model(), labels)
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == wanted.dtype


def test_labels_of_several_at_once_are_rows_of_zeros_and_ones():
    model = head(3)._replace(module=head(3).module.clone(config=with_problem(head(3).module.config)))
    rows = [[0, 1, 1], [1.0, 0.0, False]]
    np.testing.assert_array_equal(as_labels(model, rows), np.array(rows, np.float32))
    for labels, message in (
        ([[0, 1, 1], [0, 2, 0]], "row 1, counted from 0: got the label .*2.*, wanted 0 or 1 for each of the head's 3"),
        ([[0, 1], [0, 1]], r"labels: got shape \(2, 2\), wanted 3 labels for each row"),
        ([0, 1], r"labels: got shape \(2,\), wanted 3 labels for each row"),
        ([[0, 1, 1], [0, 1]], "labels: got shape"),
        ([[0, 1, 1], [0, None, 1]], "row 1, counted from 0: got the label"),
    ):
        with pytest.raises(ValueError, match=message):
            as_labels(model, labels)


def with_problem(config):
    return type(config)(**{**vars(config), "problem_type": "multi_label_classification"})


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([0, -1, 1], 2, "row 1, counted from 0: got the label -1, wanted a class of the head, 0 to 1 .*GLUE"),
        ([0, 1, 2], 2, "row 2, counted from 0: got the label 2, wanted a class of the head, 0 to 1"),
        ([0, 1.5, 1], 2, "row 1, counted from 0: got the label 1.5"),
        (np.array([0, np.nan, 1]), 2, "row 1, counted from 0: got the label nan"),
        ([0, None, 1], 2, "row 1, counted from 0: got the label None"),
        ([0, "positive", 1], 2, "row 1, counted from 0: got the label 'positive'"),
        (["0", "1", "1"], 2, "row 0, counted from 0: got the label '0'"),
        (np.ma.masked_equal([0, 9, 1], 9), 2, "row 1, counted from 0: got the label None"),
        ([0, 1j, 1], 2, "row 1, counted from 0: got the label 1j"),
        ([[0], [1, 0], [1]], 2, r"row 0, counted from 0: got the label \[0\]"),
        ([[0, 1], [1, 0], [1, 1]], 2, r"labels: got shape \(3, 2\), wanted one label for each row"),
        ([0, 1], 2, "labels: got 2, wanted one for each of 3 texts"),
        (None, 2, "labels: got NoneType, wanted one for each row"),
        (1, 2, "labels: got int, wanted one for each row"),
        ("011", 2, "labels: got str, wanted one for each row"),
        ([0, np.inf, 1], 1, "row 1, counted from 0: got the label inf, wanted a finite number"),
        ([0, None, 1], 1, "row 1, counted from 0: got the label None, wanted a finite number"),
        ([0, 1e300, 1], 1, "row 1, counted from 0: got the label 1e.300, wanted a finite number"),
        ([0, "2.5", 1], 1, "row 1, counted from 0: got the label '2.5', wanted a finite number"),
        ([0, np.nan, 1], None, "row 1, counted from 0: got the label nan, wanted a finite number"),
    ],
)
def test_labels_that_are_none_of_the_heads_are_refused_for_training_and_scores_alike(labels, count, message):
    model, rows = tiny.model() if count is None else head(count), LabelledTexts(["a", "dog", "runs"], labels)
    for call in (labelled_batches, score):
        with pytest.raises(ValueError, match=message):
            call(model, rows)


def test_rows_of_a_file_are_refused_with_their_line(tmp_path):
    file = tmp_path / "test.tsv"
    file.write_text("sentence\tlabel\n\na dog\t1\nit\t-1\n", "utf-8")
    for call in (labelled_batches, score):
        with pytest.raises(ValueError, match=f"{file}, line 4: got the label -1, wanted a class"):
            call(head(2), read_rows(file))


def test_names_of_classes_are_read_and_make_a_head(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\tlabel\na dog\tyes\nit\tno\n", "utf-8")
    rows = read_rows(file)
    model = with_head_for(tiny.model(), rows.labels)
    assert model.config["label2id"] == {"no": 0, "yes": 1}
    assert as_labels(model, rows.labels).tolist() == [1, 0]
    with pytest.raises(ValueError, match=f"{file}, line 2: got the label 'yes', wanted .*, 0 to 1, or one of 'a', 'b'"):
        labelled_batches(named({"label2id": {"a": 0, "b": 1}}), rows)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 0]), "all are 0, wanted two classes or more"),
        (np.array(["a", "a"]), "all are 'a', wanted two classes or more"),
        (np.array([0, 1000000]), "got the class 1000000 in 2 rows"),
        (np.array([1, 2, 5]), "got the classes 1 to 5, wanted them from 0"),
    ],
)
def test_labels_that_leave_classes_open_make_no_head(labels, message):
    with pytest.raises(ValueError, match=message):
        with_head_for(tiny.model(), labels)


@pytest.mark.parametrize(
    "data", [b"a fox\nit\n", b"\xef\xbb\xbfa fox\r\n\r\nit", b"a fox\rit\r", b"a fox\n \t\nit\n\n"]
)
def test_lines_are_read_whatever_ends_them_and_a_mark_is_skipped(data, tmp_path):
    (tmp_path / "text").write_bytes(data)
    assert read_texts(tmp_path / "text") == ["a fox", "it"]


def test_a_line_is_a_text_whatever_spaces_unicode_has(tmp_path):
    text = "one\x0bsentence\x1cof\x85several\u2028parts"
    (tmp_path / "text").write_text(text, "utf-8")
    assert read_texts(tmp_path / "text") == [text]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a fox".encode("utf-16"), ": got UTF-16, wanted UTF-8: iconv -f UTF-16"),
        (codecs.BOM_UTF16_BE + "a fox".encode("utf-16-be"), ": got UTF-16"),
        ("a fox".encode("utf-32"), ": got UTF-32"),
        ("a fox\nit".encode("utf-16-le"), ", line 1: got a NUL, wanted UTF-8"),
        ("a fox\nna\u00efve".encode("latin-1"), ", line 2: got the byte 0xef, wanted UTF-8"),
        (b"\x1f\x8b\x08\x00", ", line 1: got the byte 0x8b"),
        (b"", " holds no text"),
        (b"\xef\xbb\xbf\r\n", " holds no text"),
    ],
)
def test_other_encodings_are_named_with_the_line(data, message, tmp_path):
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(ValueError, match=f"{tmp_path}/text{message}"):
        read_texts(tmp_path / "text")
    if data.strip(b"\xef\xbb\xbf\r\n"):
        with pytest.raises(ValueError, match=f"{tmp_path}/text{message}"):
            read_rows(tmp_path / "text")


@pytest.mark.parametrize(
    ("content", "texts", "message"),
    [
        ("sentence\tlabel\na fox\t1\n", ["a fox"], "got a heading with 'label', wanted a text a line: read_rows"),
        ("a\tb\tlabel\na fox\tit\t1\n", [("a fox", "it")], "got a heading with 'label'"),
        ("\nsentence\tlabel\na fox\t1\n", None, "got a blank line before the heading, wanted the heading first"),
        ("text,label\na fox,1\n", None, "got a heading with commas, 'text,label', wanted a text a line"),
        ('"text","label"\n"a fox","1"\n', None, "got a heading with commas"),
        ("Sentence; score\na fox; 1\n", None, "got a heading with commas"),
        ("hello, fox\nbye, dog\n", ["hello, fox", "bye, dog"], None),
        ("Class, dismissed\nQuery,\n", ["Class, dismissed", "Query,"], None),
        ("a\tb\tlabel\na fox\tit\t\n", [("a fox", "it")], "got a heading with 'label'"),
        ("gj04\t1\t\ta fox\ngj04\t0\t\tit\n", None, "got 4 columns in every line, wanted a text a line"),
        ('{"text": "a fox"}\n{"text": "it"}\n', None, "got JSON, .*, wanted a text a line"),
        ('[\n{"text": "a fox"}]\n', None, "got JSON"),
        ("the box, label, and\n{it\n[1]\n", ["the box, label, and", "{it", "[1]"], None),
        ("one\ttab\nit\n", ["one\ttab", "it"], None),
    ],
)
def test_what_is_no_text_a_line_is_read_as_rows_or_refused(content, texts, message, tmp_path):
    """By the command line, which leaves labels out; in Python there is a function for each."""
    file = tmp_path / "file"
    file.write_text(content, "utf-8")
    for read, wanted in ((OUTPUTS["embedding"].texts, texts), (read_texts, None if message else texts)):
        if wanted is not None:
            assert read(file) == wanted
        else:
            with pytest.raises(ValueError, match=message):
                read(file)


def test_rows_with_a_mark_and_other_ends_are_read(tmp_path):
    (tmp_path / "rows").write_bytes("\ufefflabel\tsentence\r\n1\ta fox\r\n0\tit\r\n".encode())
    rows = read_rows(tmp_path / "rows")
    assert (list(rows.texts), rows.labels.tolist()) == (["a fox", "it"], [1, 0])
