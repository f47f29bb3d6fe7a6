"""The function that an export computes, for every number of texts and every length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bert_adapter.checkpoint.bits import largest
from bert_adapter.checkpoint.names import by_path
from bert_adapter.families import architecture_of, family_of
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.modules import context_of, run
from bert_adapter.families.parts import Inputs, Scope, embedding
from bert_adapter.layers.integers import is_integers
from bert_adapter.layers.running import apply
from bert_adapter.model import Model
from bert_adapter.vocabulary import has_tokenizer, tokenizer_of

OUTPUTS = ("last_hidden_state", "sentence_embedding", "logits", "start_logits", "end_logits")  # in this order
NO_ROW = np.iinfo(np.int32).max
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # those that tokenizers give


class Program(NamedTuple):
    """A function, its parameters, and the shapes of what it is called with.

    run: (params, {name: integers}) -> {name: numbers}; the names are Optimum's.
    inputs: by name, the shape, whose axes are symbols of `jax.export`.
    """

    run: Callable[[Any, dict[str, Any]], dict[str, Any]]
    params: Any
    inputs: Mapping[str, Sequence[Any]]

    def arguments(self, dtype: Any = jnp.int32) -> dict[str, jax.ShapeDtypeStruct]:
        """What stands for the inputs when it is traced."""
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in self.inputs.items()}


def program_of(model: Model, dtype: Any = jnp.float32) -> Program:
    """The model's function, which computes in this dtype."""
    family, module = family_of(model.config), clone(model.module, dtype)
    architecture = architecture_of(model.config)
    axes = ["batch_size", *(["num_choices"] if has_choices(model) else []), "sequence_length"]
    limits = [f"{axis} >= 1" for axis in axes] + [f"sequence_length <= {family.longest(module.config)}"]
    shape = jax.export.symbolic_shape(", ".join(axes), constraints=limits)
    check_held(model.params, dtype)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), model.params, is_leaf=is_integers)
    inputs = dict.fromkeys(inputs_of(model), shape)
    run = unwrapped(outputs_of(module, architecture, family))
    return Program(refusing(run, architecture.names[0]), params, inputs)


def check_held(params: Any, dtype: Any) -> None:
    """A ValueError for a number that the dtype does not hold: all that it touches would be infinite."""
    most = float(jnp.finfo(dtype).max)
    for path, leaf in by_path(params).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (found := largest(leaf)) > most:
            name = jnp.dtype(dtype).name
            raise ValueError(f"dtype: got {name!r}, which cannot hold {found:.4g} in {path}: wanted 'float32'")


def unwrapped(run: Callable[[Any, dict[str, Any]], Any]) -> Callable[[Any, dict[str, Any]], Any]:
    """The function, to which a negative id is one that no table has: by itself JAX takes it for one from the end."""

    def called(params: Any, batch: dict[str, Any]) -> Any:
        ids = {name: jnp.where(array < 0, NO_ROW, array) for name, array in batch.items() if name.endswith("_ids")}
        return run(params, batch | ids)

    return called


def inputs_of(model: Model) -> list[str]:
    """The names of what the model is called with: of what its family takes, what its tokenizer gives, if it has one."""
    names = [name for name in INPUTS if name in family_of(model.config).inputs]
    if not has_tokenizer(model):
        return names
    given = tokenizer_of(model).model_input_names
    return [name for name in names if name in given]


def has_choices(model: Model) -> bool:
    """Whether each example is a text with several ways to go on."""
    return architecture_of(model.config).names[0].endswith("ForMultipleChoice")


def refusing(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, which says in a ValueError whose it is if it cannot be traced."""

    def traced(*args: Any) -> Any:
        try:
            return run(*args)
        except ValueError:
            raise
        except Exception as error:  # JAX has one for each thing that a symbol cannot tell
            wanted = "wanted a module that runs for batches and lengths that are symbols of jax.export"
            raise ValueError(f"architectures: got {name}, {wanted}: {str(error).splitlines()[0]}") from error

    return traced


def clone(module: Any, dtype: Any) -> Any:
    """The module that computes in this dtype."""
    fields = {name: dtype for name in ("dtype", "param_dtype") if hasattr(module, name)}
    return module.clone(**fields)


def outputs_of(module: Any, architecture: Architecture, family: Family) -> Callable[[Any, dict[str, Any]], Any]:
    """(params, batch) -> the outputs by name; of an embedder, the states too, as if nothing followed the encoder."""

    def states(params: Any, batch: dict[str, Any]) -> Any:
        def last(*inputs: Any) -> Any:
            return run(context_of(module, True), Inputs(*inputs), type(module).encode, None).last_hidden_state

        return apply(Scope(last), params, *(batch.get(name) for name in Inputs._fields))

    def embeds(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        hidden = states(params, batch)
        behind = Scope(lambda x, mask: embedding(context_of(module, True), module.stages, x, mask))
        rows = apply(behind, params, hidden, batch.get("attention_mask"))
        return {"last_hidden_state": hidden, "sentence_embedding": rows}

    def answers(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        logits = apply(module, params, **batch)
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}

    def others(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        name = "sentence_embedding" if architecture == family.embedder else "logits"
        return {name: apply(module, params, **batch)}

    if hasattr(module, "stages") and hasattr(type(module), "encode"):
        return embeds
    return answers if architecture.names[0].endswith("ForQuestionAnswering") else others


def with_norms(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every LayerNorm as a program of its own, of the name LAYER_NORM and its epsilon."""

    def named(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        axes = (getattr(module, "reduction_axes", None), getattr(module, "feature_axes", None))
        whole = isinstance(module, nn.LayerNorm) and module.use_scale and axes == (-1, -1) and "mask" not in kwargs
        if context.method_name != "__call__" or not whole or len(args) != 1:
            return next_fun(*args, **kwargs)
        bias = (module.get_variable("params", "bias"),) if module.use_bias else ()
        return layer_norm(module.epsilon)(args[0], module.get_variable("params", "scale"), *bias)

    def wrapped(*args: Any) -> Any:
        with nn.intercept_methods(named):
            return function(*args)

    return wrapped


LAYER_NORM = "layer_norm of "


def layer_norm(epsilon: float) -> Callable[..., Any]:
    """(x, scale, bias) -> x of mean 0 and variance 1 along the last axis, scaled and shifted."""

    def norm(x: Any, scale: Any, *bias: Any) -> Any:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normal = (centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
        shape = (1,) * (x.ndim - 1) + scale.shape
        return sum((each.reshape(shape) for each in bias), start=normal * scale.reshape(shape))

    norm.__name__ = f"{LAYER_NORM}{epsilon}"
    return jax.jit(norm)
