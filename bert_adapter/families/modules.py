"""The Linen modules of a family: its states, sentence embeddings, and a classifier, all of one call.

A family's own are these with functions in place of `encode`, `pool` and `head`; the arithmetic is in the functions.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bert_adapter.families.config import check_head
from bert_adapter.families.parts import Context, Ids, Inputs, Output, Scope, States, embedding
from bert_adapter.families.stages import UNDECLARED, Stage

Encode = Callable[[Context, Inputs], States]  # the states before the first layer and after each
Pool = Callable[[Context, Array], Array]  # what a pooler makes of the last states


def context_of(module: Any, deterministic: bool) -> Context:
    return Context(module.config, deterministic, {"dtype": module.dtype, "param_dtype": module.param_dtype})


def run(context: Context, inputs: Inputs, encode: Encode, pool: Pool | None) -> Output:
    """The encoder's output, from parameters directly below the module that calls."""
    states = encode(context, inputs)
    rows = None if pool is None else Scope(pool, name="pooler")(context, states[-1])
    return Output(states[-1], rows, states, inputs.attention_mask)


class Encoder(nn.Module):
    """All hidden states, and what a pooler, where the family has one, makes of the last."""

    config: Any
    add_pooling_layer: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    encode: ClassVar[Encode]
    pool: ClassVar[Pool | None] = None

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Output:
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        pool = type(self).pool if self.add_pooling_layer else None
        return run(context_of(self, deterministic), inputs, type(self).encode, pool)


class SentenceEmbedder(nn.Module):
    """Sentence embeddings: what the stages make of the last states.

    A pooler is there so that the tree is the family's encoder's. Nothing depends on it, so its gradients are zero.
    """

    config: Any
    add_pooling_layer: bool = True
    stages: tuple[Stage, ...] = UNDECLARED
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    encode: ClassVar[Encode]
    pool: ClassVar[Pool | None] = None

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch hidden"]:
        inputs, context = (
            Inputs(input_ids, attention_mask, token_type_ids, position_ids),
            context_of(self, deterministic),
        )
        result = run(context, inputs, type(self).encode, type(self).pool if self.add_pooling_layer else None)
        return embedding(context, self.stages, result.last_hidden_state, attention_mask)


class SequenceClassifier(nn.Module):
    """A classifier's logits, or its values: see `families.predictive`. The encoder's parameters lie below `prefix`."""

    config: Any
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    prefix: ClassVar[str]
    encode: ClassVar[Encode]
    pool: ClassVar[Pool | None] = None
    head: ClassVar[Callable[[Context, Output], Array]]

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"]:
        check_head(self.config)
        inputs, context = (
            Inputs(input_ids, attention_mask, token_type_ids, position_ids),
            context_of(self, deterministic),
        )
        result = Scope(run, name=self.prefix)(context, inputs, type(self).encode, type(self).pool)
        return type(self).head(context, result)


def with_saved_parts(module: Any, paths: Any) -> Any:
    """With a pooler if the checkpoint has one: neither embeddings nor the words behind masks depend on it."""
    return module.clone(add_pooling_layer=any("/pooler/" in f"/{path}" for path in paths))
