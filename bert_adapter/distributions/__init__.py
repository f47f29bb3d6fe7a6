"""What outputs stand for, by the names that `gradients=` takes."""

from bert_adapter.distributions.bernoulli import BERNOULLI
from bert_adapter.distributions.categorical import CATEGORICAL
from bert_adapter.distributions.definition import Distribution
from bert_adapter.distributions.gaussian import GAUSSIAN
from bert_adapter.distributions.span import SPAN

DISTRIBUTIONS: dict[str, Distribution] = {
    "categorical": CATEGORICAL,
    "gaussian": GAUSSIAN,
    "bernoulli": BERNOULLI,
    "span": SPAN,
}
