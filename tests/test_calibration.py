"""What is measured on long texts holds for short ones too."""

import numpy as np
import pytest
import tiny

import bert_adapter


def long_texts(count, words=60):
    known = [word for word in tiny.WORDS if word.isalpha()]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(known, words)) for _ in range(count)]


def rows_of(batches):
    """The ids of each text, without padding, in no order."""
    rows = [
        tuple(ids[mask > 0].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return sorted(rows)


def test_every_other_long_text_is_cut_to_a_span_to_calibrate_on():
    model, texts = tiny.model(max_position_embeddings=128), long_texts(9)
    whole, got = (rows_of(make(model, texts)) for make in (bert_adapter.text_batches, bert_adapter.calibration_batches))
    kept, cut = [row for row in got if row in whole], [row for row in got if row not in whole]
    assert (len(kept), len(cut)) == (5, 4)
    assert all(8 + 2 <= len(row) <= 32 + 2 for row in cut)
    inside = [str(row[1:-1])[1:-1] for row in whole]
    assert all(any(str(row[1:-1])[1:-1] in each for each in inside) for row in cut)
    assert rows_of(bert_adapter.calibration_batches(model, iter(texts))) == got
    assert rows_of(bert_adapter.calibration_batches(model, texts, seed=1)) != got


@pytest.mark.parametrize(
    "texts",
    [["a red fox", "it"], "a red fox", [("a red fox", "it " * 50), ("it " * 50, "a dog")], np.array(["a dog", "it"])],
)
def test_short_texts_and_pairs_are_calibrated_on_as_they_are(texts):
    model = tiny.model(max_position_embeddings=128)
    got, wanted = (
        rows_of(make(model, texts)) for make in (bert_adapter.calibration_batches, bert_adapter.text_batches)
    )
    assert got == wanted


def test_words_are_counted_where_a_tokenizer_knows_no_places(monkeypatch):
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    model, texts = tiny.model(max_position_embeddings=128), long_texts(4)
    lengths = [len(row) for row in rows_of(bert_adapter.calibration_batches(model, texts))]
    assert sum(length <= 34 for length in lengths) == 2


@pytest.mark.parametrize("texts", [[], [3, "a dog"], {"a dog"}])
def test_what_holds_no_texts_is_refused_to_calibrate_on(texts):
    with pytest.raises(ValueError, match=r"got"):
        bert_adapter.calibration_batches(tiny.model(), texts)


def test_words_are_not_cut():
    """Two tokens each: what is tokenized anew has the same ones."""
    model = tiny.model(max_position_embeddings=128)
    batches = bert_adapter.calibration_batches(model, ["dogs foxs " * 25] * 8)
    leads, follows = tiny.WORDS.index("dog"), tiny.WORDS.index("##s")
    rows = [row[1:-1] for row in rows_of(batches)]
    assert sum(len(row) <= 32 for row in rows) == 4
    for row in rows:
        assert row[-1] == follows
        assert row[0] in (leads, tiny.WORDS.index("fox"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"texts": ["a dog", "\ud800"]}, "row 1, counted from 0: got .* no Unicode"), ({"batch_size": 0}, "batch_size")],
)
def test_what_cannot_be_is_refused_before_texts_are_cut(options, message):
    with pytest.raises(ValueError, match=message):
        bert_adapter.calibration_batches(tiny.model(), **({"texts": ["a dog"]} | options))


def test_what_reading_texts_raises_is_not_lost():
    """Of five lines the third is broken: the other two are not all there is."""
    lines = map(int, ["1", "2", "three", "4", "5"])
    with pytest.raises(ValueError, match="three"):
        bert_adapter.calibration_batches(tiny.model(), map(str, lines))


def test_the_name_of_a_file_is_no_text(tmp_path):
    (tmp_path / "texts.txt").write_text("a red fox")
    with pytest.raises(ValueError, match=r"texts: got '.*texts.txt', the name of a file, .*: read_texts\('"):
        bert_adapter.calibration_batches(tiny.model(), str(tmp_path / "texts.txt"))
