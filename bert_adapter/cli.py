"""bert-adapter: compress a BERT checkpoint from the command line."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_adapter.arguments import CELL, LATENCY, parser
from bert_adapter.programs import folder, keep_programs


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 if it succeeded, 2 if something it was given cannot be used."""
    options = parser().parse_args(argv)
    keep_programs()
    try:
        COMMANDS[options.command](options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"bert-adapter: error: {in_a_line(error, options)}", file=sys.stderr)  # noqa: T201
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = in_a_line(error, options) or "there is none"
        print(f"bert-adapter: error: out of memory, shorter or fewer texts at once take less: {said}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"bert-adapter: stopped{state_in(options)}", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def state_in(options: argparse.Namespace) -> str:
    """What the next run goes on from, for a command that keeps its state."""
    if getattr(options, "saved", False):
        return f": {options.output} is saved"
    if not hasattr(options, "file"):
        return ""
    if options.file is None:
        return ": --file FILE keeps what was done"
    there = options.file.exists()
    return f": the same command goes on from {options.file}" if there else f": {options.file} is not there yet"


POSITIONAL = {"command", "model", "models"}  # what is given without an option's name
RENAMED = {"dense": "teacher", "cells": "cell", "engines": "engine"}  # arguments whose options have another name


def in_a_line(error: Exception, options: argparse.Namespace) -> str:
    """What the error says, in a line, with the option's name where it begins with that of an argument."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    found = re.match(r"(\w+)(?=[:,]? )", text)
    word = RENAMED.get(found[1], found[1]) if found else ""
    is_option = word in vars(options).keys() - POSITIONAL
    return f"--{word.replace('_', '-')}{text[found.end() :]}" if found and is_option else text


def run_demo(options: argparse.Namespace) -> None:
    """The demo, into a directory."""
    from bert_adapter.checkpoint.directory import check_target
    from bert_adapter.demo import demo
    from bert_adapter.files import check_parent, check_writable
    from bert_adapter.ranks import budget_of

    budget_of(options.budget)
    check_target(options.output / "checkpoint")
    check_parent(options.output / "checkpoint")
    for name in ("report.html", "report.json"):
        check_writable(options.output / name)
    demo(options.output, options.budget, say)


# Options of the command that are those of `compress`, under the same names.
SIZE = ("rank", "budget", "of", "flops", "uniform", "multiple_of")
PASSED_ON = (
    *SIZE,
    "pairs",
    "include",
    "exclude",
    "embeddings",
    "signal",
    "gradients",
    "shrink",
    "method",
    "seed",
    "file",
    "dtype",
)


def run_compress(options: argparse.Namespace) -> None:
    """A checkpoint that is compressed, with a report beside it."""
    from bert_adapter.calibration import calibration_batches
    from bert_adapter.checkpoint import load, save
    from bert_adapter.compressing import beside, compress
    from bert_adapter.page import check_drawing, write_page
    from bert_adapter.places import check_places
    from bert_adapter.report import as_text, kernel_table, summary
    from bert_adapter.text import text_batches

    latency = check_options(options)
    check_drawing()
    output = options.output.resolve()
    page = options.report or output.with_name(f"{output.name}.html")
    files = {"--text": options.text, "--trim": options.trim, "--heal": options.heal, "--correct": options.correct}
    healing = {"--file's state of healing": beside(options.file)} if options.heal else {}
    check_places({"DIR": options.model}, files, {"--report": page, "--file": options.file, **healing}, output)
    model = load(options.model)
    read, before = texts_for(model), weights_in(Path(options.model)) or bytes_of(model)
    texts, more, others = (read(file) if file else [] for file in (options.text, options.heal, options.correct))
    if options.trim:
        model = trimmed(model, [*texts, *read(options.trim), *more, *others])
    say(f"{options.model}: compressing on {len(texts)} texts")
    batches = calibration_batches(model, texts, options.batch_size, options.max_length, seed=options.seed)
    how: dict[str, Any] = {name: getattr(options, name) for name in PASSED_ON}
    heal = text_batches(model, more, max_length=options.max_length) if options.heal else None
    how["correct"] = text_batches(model, others, max_length=options.max_length) if options.correct else None
    how |= {"of": measured_latency(model, options)} if latency else {}
    with of_option("--heal"):
        small, report = compress(model, batches, heal=heal, **how)
    with or_kept("what was measured", options):
        save(small, output, dtype=options.dtype)
    if options.heal and (state := beside(options.file)):
        state.unlink()
    write_page(page, f"{options.model}, compressed", report)
    say(f"{as_text(kernel_table(report))}\n\n{summary(report)}")
    say(f"saved {options.output}: {weights_in(output) / 1e6:.1f} MB of weights, {before / 1e6:.1f} MB before")
    say(f"report: {page}")
    say(f"next: bert_adapter.load({str(options.output)!r}), or bert-adapter heal, finetune, bench or export")


def texts_for(model: Any) -> Callable[[Path], Any]:
    """The function that reads a file of texts for a model; for an embedder those of a pair apart, as it reads them."""
    from bert_adapter.families import output_of
    from bert_adapter.families.sentence import MODULES
    from bert_adapter.outputs import OUTPUTS

    output = output_of(model.module)
    read = OUTPUTS[output].texts
    if output != "embedding" or MODULES not in model.files:
        return read

    def apart(file: Path) -> list[str]:
        return [text for row in read(file) for text in ([row] if isinstance(row, str) else row)]

    return apart


def bytes_of(model: Any) -> int:
    """What the model's parameters take in memory."""
    from bert_adapter.checkpoint.names import by_path

    return sum(leaf.nbytes for leaf in by_path(model.params).values())


def weights_in(directory: Path) -> int:
    """The bytes of a directory's files of weights, and of what follows its encoder."""
    from bert_adapter.checkpoint.directory import STAGES

    found = [*directory.glob("*.safetensors"), *directory.glob(f"{STAGES}*.safetensors")]
    return sum(file.stat().st_size for file in found)


def check_options(options: argparse.Namespace) -> bool:
    """Whether the budget is of time, once it is known that the options can be."""
    from bert_adapter.compressing import check_predicted, check_signal, check_size
    from bert_adapter.kernels import check_pattern

    check_numbers(options)
    latency = check_latency(options)
    size: dict[str, Any] = {name: getattr(options, name) for name in (*SIZE, "shrink")}
    if latency:
        size["of"] = "kernels"  # whose times are not known yet
    wanted = check_size(**size)
    check_dtype(options)
    by = check_signal(options.signal, options.gradients, method=options.method)
    check_predicted({"pairs": options.pairs, "correct": options.correct is not None}, wanted, *by)
    check_pattern("include", options.include)
    check_pattern("exclude", options.exclude)
    return latency


def check_latency(options: argparse.Namespace) -> bool:
    """Whether the budget is of time, once it is known that the options fit."""
    if options.cell is not None and options.of != LATENCY:
        raise ValueError(f"--cell: got it with --of {options.of}, wanted --of {LATENCY}")
    if options.of == LATENCY and (options.rank is not None or options.embeddings):
        raise ValueError(f"--of {LATENCY}: wanted --budget, and no --embeddings: to look a word up takes no time")
    return options.of == LATENCY


def measured_latency(model: Any, options: argparse.Namespace) -> Any:
    """How long the model takes, dense and with factors; times are kept beside compiled programs."""
    from bert_adapter.families import family_of
    from bert_adapter.kernels import select_kernels
    from bert_adapter.latency import measure_latency

    batch, length = options.cell or CELL
    if length > (longest := family_of(model.config).longest(model.module.config)):
        raise ValueError(f"--cell: got {batch}x{length}, wanted at most {longest} tokens, the positions of the model")
    file, kernels = file_of_times(), select_kernels(model, options.include, options.exclude)
    kept = f"kept in {file}" if file else f"not kept, for nothing can be written in {folder()}"
    say(f"timing the model for {batch} x {length} tokens; times are {kept}")
    found = measure_latency(model, batch, length, kernels=kernels, pairs=options.pairs, file=file)
    say(f"the dense model takes {1e3 * found.seconds:.1f} ms")
    return found


def file_of_times() -> Path | None:
    """Where times are kept, unless nothing can be; a ValueError if something else is there."""
    from bert_adapter.files import check_writable
    from bert_adapter.latency import UNKNOWN, entries

    file = folder() / "latency.json"
    try:
        check_writable(file)
    except ValueError:
        return None
    try:
        entries(file)
    except ValueError as error:
        said = str(error).removeprefix("file: ").removesuffix(UNKNOWN)
        raise ValueError(f"{said}: it is where --of {LATENCY} keeps times, delete it") from None
    return file


def trimmed(model: Any, texts: Any) -> Any:
    """The model without the tokens that these texts do not use."""
    from bert_adapter.trimming import trim

    small, kept = trim(model, texts)
    say(f"{len(kept):,} of {model.module.config.vocab_size:,} tokens are kept")
    return small


def check_dtype(options: argparse.Namespace) -> None:
    """A ValueError if it is chosen twice."""
    if options.dtype is not None and options.of == "bytes":
        raise ValueError("--dtype: got one with --of bytes, which chooses it for each matrix: wanted either")


def run_heal(options: argparse.Namespace) -> None:
    """A compressed checkpoint that is trained to a dense one's outputs."""
    from bert_adapter.checkpoint import load, save
    from bert_adapter.healing import heal
    from bert_adapter.places import check_apart, check_places
    from bert_adapter.text import text_batches

    check_numbers(options)
    files = {"--text": options.text, "--heldout": options.heldout}
    check_apart(files)
    check_places({"DIR": options.model, "--teacher": options.teacher}, files, {"--file": options.file}, options.output)
    small, dense = load(options.model), load(options.teacher)
    read = texts_for(small)
    texts, others = read(options.text), read(options.heldout) if options.heldout else None
    check_tokens(small, dense, texts, options.max_length, of="--text")
    say(f"{options.model}: healing on {len(texts)} texts")
    batches = text_batches(small, texts, max_length=options.max_length)
    heldout = text_batches(small, others, max_length=options.max_length) if others else None
    how = {name: getattr(options, name) for name in ("epochs", "learning_rate", "batch_size", "seed", "file")}
    with of_option("--text"):
        healed, gained = heal(small, dense, batches, heldout=heldout, **how)
    with or_kept("the state of the training", options):
        save(healed, options.output)
    if options.file:
        options.file.unlink()
    say(f"{gained}\nsaved {options.output}")


def run_finetune(options: argparse.Namespace) -> None:
    """A checkpoint that is trained, with its scores if there are rows for that."""
    from bert_adapter.checkpoint import load, save
    from bert_adapter.evaluate import check_scorable, score
    from bert_adapter.families import label_count, output_of
    from bert_adapter.heads import drawn
    from bert_adapter.labels import head_wanted, with_head_for
    from bert_adapter.outputs import OUTPUTS
    from bert_adapter.places import check_apart, check_places
    from bert_adapter.text import labelled_batches
    from bert_adapter.training import finetune

    check_numbers(options)
    if options.distil is not None and options.teacher is None:
        raise ValueError("--distil: got no --teacher, whose share of the loss it is")
    files = {"--data": options.data, "--dev": options.dev}
    check_apart(files)
    check_places({"DIR": options.model, "--teacher": options.teacher}, files, {"--file": options.file}, options.output)
    loaded = load(options.model)
    head = head_wanted(loaded, options.head)
    rows, dev = OUTPUTS[head].read(options.data), OUTPUTS[head].read(options.dev) if options.dev else None
    teacher = load(options.teacher) if options.teacher else None
    model = with_head_for(loaded, rows.labels, head=head, seed=options.seed, like=teacher)
    if model is not loaded:
        was, count = OUTPUTS[output_of(loaded.module)].about, label_count(model.module) or 0
        new = f"a new head of {count} output{'s' * (count > 1)}: {OUTPUTS[head].about}"
        say(f"{options.model}, {was}, gets {new}; drawn at random: {', '.join(drawn(loaded, model))}")
    if dev:
        check_scorable(model, dev, options.max_length)
    check_tokens(model, teacher, rows.texts, options.max_length, of="--data")
    batches = labelled_batches(model, rows, options.batch_size, options.max_length)
    if dev and model is loaded and not (options.file and options.file.exists()):  # nor where a run goes on
        say(f"before: {figures(score(model, dev, max_length=options.max_length))}")
    how = {name: getattr(options, name) for name in ("epochs", "learning_rate", "seed", "file")}
    trained, losses = finetune(model, batches, teacher=teacher, distil=options.distil, **how)
    with or_kept("the state of the training", options):
        save(trained, options.output)
    if options.file:
        options.file.unlink()
    say(f"mean loss of each epoch: {', '.join(f'{loss:.4f}' for loss in losses)}\nsaved {options.output}")
    if dev:
        say(f"after: {figures(score(trained, dev, max_length=options.max_length))}")


def run_export(options: argparse.Namespace) -> None:
    """A checkpoint as another library loads it."""
    from bert_adapter.exporting import export
    from bert_adapter.exporting.model_card import read_scores
    from bert_adapter.places import check_places

    check_places({"DIR": options.model}, {"--scores": options.scores}, {}, options.output)
    scores = read_scores(options.scores) if options.scores else None
    export(options.model, options.output, to=options.to, dtype=options.dtype, scores=scores)
    say(f"saved {options.output}: its README.md says how to load it")


def run_bench(options: argparse.Namespace) -> None:
    """Checkpoints timed beside each other."""
    from bert_adapter.engines import use_threads
    from bert_adapter.files import write_text
    from bert_adapter.places import check_places
    from bert_adapter.report import as_text
    from bert_adapter.speed import CELLS, bench
    from bert_adapter.speed_report import as_json, check_figure, slow_kernels, table, write_figure

    check_numbers(options)
    models = {f"DIR {number}": model for number, model in enumerate(options.models, 1)}
    check_places(models, {}, {"--json": options.json, "--figure": options.figure})
    if options.figure:
        check_figure(options.figure)
    if options.threads is not None:
        use_threads(options.threads)
    found = bench(options.models, cells=options.cell or CELLS, engines=options.engine, rounds=options.rounds)
    say(f"{as_text(table(found))}\n\nmedians on {found.threads} threads, and speed beside {options.models[0]}")
    if found.kernels:
        say(slow_kernels(found))
    if options.json:
        write_text(options.json, as_json(found))
    if options.figure:
        write_figure(found, options.figure)


COMMANDS = {
    "demo": run_demo,
    "compress": run_compress,
    "heal": run_heal,
    "finetune": run_finetune,
    "export": run_export,
    "bench": run_bench,
}
NUMBERS = {  # the least and the most that options may be
    "rank": (1, 10**6),
    "multiple_of": (1, 10**6),
    "batch_size": (1, 10**6),
    "max_length": (1, 10**6),
    "seed": (0, 2**32 - 1),
    "epochs": (1, 10**6),
    "learning_rate": (0, 1),
    "distil": (0, 1),
    "threads": (1, 10**4),
    "rounds": (1, 10**4),
}


def check_numbers(options: argparse.Namespace) -> None:
    """A ValueError for a number that cannot be."""
    for name, (least, most) in NUMBERS.items():
        value = getattr(options, name, None)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, wanted {least} to {most}")


def check_tokens(model: Any, teacher: Any, texts: Any, length: int | None, *, of: str) -> None:
    """A ValueError if a teacher cuts texts into other tokens than the model, whose tokens it is given."""
    import numpy as np

    from bert_adapter.text import reader_of, text_batches

    if teacher is None:
        return
    both = (model, teacher)
    shorter = min(reader_of(one, length).limit for one in both)  # a teacher may declare another length
    cut = [[batch["input_ids"] for batch in text_batches(one, texts, max_length=shorter)] for one in both]
    if not all(map(np.array_equal, *cut)):
        raise ValueError(f"--teacher: got a model that cuts the texts of {of} into other tokens, wanted the same ones")


@contextmanager
def or_kept(what: str, options: argparse.Namespace) -> Iterator[None]:
    """An error says whether what was worked out before is kept; without one, the output is saved."""
    try:
        yield
    except (OSError, ValueError) as error:
        file = options.file
        kept = f"is kept in {file}, and the same command goes on from it" if file else "is lost: --file FILE keeps it"
        raise OSError(f"{error}; {what} {kept}") from error
    options.saved = True


@contextmanager
def of_option(name: str) -> Iterator[None]:
    """Too few texts to heal on are said to be those of the option."""
    from bert_adapter.healing import TooFewTexts

    try:
        yield
    except TooFewTexts as error:
        told = re.sub("^batches: ", f"{name}: ", str(error))
        raise ValueError(told) from error


def figures(scores: dict[str, float]) -> str:
    """The scores in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def say(text: str) -> None:
    """Progress that a pipe or a log can hold too; work goes on where nobody reads it, or not all of its letters."""
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(coding, "backslashreplace").decode(coding), flush=True)  # noqa: T201
    except BrokenPipeError:
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue]  # which `print` takes for nowhere


if __name__ == "__main__":
    sys.exit(main())
