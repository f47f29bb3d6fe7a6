"""What a user of the installed wheel writes: it runs, and a type checker sees the types of both packages."""

from pathlib import Path

import numpy as np

import bert_adapter
import wlra

W = np.random.default_rng(0).normal(size=(12, 8))
result: wlra.Result = wlra.solve(W, None, 2, method="svd")
assert result.left.shape == (12, 2), result.left.shape
assert "site-packages" in Path(wlra.__file__).parts, wlra.__file__


def unused() -> None:
    """Errors that a type checker must find, or it would call the comments unused."""
    wlra.solve(W, None, "two")  # type: ignore[arg-type]
    bert_adapter.load(2)  # type: ignore[arg-type]
