"""One graph for onnxruntime, for every number of texts and every length."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bert_adapter.exporting.primitives import kind
from bert_adapter.exporting.program import Program, inputs_of, program_of
from bert_adapter.exporting.target import Target
from bert_adapter.exporting.texts import example, write_reading
from bert_adapter.exporting.translate import translated
from bert_adapter.model import Model

FILE = "model.onnx"
OPSET, FORMAT = 17, 8  # which onnxruntime has had since 1.12
LARGEST = 2 * 10**9  # bytes of numbers in one file, which cannot be longer than 2 GB; more lie beside it


def write_onnx(model: Model, directory: Path, dtype: str | None) -> None:
    """The graph, with the config that transformers knows and the tokenizer."""
    program = program_of(model, jnp.float16 if dtype == "float16" else jnp.float32)
    proto = proto_of(program)
    write_reading(model, directory)
    if dtype != "int8":
        save(proto, directory / FILE)
        return
    whole = directory / f"whole-{FILE}"
    save(proto, whole)
    quantise(whole, directory / FILE)
    for path in (whole, beside(whole)):
        path.unlink(missing_ok=True)


def proto_of(program: Program) -> Any:
    """The whole model, as ONNX writes it."""
    from onnx import helper, numpy_helper  # pyright: ignore[reportMissingImports]

    graph, outputs = translated(program)
    nodes, used = graph.needed(value.name for value in outputs.values())
    made = [helper.make_node(node.op, node.inputs, graph.nodes[node], **dict(node.attributes)) for node in nodes]
    made += [helper.make_node("Identity", [value.name], [name]) for name, value in outputs.items()]
    inputs = [tensor(name, np.int64, program.inputs[name]) for name in program.inputs]
    results = [tensor(name, np.float32, value.shape) for name, value in outputs.items()]
    held = [numpy_helper.from_array(array, name) for name, array in graph.constants.items() if name in used]
    body = helper.make_graph(made, "model", inputs, results, initializer=held)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(body, opset_imports=opsets, ir_version=FORMAT, producer_name="bert_adapter")


def tensor(name: str, dtype: Any, shape: Sequence[Any]) -> Any:
    """What the graph says of an input or an output; axes of any size have names."""
    from onnx import helper  # pyright: ignore[reportMissingImports]

    sizes = [size if isinstance(size, int) else str(size) for size in shape]
    return helper.make_tensor_value_info(name, kind(dtype), sizes)


def save(proto: Any, path: Path) -> None:
    """The file, and another beside it with the numbers of a model that is too large for one."""
    import onnx  # pyright: ignore[reportMissingImports]

    large = bytes_in(proto) > LARGEST
    onnx.save_model(proto, path, save_as_external_data=large, location=beside(path).name if large else None)


def bytes_in(proto: Any) -> int:
    """Of the numbers in the graph; protobuf's own count of all bytes fails where there are too many for a file."""
    from onnx import helper  # pyright: ignore[reportMissingImports]

    held = proto.graph.initializer
    return sum(math.prod(each.dims) * helper.tensor_dtype_to_np_dtype(each.data_type).itemsize for each in held)


def beside(path: Path) -> Path:
    """The file of a large model's numbers."""
    return path.with_name(f"{path.name}.data")


def quantise(whole: Path, path: Path) -> None:
    """Tables and kernels, factors too, become 8 bits; what is multiplied by kernels is rounded when it is known.

    Kernels have 7 bits, one scale for each column: products of 8 by 8 bits overflow on processors without VNNI. The
    shapes that the quantiser notes within the graph are left out: with them onnxruntime puts sums and norms into one
    operation that is slower than both.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]

    large = beside(whole).exists()
    with quiet():
        quantize_dynamic(
            whole,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            use_external_data_format=large,
        )
    proto = onnx.load_model(path, load_external_data=False)
    del proto.graph.value_info[:]
    onnx.save_model(proto, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Advice that onnxruntime logs is left out: to merge nodes before, which it does itself when it loads the graph."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def check_quantiser(model: Model, dtype: str | None) -> None:
    """A ValueError if onnxruntime, which makes the 8 bits, is missing."""
    if dtype == "int8" and find_spec("onnxruntime") is None:
        raise ValueError("dtype='int8' needs onnxruntime: pip install 'wlra[export]'")


def load(model: Model) -> str:
    """How to load it."""
    call = f"""outputs = session.run(None, {{name: batch[name] for name in {inputs_of(model)}}})
print([(output.name, array.shape) for output, array in zip(session.get_outputs(), outputs)])"""
    session = f'session = onnxruntime.InferenceSession("OUT/{FILE}")'
    return example(model, "np", imports=["onnxruntime"], load=session, call=call)


ONNX = Target(
    about=f"one graph of ONNX, opset {OPSET}, for onnxruntime 1.17 and later",
    write=write_onnx,
    load=load,
    check=check_quantiser,
    dtypes=("float32", "float16", "int8"),
    packages=("onnx",),
    library="onnx",
)
