"""A program in StableHLO, for every number of texts and every length, with its parameters inside."""

from pathlib import Path

import jax
import jax.export

from bert_adapter.checkpoint.names import by_path
from bert_adapter.exporting.program import inputs_of, program_of
from bert_adapter.exporting.target import Target
from bert_adapter.exporting.texts import example, write_reading
from bert_adapter.model import Model

FILE = "model.stablehlo"
LARGEST = 2 * 10**9  # bytes: a file of jax.export cannot be longer than 2 GB
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def check_size(model: Model, dtype: str | None) -> None:
    """A ValueError if the parameters do not fit into a file of jax.export."""
    size = sum(4 * leaf.size for leaf in by_path(model.params).values())
    if size > LARGEST:
        raise ValueError(f"to: got 'stablehlo' for {size:,} bytes of parameters, wanted at most {LARGEST:,}: to='onnx'")


def write_stablehlo(model: Model, directory: Path, dtype: str | None = None) -> None:
    """The program, with the config and the tokenizer."""
    program = program_of(model)
    function = jax.jit(lambda batch: program.run(program.params, batch))
    exported = jax.export.export(function, platforms=PLATFORMS)(program.arguments())
    write_reading(model, directory)
    (directory / FILE).write_bytes(exported.serialize())


def load(model: Model) -> str:
    """How to load it."""
    call = f"""outputs = program.call({{name: batch[name].astype("int32") for name in {inputs_of(model)}}})
print({{name: array.shape for name, array in outputs.items()}})"""
    program = f'program = jax.export.deserialize(bytearray(pathlib.Path("OUT/{FILE}").read_bytes()))'
    return example(model, "np", imports=["jax.export", "pathlib"], load=program, call=call)


STABLEHLO = Target(
    about="a program for `jax.export.deserialize`, with the jax that wrote it and those of the next six months",
    write=write_stablehlo,
    load=load,
    check=check_size,
    packages=("flatbuffers",),
    library="jax",
)
