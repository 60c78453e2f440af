"""Print a run of any task."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mixadv.redaction import printable
from mixadv.report.attacks import attacks_table
from mixadv.report.ceiling import ceiling_sentences, ceiling_table
from mixadv.report.cells import on_console, print_narrow, print_whole
from mixadv.report.classes import classes_table
from mixadv.report.compare import baseline_sentence, counterpart_sentences
from mixadv.report.files import Run
from mixadv.report.game_tables import print_game
from mixadv.report.growth import growth_sentence
from mixadv.report.solve import solution_sentences, solution_table
from mixadv.report.tables import run_table
from mixadv.wording import counted

# The answers of task=predict, a line for each image.
PREDICTIONS = "predictions.csv"
_SHOWN_ANSWERS = 10
_FILES = (
    PREDICTIONS,
    *("results.json", "metrics.csv", "records.npz", "images.csv", "game.npz", "report.html", "curves.png"),
    *("solve.png", "game.png", "attacks.png", "eps.png", "steps.png", "examples.png", "regions.png"),
    *("ceiling.npz", "ceiling.csv", "ceiling.png", "mixture", "checkpoints"),
)


def show_run(run: Run, console: Console) -> None:
    """Print a run: tables, comparisons, state, flags, damage, times and files."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    if run.results.task == "solve":
        print_narrow(solution_table(run), console)
        for sentence in solution_sentences(run):
            say(sentence)
    elif run.results.task == "game":
        print_game(run, console)
    elif run.results.task == "ceiling":
        print_whole(on_console(ceiling_table(run)), console)
    elif run.task == "predict":
        say(_answers_sentence(run))
    elif run.has_results:
        print_whole(run_table(run), console)
        for sentence in (baseline_sentence(run), *counterpart_sentences(run), growth_sentence(run)):
            if sentence:
                say(sentence)
        if run.results.attacks:
            print_narrow(attacks_table(run), console)
        if run.results.classes:
            print_whole(on_console(classes_table(run)), console)
    for sentence in ceiling_sentences(run):
        say(sentence)
    if run.state == "failed":
        say(f"Failed: {run.reason}", "red")
    elif run.state == "running":
        say(f"Running{_progress(run)}: {run.reason}.", "cyan")
    elif run.state == "unfinished":
        say(f"Unfinished{_progress(run)}: the same command resumes it.", "yellow")
    base = run.baseline
    if base is not None and base.state != "done":
        reason = base.reason or "the same command resumes it"
        say(f"The baseline is {'unfinished' if base.state == 'unfinished' else 'failed'}: {reason}", "yellow")
    for flag in run.results.flags or ():
        what = ": ".join(part for part in (flag.name, flag.evidence) if part)
        say(f"Flag: {what}{' ' + flag.remedy if flag.remedy else ''}", "yellow")
    for note in (*run.notes, *(base.notes if base is not None else ())):
        say(f"Damaged: {note}", "red")
    if run.results.seconds:
        say("Time: " + ", ".join(f"{name} {value:.0f} s" for name, value in run.results.seconds.items()))
    here = [name for name in _FILES if (run.path / name).exists()]
    # Not wrapped, so that the path can be copied.
    console.print(Text(f"Files: {printable(run.path)}"), soft_wrap=True)
    if here:
        say(f"       {', '.join(here)}")


def _answers_sentence(run: Run) -> str:
    """How often task=predict gave each answer, the most frequent ones."""
    given = list(run.results.answers.items())
    shown = [f"{name or 'no answer'}: {counted(count, 'image')}" for name, count in given[:_SHOWN_ANSWERS]]
    more = f", and {counted(len(given) - len(shown), 'other answer')}" if len(given) > len(shown) else ""
    images = counted(run.num_examples or 0, "image")
    return f"{images} labelled, a member drawn for each. Answers: {', '.join(shown)}{more}."


def _progress(run: Run) -> str:
    """The progress of an unfinished run, from its history."""
    epochs, robust = run.last("epoch"), run.last("val/robust_accuracy")
    if epochs is None:
        return ""
    accuracy = "" if robust is None else f", validation robust accuracy {100 * robust:.1f} %"
    return f" after {epochs:.3g} epochs per model{accuracy}"
