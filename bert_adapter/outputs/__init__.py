"""What a model's output can be for."""

from bert_adapter.outputs.answers import ANSWER
from bert_adapter.outputs.choices import CHOICE
from bert_adapter.outputs.definition import Output
from bert_adapter.outputs.sentences import EMBEDDING, LABELS
from bert_adapter.outputs.tokens import TOKENS
from bert_adapter.outputs.words import WORDS

OUTPUTS: dict[str, Output] = {
    "embedding": EMBEDDING,
    "labels": LABELS,
    "tokens": TOKENS,
    "answer": ANSWER,
    "words": WORDS,
    "choice": CHOICE,
}
