"""What else an encoder's models are for: labels of words, answers, the words behind masks, choices."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from bert_adapter.families.family import Architecture, unchanged
from bert_adapter.families.modules import Encode, Pool, context_of, run, with_saved_parts
from bert_adapter.families.parts import Context, Ids, Inputs, Output, Scope, dense, dropout, head_dropout

Head = Callable[[Context, Output], Array]
Table = tuple[Float[Array, "..."], ...]  # of words, (vocabulary, width), or the factors whose product it is
Words = Callable[[Context, Output, Table], Float[Array, "batch time vocabulary"]]
Texts = Num[Array | np.ndarray, "*batch time"]
TABLE = "embeddings/word_embeddings/embedding"


class TokenHead(nn.Module):
    """What `head` makes of the states (batch, time, ...). The encoder's parameters lie below `prefix`."""

    config: Any
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    prefix: ClassVar[str]
    encode: ClassVar[Encode]
    head: ClassVar[Head]

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch time outputs"]:
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        context = context_of(self, deterministic)
        return type(self).head(context, Scope(run, name=self.prefix)(context, inputs, type(self).encode, None))


class WordHead(nn.Module):
    """The logits of all words at each token, from the states and the encoder's own table of words, at `table`.

    A pooler that a checkpoint holds stays, for heads to come: no word depends on it.
    """

    config: Any
    add_pooling_layer: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    prefix: ClassVar[str]
    encode: ClassVar[Encode]
    pool: ClassVar[Pool | None] = None
    head: ClassVar[Words]
    table: ClassVar[str]

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch time vocabulary"]:
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        context = context_of(self, deterministic)
        pool = type(self).pool if self.add_pooling_layer else None
        result = Scope(run, name=self.prefix)(context, inputs, type(self).encode, pool)
        words: Any = self.variables["params"][self.prefix]
        *parents, leaf = self.table.split("/")
        for name in parents:
            words = words[name]
        table = [words[name] for name in ("left", "right") if name in words] or [words[leaf]]
        return type(self).head(context, result, tuple(jnp.asarray(factor, self.dtype) for factor in table))


class ChoiceHead(nn.Module):
    """What `head` makes of each choice (batch * choices, 1), as a row for each example.

    Inputs are (batch, choices, time); those of (batch, time) have one choice.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    prefix: ClassVar[str]
    encode: ClassVar[Encode]
    pool: ClassVar[Pool | None] = None
    head: ClassVar[Head]

    @nn.compact
    def __call__(
        self,
        input_ids: Texts,
        attention_mask: Texts | None = None,
        token_type_ids: Texts | None = None,
        position_ids: Texts | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch choices"]:
        more = (None if each is None else as_rows(each) for each in (attention_mask, token_type_ids, position_ids))
        inputs = Inputs(as_rows(input_ids), *more)
        context = context_of(self, deterministic)
        result = Scope(run, name=self.prefix)(context, inputs, type(self).encode, type(self).pool)
        return type(self).head(context, result).reshape(input_ids.shape[0], -1)


def as_it_is(context: Context, x: Array) -> Array:
    return x


class Decoder(nn.Module):
    """The products of what `part` makes of the states with the words' embeddings, and a bias, below this name."""

    part: Callable[[Context, Array], Array] = as_it_is

    @nn.compact
    def __call__(
        self, context: Context, x: Float[Array, "batch time hidden"], table: Table
    ) -> Float[Array, "batch time vocabulary"]:
        bias = self.param("bias", nn.initializers.zeros, table[0].shape[:1], context.dtypes["param_dtype"])
        logits = against(self.part(context, x), table)
        return logits + bias.astype(logits.dtype)[None, None, :]


def against(x: Float[Array, "batch time width"], table: Table) -> Float[Array, "batch time vocabulary"]:
    """The products with the embeddings of all words."""
    for factor in reversed(table):
        x = x @ factor.T
    return x


def as_rows(texts: Texts) -> Ids:
    """A row for each choice of each example."""
    return texts.reshape(-1, texts.shape[-1])


def token_logits(context: Context, result: Output) -> Float[Array, "batch time labels"]:
    """The classes of each token."""
    x = dropout(context, result.last_hidden_state, head_dropout(context.config))
    return dense(context, context.config.num_labels, "classifier")(x)


def check_span(config: Any) -> None:
    """A ValueError if the outputs cannot be those of an answer."""
    if config.num_labels != 2:
        raise ValueError(f"num_labels: got {config.num_labels}, wanted 2: an answer's start and its end")


def span_logits(context: Context, result: Output) -> Float[Array, "batch time 2"]:
    """How likely an answer starts and ends at each token."""
    check_span(context.config)
    return dense(context, 2, "qa_outputs")(result.last_hidden_state)


def choice_logits(context: Context, result: Output) -> Float[Array, "rows 1"]:
    """How well the pooled token fits."""
    assert result.pooler_output is not None
    return dense(context, 1, "classifier")(dropout(context, result.pooler_output, head_dropout(context.config)))


def heads(
    name: str,
    *,
    prefix: str,
    encode: Encode,
    pool: Pool | None,
    words: Words,
    tied: Mapping[str, str],
    table: str = TABLE,
    tokens: Head = token_logits,
    answer: Head = span_logits,
    choice: Head | None = choice_logits,
    ignored: str = r"(?!)",
    flax: str | None = None,
) -> dict[str, Architecture]:
    """The heads of a family, for its field of that name.

    Args:
      name: with which the names of transformers' classes begin.
      prefix: of the encoder's parameters, without a slash.
      encode, pool: as those of `modules`.
      words: (context, the encoder's output, its table of words) -> logits of the words.
      tied: what `Architecture.tied` is of a masked LM.
      table: the path of the table of words, below the prefix.
      tokens, answer, choice: (context, the encoder's output) -> the output; None if there is no such head.
      ignored: what checkpoints hold that none of the heads uses.
      flax: with which the names of transformers' Flax classes begin.
    """

    def made(
        kind: str,
        base: type[nn.Module],
        labels: Callable[[Any], int],
        tied: Mapping[str, str] = MappingProxyType({}),
        **parts: Any,
    ) -> Architecture:
        functions = {part: staticmethod(each) if callable(each) else each for part, each in parts.items()}
        own = {"prefix": prefix, "encode": staticmethod(encode), "__module__": __name__, "__doc__": base.__doc__}
        return Architecture(
            names=(f"{name}For{kind}",),
            module=type(f"{name}For{kind}", (base,), own | functions),
            labels=labels,
            ignored=ignored if parts.get("pool") else f"^{prefix}/pooler/|{ignored}",
            fit=with_saved_parts if parts.get("pool") and base is WordHead else unchanged,
            flax=flax and f"{flax}For{kind}",
            tied=tied,
        )

    known = {
        "tokens": made("TokenClassification", TokenHead, lambda config: config.num_labels, head=tokens),
        "answer": made("QuestionAnswering", TokenHead, lambda config: 2, head=answer),
        "words": made("MaskedLM", WordHead, lambda config: config.vocab_size, tied, head=words, table=table, pool=pool),
    }
    if choice is not None:
        known["choice"] = made("MultipleChoice", ChoiceHead, lambda config: 1, head=choice, pool=pool)
    return known
