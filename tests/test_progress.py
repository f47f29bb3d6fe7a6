"""What takes long says how far it is, on a terminal and elsewhere."""

import pytest

from bert_adapter import progress
from bert_adapter.progress import track


@pytest.mark.parametrize(
    ("items", "said"),
    [(range(2), ["heal: 1 of 2, 0 min left", "heal: 2 of 2, 0 min left"]), (iter("ab"), ["heal: 1", "heal: 2"])],
)
def test_a_line_a_minute_where_there_is_no_terminal(items, said, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    assert len(list(track(items, "heal", True))) == 2
    assert capsys.readouterr().err.splitlines() == said


def test_nothing_is_said_of_what_is_short_or_not_to_be_shown(monkeypatch, capsys):
    assert list(track("ab", "heal", True)) == ["a", "b"]
    monkeypatch.setattr(progress, "EVERY", 0)
    assert list(track("ab", "heal", False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
