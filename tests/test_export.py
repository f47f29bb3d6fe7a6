"""What is exported is what our own module computes, in the libraries that load it."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file
from tiny import BATCH, CLASSIFIER, EMBEDDER

import bert_adapter
from bert_adapter import exporting
from bert_adapter.checkpoint import save, with_dtype_of
from bert_adapter.checkpoint.card_file import CARD
from bert_adapter.checkpoint.names import by_path
from bert_adapter.exporting import onnx_file, pytorch, stablehlo
from bert_adapter.exporting.program import Program, refusing
from bert_adapter.families import module_for
from bert_adapter.families.bert import Bert

QUERY, DENSE = "encoder/layer/0/attention/self/query", "encoder/layer/0/output/dense"
LONG = {name: array.astype(np.int64) for name, array in BATCH.items()}
SHORT = {name: array[1:2, :5] for name, array in LONG.items()}  # another number of texts, of another length
LICENCE = b"---\nlicense: apache-2.0\nbase_model: someone/bert\n---\n\n<!-- written by bert_adapter -->\n"
STAGES = {  # all that can follow an encoder
    "modules.json": json.dumps(
        [
            {"path": path, "type": f"sentence_transformers.models.{kind}"}
            for path, kind in [
                ("", "Transformer"),
                ("1_Pooling", "Pooling"),
                ("2_Dense", "Dense"),
                ("3_Normalize", "Normalize"),
            ]
        ]
    ).encode(),
    "1_Pooling/config.json": json.dumps(
        {
            "word_embedding_dimension": 16,
            "pooling_mode": ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"],
        }
    ).encode(),
    "2_Dense/config.json": json.dumps(
        {"in_features": 96, "out_features": 8, "activation_function": "torch.nn.modules.activation.GELU"}
    ).encode(),
}


@functools.cache
def model(architecture=EMBEDDER, **entries) -> bert_adapter.Model:
    """One with two factorised kernels."""
    prefix = "" if architecture == EMBEDDER else "bert/"
    small = tiny.with_factors(tiny.model(architecture, **entries), {f"{prefix}{QUERY}": 3, f"{prefix}{DENSE}": 4})
    section = small.config["low_rank"] | {"signal": "svd", "calibration": {"texts": 24, "fingerprint": "a1b2"}}
    return small._replace(config=small.config | {"low_rank": section}, files=small.files | {CARD: LICENCE})


@functools.cache
def staged() -> bert_adapter.Model:
    """One that has everything behind its encoder, with a factorised dense layer."""
    files = tiny.FILES | STAGES
    module = module_for(tiny.config(), files)
    dense = model()._replace(
        module=module, params=tiny.random_params(module, size=0.3), files=files, config=tiny.config()
    )
    return tiny.with_factors(dense, {QUERY: 3, "2_Dense/linear": 2})


@functools.cache
def ours(given: Any, short: bool = False) -> np.ndarray:
    """What our module makes of the batch."""
    chosen = {"embeds": model(), "classifies": model(CLASSIFIER, num_labels=3), "staged": staged()}[given]
    batch = {name: array.astype(np.int32) for name, array in (SHORT if short else LONG).items()}
    return np.asarray(bert_adapter.apply(chosen.module, chosen.params, **batch))


@pytest.mark.parametrize("to", ["transformers-dense", "transformers", "sentence-transformers"])
def test_what_is_written_for_pytorch_has_its_names_and_layout(to, tmp_path):
    bert_adapter.export(model(), tmp_path / "out", to=to)
    tensors, layer = load_file(tmp_path / "out/model.safetensors"), QUERY.replace("/", ".")
    left, right = (tiny.at(model().params, QUERY)[side] for side in ("left", "right"))
    if to == "transformers-dense":
        np.testing.assert_allclose(tensors[f"{layer}.weight"], (left @ right).T, rtol=1e-5, atol=1e-6)  # rounding
        assert not [name for name in tensors if "left" in name]
    else:
        np.testing.assert_array_equal(tensors[f"{layer}.left.weight"], left.T)
        np.testing.assert_array_equal(tensors[f"{layer}.right.weight"], right.T)
        np.testing.assert_array_equal(tensors[f"{layer}.right.bias"], tiny.at(model().params, QUERY)["bias"])
        assert tensors[f"{layer}.weight"].size == 0
        assert 'STOCK = "bert"' in (tmp_path / "out/modeling_low_rank_bert.py").read_text("utf-8")


def in_integers(chosen: bert_adapter.Model, directory: Any, dtype: str = "int8") -> bert_adapter.Model:
    """The model as it is read again once its matrices were stored in 8 or 4 bits."""
    save(chosen, directory, dtype=dtype)
    return bert_adapter.load(directory)


def test_integers_stay_integers_beside_their_scales(tmp_path):
    rounded = in_integers(model(), tmp_path / "int8")
    bert_adapter.export(rounded, tmp_path / "out", to="transformers")
    tensors, layer = load_file(tmp_path / "out/model.safetensors"), QUERY.replace("/", ".")
    ours = tiny.at(rounded.params, QUERY)
    for side in ("left", "right"):
        numbers, scale = (tensors[f"{layer}.{side}.{what}"] for what in ("integers", "scale"))
        assert numbers.dtype == np.int8
        np.testing.assert_array_equal((numbers * scale).T, ours[side])
    words = "embeddings.word_embeddings"
    table = tensors[f"{words}.integers"] * tensors[f"{words}.scale"]
    np.testing.assert_array_equal(table, tiny.at(rounded.params, "embeddings/word_embeddings")["embedding"])
    assert re.search(r"integers beside scales.*: of 8 bits in \d+ layers", (tmp_path / "out" / CARD).read_text("utf-8"))
    named = json.loads((tmp_path / "out/config.json").read_text("utf-8"))["low_rank"]["integers"]
    assert {layer, words} <= set(named)
    assert not [
        name
        for name, tensor in tensors.items()
        if tensor.dtype == np.float32 and tensor.ndim == 2 and ("scale" not in name)
    ]
    bert_adapter.export(rounded, tmp_path / "dense", to="transformers-dense")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense/model.safetensors").values()} == {np.dtype("f4")}


def test_integers_of_four_bits_stay_two_in_a_byte(tmp_path):
    rounded = in_integers(model(), tmp_path / "int4", "int4")
    bert_adapter.export(rounded, tmp_path / "out", to="transformers")
    tensors, layer = load_file(tmp_path / "out/model.safetensors"), QUERY.replace("/", ".")
    assert tensors[f"{layer}.left.integers"].shape == (3, 8)
    assert tensors[f"{layer}.right.integers"].shape == (16, 2)  # of three, and none
    assert tensors[f"{layer}.right.scale"].shape == (16, 1)
    assert not [name for name in tensors if name.endswith("_shape")]
    assert re.search(r"integers beside scales.*: of 4 bits in \d+ layers", (tmp_path / "out" / CARD).read_text("utf-8"))
    named = json.loads((tmp_path / "out/config.json").read_text("utf-8"))["low_rank"]["integers"]
    assert set(named.values()) == {"int4"}


@pytest.mark.parametrize("to", ["transformers", "transformers-dense", "stablehlo"])
def test_integers_in_memory_are_exported_as_floats_are(to, tmp_path):
    save(model(), tmp_path / "int4", dtype="int4")
    for name in ("floats", "kept"):
        loaded = bert_adapter.load(tmp_path / "int4", integers=name == "kept")
        bert_adapter.export(loaded, tmp_path / name, to=to)
    for file in (tmp_path / "floats").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "kept" / file.relative_to(tmp_path / "floats")).read_bytes()


def test_merged_model_is_loaded_here_too(tmp_path):
    bert_adapter.export(model(), tmp_path / "out", to="transformers-dense")
    again = bert_adapter.load(tmp_path / "out")
    assert "low_rank" not in again.config
    merged = bert_adapter.merge(model().params)
    jax.tree.map(np.testing.assert_array_equal, again.params, merged)


def test_card_says_where_it_comes_from_what_was_kept_and_how_to_load_it(tmp_path):
    bert_adapter.export(model(), tmp_path / "out", to="transformers", scores={"STS-B": 0.85})
    card = (tmp_path / "out" / CARD).read_text("utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: someone/bert\n")
    assert f"| {QUERY} | 16 | 16 | 3 |" in card
    assert re.search(r"The factors of \d+ are here, [\d,]+ numbers in place of", card)
    assert "24 texts, of the fingerprint a1b2" in card
    assert "error counts: svd" in card
    assert "| STS-B | 0.85 |" in card
    assert '"OUT' in card


def test_card_of_a_dense_export_says_that_nothing_was_saved(tmp_path):
    bert_adapter.export(model(), tmp_path / "out", to="transformers-dense")
    card = (tmp_path / "out" / CARD).read_text("utf-8")
    assert "They are multiplied out, to as many numbers as before." in card
    assert "# someone/bert, dense" in card
    assert "in place of" not in card


def test_licence_and_base_model_of_a_card_go_with_the_model(tmp_path):
    save(model(), tmp_path / "model")
    (tmp_path / "model" / CARD).write_text(
        "---\nlanguage: en\nlicense: mit\ntags: [a]\nbase_model:\n- x/y\n---\n# A model\nIt is the best.\n"
    )
    loaded = bert_adapter.load(tmp_path / "model")
    save(bert_adapter.with_head(loaded, 2), tmp_path / "again")
    kept = (tmp_path / "again" / CARD).read_text("utf-8")
    assert kept.startswith("---\nlanguage: en\nlicense: mit\nbase_model:\n- x/y\n---\n")
    assert "best" not in kept
    assert bert_adapter.load(tmp_path / "again").files[CARD].decode() == kept
    save(loaded, tmp_path / "again")  # a card of ours gives way; one of the user's is refused by test_checkpoint


def test_a_card_that_is_no_yaml_is_left_out_with_a_warning(tmp_path):
    save(model(), tmp_path / "model")
    (tmp_path / "model" / CARD).write_text("---\nlicense: [mit\n---\n")
    with pytest.warns(UserWarning, match=r"README\.md: licence and base model are not carried over"):
        assert CARD not in bert_adapter.load(tmp_path / "model").files


def test_compressed_models_know_their_calibration():
    batches = bert_adapter.text_batches(tiny.model(), ["a dog", "it", "a red fox"], batch_size=2)
    shapes = bert_adapter.select_kernels(tiny.model(), include="query")
    importance = bert_adapter.measure_signal(
        bert_adapter.forward(tiny.model()), tiny.model().params, batches, shapes, signal="activation", progress=False
    )
    small, _ = bert_adapter.compress(
        tiny.model(), batches, rank=2, include="query", signal="activation", importance=importance, progress=False
    )
    calibration = small.config["low_rank"]["calibration"]
    assert calibration["texts"] == 3
    assert len(calibration["fingerprint"]) == 16


REFUSED = [
    ({"to": "torch"}, "to: got 'torch', wanted one of|to.*'torch'"),
    ({"dtype": "int8"}, "dtype: got 'int8' with to='transformers', wanted none"),
    ({"to": "onnx", "dtype": "bfloat16"}, "dtype: got 'bfloat16' with to='onnx', wanted one of 'float32', 'float16'"),
    (
        {"model": tiny.model},
        "to: got 'transformers' for a model without factors or integers, wanted 'transformers-dense'",
    ),
    (
        {"model": lambda: model(CLASSIFIER), "to": "sentence-transformers"},
        "for BertForSequenceClassification, wanted an",
    ),
    ({"out": "mine"}, "mine: wanted a new or empty directory, .*; got thesis.tex"),
    ({"scores": {"a": "b"}}, "scores: got 'a' of 'b', wanted a number"),
    ({"scores": {"a": np.zeros(2)}}, r"scores: got 'a' of array\(.*wanted a number"),
    ({"model": lambda: model()._replace(params=tiny.model().params)}, "config low_rank ranks: got"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_exported_is_refused_before_work(changed, message, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(pytorch, "write", lambda *_: pytest.fail("it works"))
    monkeypatch.setattr(exporting, "find_spec", lambda name: True)
    given: Any = {"to": "transformers", "model": model, "out": "out"} | changed
    made, out = given.pop("model")(), tmp_path / given.pop("out")
    with pytest.raises(ValueError, match=message):
        bert_adapter.export(made, out, **given)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.tex"]


def test_a_family_that_transformers_has_not_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(bert_adapter.FAMILIES, "tortoise", bert_adapter.FAMILIES["bert"])
    slow = model()._replace(config=model().config | {"model_type": "tortoise"})
    with pytest.raises(ValueError, match=r"got 'tortoise' and 'BertModel', which transformers .* has not"):
        bert_adapter.export(slow, tmp_path / "out", to="transformers")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"to='onnx' needs onnx: pip install 'wlra\[export\]'"):
        bert_adapter.export(model(), tmp_path / "out", to="onnx")


def test_a_failing_export_leaves_what_was_there(tmp_path, monkeypatch):
    bert_adapter.export(model(), tmp_path / "out", to="transformers-dense")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(exporting, "describe", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bert_adapter.export(model(), tmp_path / "out", to="transformers")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_inside_of_its_source_is_refused(tmp_path):
    save(model(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"out: .* lies in .*, which is to be exported"):
        bert_adapter.export(tmp_path / "model", tmp_path / "model/out", to="transformers")


def test_factorised_directories_of_ours_are_of_no_type_that_others_know(tmp_path):
    save(model(), tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "low_rank_bert"
    assert bert_adapter.load(tmp_path / "model").config["model_type"] == "bert"
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model")


def graph_outputs(path: Path, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What onnxruntime makes of the batch."""
    session = pytest.importorskip("onnxruntime").InferenceSession(
        path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, batch), strict=True))


@pytest.mark.parametrize(
    ("given", "made", "names"),
    [
        ("embeds", model, ["last_hidden_state", "sentence_embedding"]),
        ("classifies", lambda: model(CLASSIFIER, num_labels=3), ["logits"]),
        ("staged", staged, ["last_hidden_state", "sentence_embedding"]),
    ],
)
def test_onnx_computes_what_our_module_does(given, made, names, tmp_path):
    pytest.importorskip("onnx")
    bert_adapter.export(made(), tmp_path, to="onnx")
    outputs = graph_outputs(tmp_path, LONG)
    assert list(outputs) == names
    np.testing.assert_allclose(outputs[names[-1]], ours(given), atol=1e-4)  # onnxruntime's sums in another order
    np.testing.assert_allclose(graph_outputs(tmp_path, SHORT)[names[-1]], ours(given, short=True), atol=1e-4)
    if names[0] == "last_hidden_state":
        states = bert_adapter.apply(Bert(made().module.config), made().params, **BATCH).last_hidden_state
        np.testing.assert_allclose(outputs[names[0]], states, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("int8", 0.1)])  # of numbers of about 0.3
def test_onnx_in_fewer_bits_is_near(dtype, tolerance, tmp_path):
    pytest.importorskip("onnx")
    bert_adapter.export(model(), tmp_path, to="onnx", dtype=dtype)
    outputs = graph_outputs(tmp_path, LONG)["sentence_embedding"]
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, ours("embeds"), atol=tolerance)
    assert not [path.name for path in tmp_path.iterdir() if "whole" in path.name]
    kinds = {array.data_type for array in pytest.importorskip("onnx").load(tmp_path / "model.onnx").graph.initializer}
    assert {"float16": 10, "int8": 3}[dtype] in kinds  # TensorProto.FLOAT16 and .INT8


def test_onnx_holds_what_is_used_in_operations_that_are_fast(tmp_path):
    onnx = pytest.importorskip("onnx")
    bert_adapter.export(model(), tmp_path, to="onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    ops = [node.op_type for node in proto.graph.node]
    assert (ops.count("LayerNormalization"), ops.count("Softmax"), ops.count("Exp"), ops.count("Expand")) == (
        3,
        1,
        0,
        0,
    )
    names = {array.name for array in proto.graph.initializer}
    assert not [name for name in names if "pooler" in name]
    assert {f"{QUERY}/left", f"{QUERY}/right"} <= names
    assert proto.opset_import[0].version == 17


def test_a_large_model_has_its_numbers_in_a_second_file(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    bert_adapter.export(model(), tmp_path, to="onnx")
    assert (tmp_path / "model.onnx.data").exists()
    np.testing.assert_allclose(graph_outputs(tmp_path, LONG)["sentence_embedding"], ours("embeds"), atol=1e-4)
    bert_adapter.export(model(), tmp_path, to="onnx", dtype="int8")
    np.testing.assert_allclose(graph_outputs(tmp_path, LONG)["sentence_embedding"], ours("embeds"), atol=0.1)


def along(x):
    return jnp.arange(x.shape[1], dtype=x.dtype)


FUNCTIONS: dict[str, Any] = {  # of integers (batch, length)
    "sizes": lambda x: jnp.full(x.shape, 1) * (x.shape[0] * x.shape[1] - 1),
    "flat": lambda x: (x.reshape(-1)[None, :] * 2).sum(axis=1),
    "floor of a half": lambda x: x[:, : x.shape[1] // 2 + 1],
    "last": lambda x: x.shape[1] - 1 - jnp.argmax(x[:, ::-1] > 0, axis=1),
    "sums so far": lambda x: jnp.cumsum(x.astype(jnp.float32), axis=1),
    "sides": lambda x: jnp.concatenate(jnp.split(jnp.sin(x[:, :, None] * jnp.arange(4.0)), 2, axis=-1)[::-1], axis=-1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=7),
    "row": lambda x: jnp.take_along_axis(jnp.cos(x[:, :, None] + jnp.ones(3)), (x[:, :1] % 2)[:, :, None], axis=1),
    "columns": lambda x: jnp.take(x, jnp.array([[0, 1], [1, 0]]), axis=1),
    "distance": lambda x: jnp.clip(jnp.log(1.0 + jnp.abs(along(x)[None, :] - along(x)[:, None])), 0.1, 1.5),
    "logic": lambda x: jnp.where((x > 3) | ~(x < 9), (x == 5) ^ (x != 6), x >= 2).all(axis=1),
    "tiles": lambda x: jnp.tile(1.0 * x, (1, 2)) + jnp.tile(jnp.arange(2.0), x.shape),
    "signs": lambda x: jnp.sign(x - 4.0) * jnp.floor(x / 3) ** 3 + jax.nn.relu(x - 5.0) + jax.nn.silu(-1.0 * x),
    "softmax of columns": lambda x: jax.nn.softmax(jnp.sqrt(1.0 * x), axis=0),
    "softmax of rows": lambda x: jax.nn.softmax(jnp.tanh(1.0 * x), axis=-1),
    "gelu": lambda x: jax.nn.gelu(x - 5.0, approximate=False) + jax.scipy.special.erfc(x / 9) + jax.nn.gelu(x / 4),
    "products": lambda x: jnp.einsum("bi,jk,bj->kib", 1.0 * x, jnp.ones((1, 3)), 1.0 * x[:, :1]),
    "batches": lambda x: jnp.einsum("bthd,bshe->hbtsde", *[jnp.sin(x[..., None, None] + jnp.ones((2, 3)))] * 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_programs_of_jax_are_graphs_of_onnx(name, tmp_path):
    onnx, function = pytest.importorskip("onnx"), FUNCTIONS[name]
    shape = jax.export.symbolic_shape("b, t", constraints=["t >= 2", "b >= 1"])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = Program(lambda params, batch: {"y": function(batch["x"])}, {}, {"x": shape})
        onnx.save(onnx_file.proto_of(program), tmp_path / "model.onnx")
        for size in ((3, 8), (1, 2)):
            x = np.random.default_rng(0).integers(0, 12, size)
            wanted = np.asarray(function(jnp.asarray(x, jnp.int32)), np.float32)
            got = graph_outputs(tmp_path, {"x": x})["y"]
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # float32, in another order


def test_a_module_that_needs_to_know_lengths_is_refused_by_name():
    run = refusing(lambda params, batch: {"y": batch["x"] + np.arange(batch["x"].shape[1])}, "TortoiseModel")
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=r"architectures: got TortoiseModel, wanted a module that runs for .* lengths"):
        onnx_file.proto_of(Program(run, {}, {"x": jax.export.symbolic_shape("b, t")}))


def test_outputs_are_in_the_order_of_optimum(tmp_path):
    onnx = pytest.importorskip("onnx")
    names = ("end_logits", "start_logits")
    program = Program(lambda _, batch: dict.fromkeys(names, batch["x"]), {}, {"x": jax.export.symbolic_shape("b, t")})
    proto = onnx_file.proto_of(program)
    assert [output.name for output in proto.graph.output] == ["start_logits", "end_logits"]
    onnx.checker.check_model(proto, full_check=True)


def test_what_onnx_has_no_operation_for_is_named():
    shape = jax.export.symbolic_shape("b, t")
    program = Program(lambda params, batch: {"y": jax.lax.sort(batch["x"])}, {}, {"x": shape})
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match="to='onnx': the model uses JAX's sort, supported: abs, add"):
        onnx_file.proto_of(program)


def test_stablehlo_computes_what_our_module_does(tmp_path):
    pytest.importorskip("flatbuffers")
    bert_adapter.export(model(), tmp_path, to="stablehlo")
    program = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    outputs = program.call(BATCH)
    assert sorted(outputs) == ["last_hidden_state", "sentence_embedding"]
    np.testing.assert_allclose(outputs["sentence_embedding"], ours("embeds"), atol=1e-5)  # compiled otherwise


def test_stablehlo_refuses_what_its_file_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: True)
    monkeypatch.setattr(stablehlo, "LARGEST", 1000)
    with pytest.raises(
        ValueError, match=r"to: got 'stablehlo' for .* bytes of parameters, wanted at most 1,000: to='onnx'"
    ):
        bert_adapter.export(model(), tmp_path / "out", to="stablehlo")


TORCH = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # importing it takes longer than all the rest
slow = functools.reduce(lambda f, g: lambda x: g(f(x)), TORCH)


def run_in_torch(torch, loaded) -> Any:
    """The outputs of transformers' model for the batch."""
    with torch.no_grad():
        return loaded(**{name: torch.tensor(array) for name, array in LONG.items()})


@slow
@pytest.mark.parametrize("to", ["transformers-dense", "transformers"])
def test_transformers_computes_what_our_module_does(to, torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    trust = {"trust_remote_code": to == "transformers"}
    bert_adapter.export(model(), tmp_path / "embeds", to=to)
    got = run_in_torch(torch, transformers.AutoModel.from_pretrained(tmp_path / "embeds", **trust))
    wanted = bert_adapter.apply(Bert(model().module.config), model().params, **BATCH)
    for name in ("last_hidden_state", "pooler_output"):
        np.testing.assert_allclose(got[name], getattr(wanted, name), atol=1e-5)
    classifier = model(CLASSIFIER, num_labels=3)
    bert_adapter.export(classifier, tmp_path / "classifies", to=to)
    auto = transformers.AutoModelForSequenceClassification
    got = run_in_torch(torch, auto.from_pretrained(tmp_path / "classifies", **trust))
    np.testing.assert_allclose(got.logits, ours("classifies"), atol=1e-5)


@slow
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_compute_in_transformers_and_are_kept(factors, dtype, torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    chosen = model(CLASSIFIER, num_labels=3)
    chosen = chosen if factors else bert_adapter.with_params(chosen, bert_adapter.merge(chosen.params))
    rounded = in_integers(chosen, tmp_path / "stored", dtype)
    bert_adapter.export(rounded, tmp_path / "out", to="transformers")
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
    logits = run_in_torch(torch, loaded).logits
    np.testing.assert_allclose(logits, bert_adapter.apply(rounded.module, rounded.params, **BATCH), atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "again")]
    assert sizes[1] < 1.1 * sizes[0]
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True)
    np.testing.assert_array_equal(run_in_torch(torch, again).logits, logits)
    half = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    np.testing.assert_allclose(run_in_torch(torch, half).logits.float(), logits, atol=0.05)


@slow
def test_a_factorised_model_of_transformers_trains_and_stays_compressed(torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    bert_adapter.export(model(), tmp_path / "out", to="transformers")
    tasks = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "MultipleChoice"]
    for task in tasks:
        getattr(transformers, f"AutoModelFor{task}").from_pretrained(tmp_path / "out", trust_remote_code=True)
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, num_labels=2)
    batch = {name: torch.tensor(array) for name, array in LONG.items()}
    loaded(**batch, labels=torch.tensor([0, 1, 1])).loss.backward()
    layer = loaded.get_submodule(f"bert.{QUERY.replace('/', '.')}")
    assert layer.left.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.left.weight -= layer.left.weight.grad
    loaded.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.get_submodule(f"bert.{QUERY.replace('/', '.')}").left.weight.shape == (3, 16)
    np.testing.assert_array_equal(run_in_torch(torch, again).logits, run_in_torch(torch, loaded.eval()).logits)


@slow
def test_two_families_in_folders_of_one_name_keep_their_code(torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    small = tiny.of_distilbert()
    other = tiny.with_factors(small, {next(iter(bert_adapter.select_kernels(small))): 3})
    loaded = {}
    for name, chosen in {"one": model(), "two": other}.items():
        bert_adapter.export(chosen, tmp_path / name / "small", to="transformers")
        loaded[name] = transformers.AutoModel.from_pretrained(tmp_path / name / "small", trust_remote_code=True)
    for name, each in loaded.items():
        each.save_pretrained(tmp_path / name / "again")
        before, after = ((tmp_path / name / folder).glob("*.py") for folder in ("small", "again"))
        assert [file.read_text("utf-8") for file in before] == [file.read_text("utf-8") for file in after]
        transformers.AutoModel.from_pretrained(tmp_path / name / "again", trust_remote_code=True)


@slow
@pytest.mark.parametrize("factors", [True, False])
def test_what_a_stored_table_cannot_do_is_refused_by_name(factors, torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    words = "embeddings/word_embeddings"
    chosen = tiny.with_factors(tiny.model(), {words: 3}) if factors else in_integers(tiny.model(), tmp_path / "int8")
    bert_adapter.export(chosen, tmp_path / "out", to="transformers")
    with pytest.raises(ValueError, match=r"its table of words is .*cannot have a decoder that is tied"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"its table of words is .*cannot have rows added"):
        loaded.resize_token_embeddings(40)


@slow
@pytest.mark.parametrize("to", ["transformers-dense", "transformers"])
def test_modernbert_of_newer_entries_is_the_same_in_older_releases(to, torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    entries = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2} | {
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "local_attention": 4,
        "pad_token_id": 0,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 20.0}},
    }
    config = {"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"], **entries}
    module = module_for(config)
    chosen = bert_adapter.Model(module, tiny.random_params(module, size=0.3), config, {})
    if to == "transformers":
        chosen = tiny.with_factors(chosen, {"model/layers/0/mlp/Wo": 3})
    bert_adapter.export(chosen, tmp_path / "out", to=to)
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=to == "transformers")
    ids = np.array([[2, 5, 6, 7, 9, 10, 13, 3, 4, 8, 11, 12]])
    with torch.no_grad():
        got = loaded(torch.tensor(ids)).logits
    np.testing.assert_allclose(got, bert_adapter.apply(module, chosen.params, ids.astype(np.int32)), atol=1e-5)


@slow
def test_no_class_of_transformers_draws_random_kernels(torch, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    bert_adapter.export(model(), tmp_path / "out", to="transformers")
    save(model(), tmp_path / "own")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=False)
    dense = bert_adapter.with_params(model(), bert_adapter.merge(model().params))
    bert_adapter.export(in_integers(dense, tmp_path / "int8"), tmp_path / "integers", to="transformers")
    for name in ("out", "integers"):
        with pytest.raises(RuntimeError):  # of a size that does not fit
            transformers.BertModel.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="does not recognize"):
        transformers.AutoModel.from_pretrained(tmp_path / "own")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.BertModel.from_pretrained(tmp_path / "own")


@slow
@pytest.mark.parametrize("given", ["embeds", "staged", "undeclared"])
def test_sentence_transformers_embeds_as_our_module_does(given, torch, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    chosen = {"embeds": model(), "staged": staged()}.get(given) or undeclared()
    bert_adapter.export(chosen, tmp_path / "out", to="sentence-transformers")
    loaded = package.SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    texts = ["a red fox", "it", "a dog runs far from it ."]
    batch = bert_adapter.tokenizer(chosen)(texts)
    wanted = bert_adapter.apply(chosen.module, chosen.params, **batch)
    np.testing.assert_allclose(loaded.encode(texts), wanted, atol=1e-5)


def undeclared() -> bert_adapter.Model:
    """An encoder without modules.json."""
    return model()._replace(module=module_for(tiny.config()), files=dict(tiny.FILES))


@pytest.mark.parametrize("to", ["transformers", "transformers-dense"])
def test_a_dtype_that_was_declared_is_that_of_what_is_written(to, tmp_path):
    """transformers 5 computes in it."""
    given = model()._replace(config=model().config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    bert_adapter.export(given, tmp_path / "out", to=to)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")


def test_integers_count_as_the_numbers_that_they_make():
    """A few numbers of 16 bits beside them are no model in 16 bits."""
    few = {"p": np.zeros((64, 64), np.float16)}
    whole = {"a": np.zeros((100, 100), np.int8), "a_scale": np.zeros((1, 100), np.float32)}
    for file, wanted in ((few | whole, "float32"), (few, "float16")):
        assert with_dtype_of({"dtype": "bfloat16"}, [file]) == {"dtype": wanted}


def test_numbers_that_float16_does_not_hold_are_not_exported_in_it(tmp_path):
    pytest.importorskip("onnx")
    large = by_path(model().params) | {f"{QUERY}/bias": np.full(16, 7e4, np.float32)}
    given = model()._replace(params=unflatten_dict(large, sep="/"))
    with pytest.raises(ValueError, match=f"dtype: got 'float16', which cannot hold 7e\\+04 in {QUERY}/bias: wanted"):
        bert_adapter.export(given, tmp_path / "out", to="onnx", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_ids_beyond_32_bits_are_no_others(tmp_path):
    for package in ("onnx", "onnxruntime", "flatbuffers"):
        pytest.importorskip(package)
    bert_adapter.export(model(), tmp_path / "onnx", to="onnx")
    for beyond in (2**32, -(2**32), 2**31):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            graph_outputs(tmp_path / "onnx", LONG | {"input_ids": LONG["input_ids"] + beyond})


def test_negative_ids_are_no_tokens_from_the_end(tmp_path):
    for package in ("onnx", "onnxruntime", "flatbuffers"):
        pytest.importorskip(package)
    batch = LONG | {"input_ids": np.where(LONG["input_ids"] == 5, -1, LONG["input_ids"])}
    bert_adapter.export(model(), tmp_path / "onnx", to="onnx")
    with pytest.raises(Exception, match="indices element out of data bounds"):
        graph_outputs(tmp_path / "onnx", batch)
    bert_adapter.export(model(), tmp_path / "hlo", to="stablehlo")
    program = jax.export.deserialize(bytearray((tmp_path / "hlo/model.stablehlo").read_bytes()))
    states = program.call({name: array.astype(np.int32) for name, array in batch.items()})["last_hidden_state"]
    assert np.isnan(states[0]).any()
    assert np.isfinite(states[1:]).all()


def test_numbers_are_counted_without_protobuf(tmp_path):
    onnx = pytest.importorskip("onnx")
    bert_adapter.export(model(), tmp_path, to="onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    held = [onnx.numpy_helper.to_array(each).nbytes for each in proto.graph.initializer]
    assert onnx_file.bytes_in(proto) == sum(held) < proto.ByteSize()


def test_long_texts_are_pooled_in_32_bits(tmp_path):
    """The weights of 400 positions add up to more than float16 holds."""
    pytest.importorskip("onnx")
    pooling = {"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False}
    long = tiny.model(max_position_embeddings=400)
    files = long.files | {"1_Pooling/config.json": json.dumps(pooling).encode()}
    long = long._replace(files=files, module=module_for(long.config, files))
    bert_adapter.export(long, tmp_path, to="onnx", dtype="float16")
    batch = {name: np.full((1, 400), value) for name, value in zip(BATCH, (5, 1, 0), strict=True)}
    wanted = bert_adapter.apply(long.module, long.params, **batch)
    got = graph_outputs(tmp_path, {name: array.astype(np.int64) for name, array in batch.items()})
    np.testing.assert_allclose(got["sentence_embedding"], wanted, atol=5e-3)
