"""The registry of signals: what the solver counts an error in each entry of a kernel by.

A signal is one file with a `Signal` in it and one line here. `Signal` lists what it can say of itself.
"""

from bert_adapter.signals.definition import UNITS, Signal
from bert_adapter.signals.diagonal import EXACT, FISHER
from bert_adapter.signals.kfac import ACTIVATION, KFAC
from bert_adapter.signals.marginals import COMBINED, SHAMPOO
from bert_adapter.signals.simple import FWSVD, SVD
from wlra.checks import check_name

SIGNALS: dict[str, Signal] = {
    "combined": COMBINED,
    "shampoo": SHAMPOO,
    "kfac": KFAC,
    "exact": EXACT,
    "fisher": FISHER,
    "activation": ACTIVATION,
    "fwsvd": FWSVD,
    "svd": SVD,
}

DEFAULT = "combined"


def as_signal(signal: str | Signal) -> Signal:
    """The signal itself, or the one that is registered under the name."""
    chosen = signal if isinstance(signal, Signal) else SIGNALS[check_name("signal", signal, SIGNALS)]
    check_name(f"units of signal {chosen.name!r}", chosen.units, UNITS)
    return chosen
