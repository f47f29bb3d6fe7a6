"""bert-adapter: compress a BERT checkpoint from the command line."""

import argparse
import sys

from bert_adapter.arguments import parser


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
    """The demo, into a directory."""
    from bert_adapter.demo import demo

    demo(options.output, options.budget, say)


PASSED_ON = (  # options of the command that are those of `compress`, under the same names
    *("rank", "budget", "of", "uniform", "multiple_of", "include", "exclude"),
    *("signal", "gradients", "shrink", "method", "seed", "file"),
)


def run_compress(options: argparse.Namespace) -> None:
    """A checkpoint that is compressed, with a report beside it."""
    from bert_adapter.checkpoint import load, save
    from bert_adapter.checkpoint.directory import check_target
    from bert_adapter.compressing import compress
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
    batches = text_batches(model, texts, options.batch_size, options.max_length)
    small, report = compress(model, batches, **{name: getattr(options, name) for name in PASSED_ON})
    save(small, options.output)
    page = options.report or options.output.with_name(options.output.name + ".html")
    write_page(page, f"{options.model}, compressed", report)
    say(f"{as_text(kernel_table(report))}\n\n{summary(report)}\nsaved {options.output}; report: {page}")


def run_finetune(options: argparse.Namespace) -> None:
    """A checkpoint that is trained, with its scores if there are rows for that."""
    from bert_adapter.checkpoint import load, save
    from bert_adapter.checkpoint.directory import check_target
    from bert_adapter.evaluate import score
    from bert_adapter.families import label_count
    from bert_adapter.heads import with_head
    from bert_adapter.text import labelled_batches, read_rows
    from bert_adapter.training import finetune

    check_target(options.output)
    check_sizes(options)
    rows = read_rows(options.data)
    dev = read_rows(options.dev) if options.dev else None
    model = load(options.model)
    if label_count(model.module) is None:
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
        file=options.file,
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
    """The scores in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def say(text: str) -> None:
    """Progress that a pipe or a log can hold too."""
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
