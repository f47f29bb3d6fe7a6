"""bert-adapter: compress a BERT checkpoint from the command line."""

import argparse
import sys
from pathlib import Path

from bert_adapter.ranks import UNITS
from bert_adapter.signals import SIGNALS
from wlra.methods import METHODS
from wlra.methods.closed import STARTS

EPILOG = """examples:
  bert-adapter demo
      compress all-MiniLM-L6-v2 to half its encoder and compare methods on held-out sentences
  bert-adapter compress bert-base-uncased --budget 0.5 --text my-sentences.txt -o bert-half
      keep half of the encoder kernels' parameters, where your sentences make them matter
  bert-adapter compress bert-base-uncased --budget 0.7 --of bytes --multiple-of 8 --text my-sentences.txt -o bert-70
      keep 70 % of the whole checkpoint's bytes, at ranks that are multiples of 8
  bert-adapter compress ./my-model --rank 96 --text my-sentences.txt -o small --include 'intermediate|output/dense'
      rank 96 in the feed-forward and output kernels only
  bert-adapter finetune bert-half --data train.tsv --dev dev.tsv --teacher bert-base-uncased-on-the-task -o bert-tuned
      train it on labelled rows, drawn to what a dense model says about them

then, in Python:
  import bert_adapter
  model = bert_adapter.load("bert-half")
  batch = bert_adapter.tokenizer(model)(["A sentence.", "Another one."])
  embeddings = bert_adapter.apply(model.module, model.params, **batch)
"""


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    formatter = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser("bert-adapter", description=__doc__, epilog=EPILOG, formatter_class=formatter)
    commands = root.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="compress a real model that comes along, and compare methods")
    demo.add_argument("-o", "--output", type=Path, default=Path("bert-adapter-demo"), help="directory (%(default)s)")
    demo.add_argument("--budget", type=float, default=0.5, help="share of the kernels' parameters kept (%(default)s)")

    compress = commands.add_parser("compress", help="compress a checkpoint of your own", formatter_class=formatter)
    compress.add_argument("model", metavar="DIR", help="a Hugging Face directory of a BERT, or its name on the Hub")
    size = compress.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the rank of every selected kernel")
    size.add_argument("--budget", type=float, help="the share to keep, in (0, 1], of what --of names")
    compress.add_argument(
        "--of",
        choices=UNITS,
        default="kernels",
        help="what the budget is a share of: the parameters of the selected kernels (%(default)s), of the whole model, "
        "its bytes, or the operations of its dense layers for a token",
    )
    compress.add_argument(
        "--uniform", action="store_true", help="keep the same share of every kernel, not more where it matters more"
    )
    compress.add_argument("--multiple-of", type=int, default=1, metavar="N", help="ranks are multiples of N")
    compress.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="UTF-8, a sentence a line; hundreds will do"
    )
    compress.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the new checkpoint")
    compress.add_argument("--report", type=Path, metavar="PAGE", help="an HTML page with figures (default OUT.html)")
    compress.add_argument(
        "--importance",
        choices=[name for name in SIGNALS if name != "fisher"],
        default="shampoo",
        help="what an error is weighted by (%(default)s)",
    )
    compress.add_argument(
        "--shrink",
        type=float,
        metavar="SHARE",
        help="how far weights are drawn towards simpler ones, in [0, 1] (as far as they are noise)",
    )
    compress.add_argument(
        "--method", choices=(*METHODS, *STARTS, "kronecker"), help="of the solver (the one that fits the importance)"
    )
    compress.add_argument(
        "--measured", type=Path, metavar="FILE", help="keep what was measured in FILE, and go on from it"
    )
    compress.add_argument("--include", default=r"^(bert/)?encoder/", help="regular expression of kernels (%(default)s)")
    compress.add_argument("--exclude", help="regular expression of kernels that stay dense")
    compress.add_argument("--batch-size", type=int, default=16, help="sentences at a time (%(default)s)")
    compress.add_argument("--max-length", type=int, default=128, help="tokens per sentence at most (%(default)s)")
    compress.add_argument("--seed", type=int, default=0, help="of the random directions in place of labels")

    tune = commands.add_parser("finetune", help="train a checkpoint on labelled rows", formatter_class=formatter)
    tune.add_argument("model", metavar="DIR", help="a directory, dense or compressed, or a name on the Hub")
    rows = "tab-separated, with a heading: one or two columns of text and 'label', a class 0, 1, ... or a value"
    tune.add_argument("--data", type=Path, required=True, metavar="FILE", help=f"the rows to train on: {rows}")
    tune.add_argument("--dev", type=Path, metavar="FILE", help="other rows, to score the model on before and after")
    tune.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the new checkpoint")
    tune.add_argument("--teacher", metavar="DIR", help="a dense model of the same task, whose outputs are followed too")
    tune.add_argument("--distil", type=float, default=0.5, help="the teacher's share of the loss (%(default)s)")
    tune.add_argument("--epochs", type=int, default=3, help="passes over the rows (%(default)s)")
    tune.add_argument("--learning-rate", type=float, default=5e-5, help="the highest, of AdamW (%(default)s)")
    tune.add_argument("--batch-size", type=int, default=32, help="rows at a time (%(default)s)")
    tune.add_argument("--max-length", type=int, default=128, help="tokens of a row at most (%(default)s)")
    tune.add_argument("--seed", type=int, default=0, help="of the order of the rows, dropout and a new head")
    tune.add_argument(
        "--state", type=Path, metavar="FILE", help="keep the state in FILE once a minute, and go on from it"
    )
    return root


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 if it succeeded, 2 if something it was given cannot be used."""
    options = parser().parse_args(argv)
    try:
        {"demo": run_demo, "compress": run_compress, "finetune": run_finetune}[options.command](options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"bert-adapter: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def run_demo(options: argparse.Namespace) -> None:
    from bert_adapter.demo import demo

    demo(options.output, options.budget, say)


def run_compress(options: argparse.Namespace) -> None:
    from bert_adapter.checkpoint import load, save
    from bert_adapter.checkpoint.directory import check_target
    from bert_adapter.compression import compress
    from bert_adapter.page import write_page
    from bert_adapter.report import as_text, kernel_table, summary
    from bert_adapter.text import text_batches

    check_target(options.output)
    texts = [line for line in options.text.read_text("utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{options.text} holds no text; wanted a sentence a line")
    check_sizes(options)
    model = load(options.model)
    say(f"{options.model}: compressing on {len(texts)} texts")
    small, report = compress(
        model,
        text_batches(model, texts, options.batch_size, options.max_length),
        rank=options.rank,
        budget=options.budget,
        of=options.of,
        uniform=options.uniform,
        multiple_of=options.multiple_of,
        method=options.method,
        importance=options.importance,
        shrink=options.shrink,
        file=options.measured,
        include=options.include,
        exclude=options.exclude,
        seed=options.seed,
    )
    save(small, options.output)
    page = options.report or options.output.with_name(options.output.name + ".html")
    write_page(page, f"{options.model}, compressed", report, {})
    say(f"{as_text(kernel_table(report))}\n\n{summary(report)}\nsaved {options.output}; report: {page}")


def run_finetune(options: argparse.Namespace) -> None:
    from bert_adapter.checkpoint import load, save
    from bert_adapter.checkpoint.directory import check_target
    from bert_adapter.evaluate import score
    from bert_adapter.families.bert import SequenceClassifier
    from bert_adapter.heads import with_head
    from bert_adapter.text import labelled_batches, read_rows
    from bert_adapter.training import finetune

    check_target(options.output)
    check_sizes(options)
    rows = read_rows(options.data)
    dev = read_rows(options.dev) if options.dev else None
    model = load(options.model)
    if not isinstance(model.module, SequenceClassifier):
        labels = int(rows.labels.max()) + 1 if rows.labels.dtype.kind == "i" else 1
        say(f"{options.model} embeds: it gets a new head of {labels} output{'s' * (labels > 1)}")
        model = with_head(model, labels, seed=options.seed)
    elif dev:
        say(f"before: {figures(score(model, dev, max_length=options.max_length))}")
    teacher = load(options.teacher) if options.teacher else None
    trained, losses = finetune(
        model,
        labelled_batches(model, rows, options.batch_size, options.max_length),
        teacher=teacher,
        distil=options.distil,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        seed=options.seed,
        file=options.state,
    )
    save(trained, options.output)
    say(f"mean loss of each epoch: {', '.join(f'{loss:.4f}' for loss in losses)}")
    if dev:
        say(f"after: {figures(score(trained, dev, max_length=options.max_length))}")
    say(f"saved {options.output}")


def check_sizes(options: argparse.Namespace) -> None:
    """One ValueError for batches and lengths that cannot be."""
    if options.batch_size < 1 or options.max_length < 1:
        raise ValueError(f"wanted batches and lengths of at least 1; got {options.batch_size}, {options.max_length}")


def figures(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def say(text: str) -> None:
    """Progress that a pipe or a log can hold too."""
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
