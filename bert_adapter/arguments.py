"""What the command line takes, and the help that it gives."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import wlra
from bert_adapter.checkpoint.bits import DTYPES
from bert_adapter.distributions import DISTRIBUTIONS
from bert_adapter.engines import ENGINES, missing
from bert_adapter.exporting import TARGETS
from bert_adapter.files import path_of
from bert_adapter.outputs import OUTPUTS
from bert_adapter.ranks import UNITS
from bert_adapter.signals import DEFAULT, SIGNALS
from bert_adapter.speed import CELLS, ROUNDS
from bert_adapter.training import DISTIL


class Parser(argparse.ArgumentParser):
    """One that says in a line what is wrong, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bert-adapter: error: {message}; {self.prog} --help says more\n")


ABOUT = "bert-adapter: compress a BERT checkpoint from the command line."
EPILOG = """examples:
  bert-adapter demo
      compress all-MiniLM-L6-v2 to half its encoder and compare methods on held-out sentences
  bert-adapter compress sentence-transformers/all-mpnet-base-v2 --budget 0.5 --text my-sentences.txt -o half
      keep half of the encoder kernels' parameters, where your sentences make them matter
  bert-adapter compress bert-base-uncased --budget 0.7 --of bytes --multiple-of 8 --text my-sentences.txt -o bert-70
      keep 70 % of the whole checkpoint's bytes, at ranks that are multiples of 8
  bert-adapter compress ./my-model --rank 96 --text my-sentences.txt -o small --include 'intermediate|output/dense'
      rank 96 in the feed-forward and output kernels only
  bert-adapter heal half --teacher sentence-transformers/all-mpnet-base-v2 --text many-sentences.txt -o healed
      train it, without labels, to what the dense model makes of sentences; what does best on others is kept
  bert-adapter finetune half --data train.tsv --dev dev.tsv --teacher ./dense-on-the-task -o tuned
      train it on labelled rows, and on what a dense model says about them
  bert-adapter export half -o half-onnx --to onnx --dtype int8
      write it for onnxruntime; --to transformers or sentence-transformers writes it for PyTorch
  bert-adapter bench sentence-transformers/all-mpnet-base-v2 half --cell 1x32 --cell 8x128
      milliseconds and memory of both, in JAX and, where they are installed, onnxruntime and PyTorch

"bert-adapter compress --help" says what each option does, and which signals there are.

What JAX compiles for a model's shapes is kept in bert-adapter in $XDG_CACHE_HOME or ~/.cache, a gigabyte at most, and
used again by the next run. JAX_COMPILATION_CACHE_DIR=FOLDER keeps it elsewhere, JAX_ENABLE_COMPILATION_CACHE=false
nowhere.

then, in Python:
  import bert_adapter
  model = bert_adapter.load("half")
  batch = bert_adapter.tokenizer(model)(["A sentence.", "Another one."])
  embeddings = bert_adapter.apply(model.module, model.params, **batch)  # of a model with a head, what that gives
"""
LATENCY, CELL = "latency", (8, 128)  # a budget of time, and the texts and tokens for which it is
HEADS = {name: output for name, output in OUTPUTS.items() if name != "embedding"}
OFFERED = {name: signal for name, signal in SIGNALS.items() if not signal.needs_labels}  # there are no labels here


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    formatter = argparse.RawDescriptionHelpFormatter
    root = Parser("bert-adapter", description=ABOUT, epilog=EPILOG, formatter_class=formatter)
    root.add_argument("--version", action="version", version=f"bert-adapter of wlra {wlra.__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="compress a real model that comes along, and compare methods")
    demo.add_argument("-o", "--output", type=place, default=Path("bert-adapter-demo"), help="directory (%(default)s)")
    demo.add_argument("--budget", type=float, default=0.5, help="share of the kernels' parameters kept (%(default)s)")
    compress = commands.add_parser(
        "compress", help="compress a checkpoint of your own", epilog=signals_text(), formatter_class=formatter
    )
    add_places(compress)
    add_size(compress.add_argument_group("how small"))
    add_weights(compress.add_argument_group("what counts"))
    heal = commands.add_parser("heal", help="train a compressed checkpoint to a dense one's outputs, without labels")
    add_heal(heal)
    finetune = commands.add_parser(
        "finetune", help="train a checkpoint on labelled rows", epilog=heads_text(), formatter_class=formatter
    )
    add_finetune(finetune)
    export = commands.add_parser(
        "export", help="write a checkpoint for other libraries", epilog=targets_text(), formatter_class=formatter
    )
    add_export(export)
    bench = commands.add_parser(
        "bench", help="time checkpoints beside each other", epilog=engines_text(), formatter_class=formatter
    )
    add_bench(bench)
    return root


def signals_text() -> str:
    """What --signal can be, a line for each."""
    width = max(map(len, OFFERED))
    lines = [f"  {name:{width}}  {signal.about}" for name, signal in OFFERED.items()]
    return "\n".join(["signals, which say how much an error in a kernel counts:", *lines])


def heads_text() -> str:
    """What --head can be, a line for each, and another for the files that it reads."""
    width = max(map(len, HEADS))
    lines = [f"  {name:{width}}  {each.about}\n  {'':{width}}  {each.files}" for name, each in HEADS.items()]
    return "\n".join(["heads, and the files of --data and --dev, in UTF-8:", *lines])


def targets_text() -> str:
    """What --to can be, a line for each."""
    width = max(map(len, TARGETS))
    lines = [f"  {name:{width}}  {target.about}" for name, target in TARGETS.items()]
    return "\n".join(["targets, which are directories with a README.md that says how to load them:", *lines])


def engines_text() -> str:
    """What --engine can be, a line for each."""
    width = max(map(len, ENGINES))
    lines = [
        f"  {name:{width}}  {engine.about}{' (not installed)' if missing(name) else ''}"
        for name, engine in ENGINES.items()
    ]
    return "\n".join(["engines:", *lines])


def add_places(compress: Any) -> None:
    """What is read and written."""
    compress.add_argument("model", type=model, metavar="DIR", help="a Hugging Face directory, or a name on the Hub")
    compress.add_argument(
        "--text",
        type=place,
        required=True,
        metavar="FILE",
        help="UTF-8, a text a line, or rows as finetune's --data, whose labels are left out; hundreds will do, of the "
        "domain to come. Of single texts of more than 32 tokens every other one is cut to a span of 8 to 32, so that "
        "what is measured holds for short texts too",
    )
    compress.add_argument("-o", "--output", type=place, required=True, metavar="OUT", help="the new checkpoint")
    compress.add_argument("--report", type=place, metavar="PAGE", help="an HTML page with figures (default OUT.html)")
    compress.add_argument(
        "--file",
        type=place,
        metavar="FILE",
        help="keep what is measured in FILE, and go on from it with the same model and sentences",
    )
    compress.add_argument(
        "--heal",
        type=place,
        metavar="FILE",
        help="then train the result to the model's outputs on these sentences, as the command heal does; --file keeps "
        "the state of that in FILE.healing",
    )
    compress.add_argument("--batch-size", type=int, default=16, help="sentences at a time (%(default)s)")
    compress.add_argument("--max-length", type=int, help="tokens per sentence at most (what the model declares)")


def add_size(group: Any) -> None:
    """What becomes how small."""
    size = group.add_mutually_exclusive_group(required=True)
    size.add_argument("--budget", type=float, help="the share to keep, in (0, 1], of what --of names")
    size.add_argument("--rank", type=int, help="the rank of every selected kernel")
    group.add_argument(
        "--of",
        choices=(*UNITS, LATENCY),
        default="kernels",
        help="what the budget is a share of: the parameters of the selected kernels (%(default)s), of the whole model, "
        "its bytes, the operations of its dense layers for a token, or its time on this machine, which is measured. Of "
        "bytes, the table of words is factorised too, and each matrix has 32, 16, 8 or 4 bits, whatever loses least",
    )
    group.add_argument(
        "--flops",
        type=float,
        metavar="SHARE",
        help="the share of the operations for a token that may be left besides, in (0, 1]: --of bytes alone spends on "
        "ranks what it saves by bits",
    )
    group.add_argument("--cell", type=cell, metavar="BxL", help="of --of latency: texts by tokens of each (8x128)")
    group.add_argument(
        "--uniform", action="store_true", help="keep the same share of every kernel, not more where it matters more"
    )
    group.add_argument("--multiple-of", type=int, default=1, metavar="N", help="ranks are multiples of N; 16 is fast")
    group.add_argument(
        "--pairs",
        action="store_true",
        help="heads of attention may keep fewer dimensions instead, where that is predicted to lose less than factors; "
        "such kernels are narrower, and faster",
    )
    group.add_argument(
        "--correct",
        type=place,
        metavar="FILE",
        help="other texts, in the form of --text, on which it is measured what the plan's cuts of each kind of "
        "kernel lose: predictions are corrected by that",
    )
    add_selection(group)


def add_selection(group: Any) -> None:
    """Which matrices become smaller, which words stay, and in how many bits."""
    group.add_argument("--include", metavar="REGEX", help="which kernels, by their paths (all of the encoder)")
    group.add_argument(
        "--embeddings",
        action="store_true",
        help="the table of words too, which is half of a small model; --budget is then a share of both",
    )
    group.add_argument(
        "--trim",
        type=place,
        metavar="FILE",
        help="drop the tokens that neither FILE, in the form of --text, nor --text uses, but single characters and "
        "special tokens; the tokenizer changes",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what matrices are stored as; int8 has a scale for each row of a table and each column of a kernel, int4 "
        "for each 64 there, rounded to the nearest: --of bytes loses less at so few bits (as they are)",
    )
    group.add_argument("--exclude", metavar="REGEX", help="which of these stay dense")


def add_weights(group: Any) -> None:
    """What an error is weighted by, and how that is solved."""
    group.add_argument(
        "--signal", choices=OFFERED, default=DEFAULT, help="what an error is weighted by (%(default)s); see below"
    )
    group.add_argument(
        "--gradients", choices=DISTRIBUTIONS, help="of which predictive distribution (the one of the model's head)"
    )
    group.add_argument(
        "--shrink",
        type=float,
        metavar="SHARE",
        help="how far weights are shrunk towards simpler ones, in [0, 1] (as far as they are noise)",
    )
    group.add_argument("--method", choices=wlra.METHODS, help="of the solver (the one that fits the signal)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the random directions in place of labels, the spans cut from long texts, and --heal (%(default)s)",
    )


def add_heal(heal: Any) -> None:
    """What follows what, on which texts, and how."""
    heal.add_argument("model", type=model, metavar="DIR", help="the compressed model, or its name on the Hub")
    heal.add_argument(
        "--teacher", type=model, required=True, metavar="DENSE", help="the dense model that it was made of"
    )
    heal.add_argument(
        "--text", type=place, required=True, metavar="FILE", help="as compress's --text; thousands, like those to come"
    )
    heal.add_argument(
        "--heldout",
        type=place,
        metavar="FILE",
        help="other texts; what does best on them is kept (one of 16 of --text's)",
    )
    heal.add_argument("-o", "--output", type=place, required=True, metavar="OUT", help="the new checkpoint")
    heal.add_argument("--epochs", type=int, help="passes over the texts at most (1 to 20, so that 40,000 are seen)")
    heal.add_argument(
        "--learning-rate",
        type=float,
        help="the highest, of AdamW (up to 1e-3, the less the more is kept; a third where that proves too high)",
    )
    heal.add_argument("--batch-size", type=int, help="texts at a time (16)")
    heal.add_argument("--max-length", type=int, help="tokens of a text at most (what the model declares)")
    heal.add_argument("--seed", type=int, default=0, help="of the order of the texts (%(default)s)")
    heal.add_argument(
        "--file", type=place, metavar="FILE", help="keep the state in FILE until all is saved, and go on from it"
    )


def add_finetune(tune: Any) -> None:
    """What is trained, on what, and how."""
    tune.add_argument(
        "model", type=model, metavar="DIR", help="a checkpoint, dense or compressed, or its name on the Hub"
    )
    tune.add_argument("--data", type=place, required=True, metavar="FILE", help="the rows to train on; see below")
    tune.add_argument("--head", choices=HEADS, help="what for (as the checkpoint's head, or labels); see below")
    tune.add_argument("--dev", type=place, metavar="FILE", help="other rows, to score the model on before and after")
    tune.add_argument("-o", "--output", type=place, required=True, metavar="OUT", help="the new checkpoint")
    tune.add_argument(
        "--teacher",
        type=model,
        metavar="DIR",
        help="a dense model of the same task, whose outputs are followed too",
    )
    tune.add_argument("--distil", type=float, metavar="SHARE", help=f"the teacher's share of the loss ({DISTIL})")
    tune.add_argument("--epochs", type=int, default=3, help="passes over the rows (%(default)s)")
    tune.add_argument("--learning-rate", type=float, default=5e-5, help="the highest, of AdamW (%(default)s)")
    tune.add_argument("--batch-size", type=int, default=32, help="rows at a time (%(default)s)")
    tune.add_argument("--max-length", type=int, help="tokens of a row at most (what the model declares)")
    tune.add_argument("--seed", type=int, default=0, help="of the order of the rows, dropout and a new head")
    tune.add_argument(
        "--file",
        type=place,
        metavar="FILE",
        help="keep the state in FILE until all is saved, and go on from it",
    )


def add_export(export: Any) -> None:
    """What is written, for whom."""
    export.add_argument(
        "model", type=model, metavar="DIR", help="a checkpoint, dense or compressed, or its name on the Hub"
    )
    export.add_argument("-o", "--output", type=place, required=True, metavar="OUT", help="the new directory")
    export.add_argument("--to", choices=TARGETS, required=True, help="what will load it; see below")
    dtypes = [dtype for target in TARGETS.values() for dtype in target.dtypes]
    export.add_argument("--dtype", choices=dtypes, help=f"what --to onnx computes in ({dtypes[0]})")
    export.add_argument(
        "--scores", type=place, metavar="FILE", help="JSON, {name: number}, measured of this model, for its README.md"
    )


def place(text: str) -> Path:
    """A path, whose ~ is the user's home, which a shell leaves in --option=~/file."""
    try:
        return path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {error}") from None


def model(text: str) -> str:
    """A directory, or a name on the Hub."""
    return str(place(text)) if text.startswith("~") else text


def cell(text: str) -> tuple[int, int]:
    """BATCHxLENGTH as two numbers."""
    batch, by, length = text.partition("x")
    if not (by and batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted texts by tokens, such as 8x128")
    return int(batch), int(length)


def add_bench(bench: Any) -> None:
    """What is timed, where, and on what."""
    cells = " ".join(f"{batch}x{length}" for batch, length in CELLS)
    bench.add_argument("models", type=model, metavar="DIR", nargs="+", help="checkpoints; speeds are beside the first")
    bench.add_argument(
        "--cell",
        type=cell,
        action="append",
        metavar="BxL",
        help=f"texts by tokens of each; several times for several ({cells})",
    )
    bench.add_argument("--engine", choices=ENGINES, action="append", help="several times for several (all installed)")
    bench.add_argument("--threads", type=int, help="how many to run at once (as many as there are cores)")
    bench.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is timed (%(default)s)")
    bench.add_argument("--json", type=place, metavar="FILE", help="keep all figures in FILE")
    bench.add_argument("--figure", type=place, metavar="FILE", help="draw them into FILE, .png, .svg or .pdf")
