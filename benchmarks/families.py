"""What does each family do with each head and each pooling, and how near are its outputs to PyTorch's?

Random models of every family, two layers of width 16, made by transformers' PyTorch classes and saved by them. Each
is loaded, run on padded rows beside PyTorch, compressed to half by the default signal, saved, loaded again, compared
bit for bit, and trained for a step. A run that was killed goes on where it stopped. An embedding is compared with
what sentence-transformers makes of PyTorch's states. transformers and PyTorch are needed, and sentence-transformers
for poolings.
"""

import argparse
import itertools
import json
import tempfile
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bert_adapter
from benchmarks.tables import Row, arguments, at_most, conclude, keep, kept_in, markdown, read, row
from bert_adapter.checkpoint.names import by_path
from bert_adapter.families import architectures_of, module_for
from bert_adapter.families.stages import MODES
from bert_adapter.sample import FILES

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
COMMON = {"vocab_size": 20, "max_position_embeddings": 24, "num_labels": 3}
CONFIGS: dict[str, dict[str, Any]] = {  # what the families' configs have beside COMMON, or another name for
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": WIDE | {"embedding_size": 8},
    "modernbert": WIDE | {"pad_token_id": 0, "local_attention": 4},
}
LABELS: dict[str, Any] = {  # by the head, those of three rows
    "labels": [0, 2, 1],
    "tokens": [[0, 1, 2, 0, 1, 2], [0, 1, 2, -100, -100, -100], [1, -100, -100, -100, -100, -100]],
    "answer": [[1, 2], [0, 0], [0, 0]],
    "words": [[-100, 5, 6, -100, -100, -100], [-100, 7, -100, -100, -100, -100], [4, -100, -100, -100, -100, -100]],
    "choice": [0, 1, 1],
}
KINDS = {
    "labels": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
    "words": "ForMaskedLM",
    "choice": "ForMultipleChoice",
}
IDS = np.array([[2, 5, 6, 7, 9, 3], [2, 8, 3, 0, 0, 0], [2, 0, 0, 0, 0, 0]], np.int32)
MASK = np.array([[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5], np.int32)
NEAR = 1e-5  # of outputs of about 1, in float32


def batch_for(head: str, pad: int) -> dict[str, np.ndarray]:
    """Padded rows; of choices, two for each."""
    batch = {"input_ids": np.where(MASK > 0, IDS, pad).astype(np.int32), "attention_mask": MASK}
    return {name: np.stack([one, one[::-1]], 1) for name, one in batch.items()} if head == "choice" else batch


def made(name: str, head: str) -> Any:
    """transformers' model with random weights."""
    torch, transformers = import_module("torch"), import_module("transformers")
    config = COMMON | CONFIGS.get(name, WIDE)
    architecture = architectures_of(bert_adapter.FAMILIES[name])[head]
    config |= {"num_labels": 2} if head in ("answer", "choice") else {}
    kind = getattr(transformers, architecture.names[0])
    torch.manual_seed(0)
    model = kind(kind.config_class(**config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def output_of(model: Any, head: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """What PyTorch's model makes of the batch: states of tokens, or logits."""
    torch = import_module("torch")
    with torch.no_grad():
        found = model(**{name: torch.tensor(array).long() for name, array in batch.items()})
    if head == "embedding":
        return found.last_hidden_state.numpy()
    return np.stack([found.start_logits, found.end_logits], -1) if head == "answer" else found.logits.numpy()


def pooled(states: np.ndarray, mode: str) -> np.ndarray:
    """The embedding that sentence-transformers makes of PyTorch's states."""
    torch, models = import_module("torch"), import_module("sentence_transformers.models")
    features = {"token_embeddings": torch.tensor(states), "attention_mask": torch.tensor(MASK).long()}
    found = models.Pooling(states.shape[-1], pooling_mode=mode)(features)["sentence_embedding"].numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def saved(name: str, head: str, mode: str, folder: Path) -> Any:
    """transformers' model, in a directory with what declares the pooling."""
    model = made(name, head)
    model.save_pretrained(folder)
    declared = dict(FILES)
    if head == "embedding":
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
        declared |= {"modules.json": json.dumps(listed).encode()}
        declared |= {"1_Pooling/config.json": json.dumps({"pooling_mode": mode}).encode()}
    for path, content in declared.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    return model


def tried(name: str, head: str, mode: str) -> Row:
    """The row of a family, a head and a pooling."""
    with tempfile.TemporaryDirectory() as place:
        theirs = saved(name, head, mode, Path(place) / "dense")
        model = bert_adapter.load(Path(place) / "dense")
        batch = batch_for(head, getattr(theirs.config, "pad_token_id", 0) or 0)
        wanted = output_of(theirs, head, batch)
        if head == "embedding":
            wanted = pooled(wanted, mode)
        got = np.asarray(bert_adapter.apply(model.module, model.params, **batch))
        small, report = bert_adapter.compress(model, [batch] * 2, budget=0.5, progress=False)
        bert_adapter.save(small, Path(place) / "small")
        again = bert_adapter.load(Path(place) / "small")
        before, after = by_path(small.params), by_path(again.params)
        same = before.keys() == after.keys() and all(
            np.array_equal(jax.device_get(before[path]), after[path]) for path in after
        )
        loss = None
        if head in LABELS:
            rows = {**batch, "labels": np.array(LABELS[head], np.int32)}
            _, (loss,) = bert_adapter.finetune(small, [rows], epochs=1, progress=False)
    apart = float(np.max(np.abs(got - wanted)))
    return row(
        name,
        titled(head, mode),
        None,
        "",
        apart=apart,
        factorised=sum(kernel.status != "DENSE" for kernel in report.kernels),
        same=same,
        trained=loss,
    )


def refusal(name: str, head: str) -> str:
    """The sentence for a head that the family has not."""
    architecture = bert_adapter.FAMILIES[name].embedder.names[0].removesuffix("Model") + KINDS[head]
    try:
        module_for({"model_type": name, "architectures": [architecture]})
    except ValueError as error:
        return str(error).partition(", supported")[0]
    return "not refused"


def outcome(name: str, head: str, mode: str) -> Row:
    """The row of a family and an output; what is refused has the sentence."""
    if head in architectures_of(bert_adapter.FAMILIES[name]):
        return tried(name, head, mode)
    return row(name, titled(head, mode), None, "", refused=refusal(name, head))


def titled(head: str, mode: str) -> str:
    """An output's name in the table."""
    return f"{head}, {mode}" if mode else head


def report(rows: list[Row]) -> str:
    """A table of all, a line each, and the bar."""
    head = ["family", "output", "largest difference to PyTorch", "factorised", "back bit for bit", "a training step"]
    lines = []
    for line in rows:
        if "refused" in line:
            lines.append([line["problem"], line["method"], line["refused"], "", "", ""])
            continue
        step = "embeddings are followed, by `heal`" if line["trained"] is None else f"loss {line['trained']:.2f}"
        told = [f"{line['apart']:.1e}", f"{line['factorised']} kernels", "yes" if line["same"] else "NO", step]
        lines.append([line["problem"], line["method"], *told])
    worst = max(line["apart"] for line in rows if "apart" in line)
    return markdown(head, lines) + "\n\n" + at_most("largest difference of all,", worst, NEAR)


def main(argv: list[str] | None = None) -> None:
    options: argparse.Namespace = arguments("families", __doc__).parse_args(argv)
    names = list(bert_adapter.FAMILIES)[:1] if options.quick else list(bert_adapter.FAMILIES)
    file = kept_in(options, "families")
    done = {(line["problem"], line["method"]) for line in read(file)}
    known = [*(("embedding", mode) for mode in MODES), *((head, "") for head in LABELS)]
    for name, (head, mode) in itertools.product(names, known):
        if (name, titled(head, mode)) not in done:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the loss of random kernels rises
                keep(file, line := outcome(name, head, mode))
            print(f"  {name}, {titled(head, mode)}: {line.get('apart', 'refused')}", flush=True)
    conclude(file, report, None, __doc__)


if __name__ == "__main__":
    main()
