"""Every family, with every head, is exported factorised, and onnxruntime computes what our module does."""

import re
from typing import Any

import numpy as np
import pytest
import test_families
import tiny

import bert_adapter
from bert_adapter.families import architectures_of, module_for
from bert_adapter.layers.running import kernel_shapes
from bert_adapter.model import Model

KINDS = [
    (case, output)
    for case in test_families.DISTINCT
    for output in architectures_of(bert_adapter.FAMILIES[test_families.CASES[case][0]])
]


def small(name: str, known: dict[str, Any], output: str) -> Model:
    """A model whose encoder's kernels have rank 3."""
    family = bert_adapter.FAMILIES[name]
    kind = architectures_of(family)[output].names[0]
    config = {"model_type": name, "architectures": [kind], "num_labels": 2, **known}
    module = module_for(config)
    ranks = dict.fromkeys((path for path in kernel_shapes(module) if re.search(family.encoder, path)), 3)
    return tiny.with_factors(Model(module, tiny.random_params(module, size=0.3), config, {}), ranks)


@pytest.mark.slow  # each kind of model is traced and run
@pytest.mark.parametrize(("case", "output"), KINDS)
def test_every_family_and_head_is_a_graph(case, output, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, inputs = small(*test_families.CASES[case], output), test_families.batch_of(case)
    types = {"token_type_ids": np.zeros_like(inputs["input_ids"])}
    taken = bert_adapter.FAMILIES[model.config["model_type"]].inputs
    batch = {name: np.asarray(array) for name, array in (inputs | types).items() if name in taken}
    if output == "choice":
        batch = {name: np.stack([array, array[::-1]], axis=1) for name, array in batch.items()}
    bert_adapter.export(model, tmp_path, to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for cut in (batch, {name: array[:1, ..., :3] for name, array in batch.items()}):
        got = session.run(None, {name: array.astype(np.int64) for name, array in cut.items()})
        got = np.stack(got, axis=-1) if output == "answer" else got[-1]
        wanted = bert_adapter.apply(model.module, model.params, **cut)
        np.testing.assert_allclose(got, wanted, atol=1e-4)  # onnxruntime's sums in another order
