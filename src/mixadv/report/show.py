"""A run on the console, whatever task it was."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mixadv.redaction import printable
from mixadv.report.attacks import attacks_table, flags_of
from mixadv.report.cells import print_whole
from mixadv.report.comparison import comparison_sentence, member_sentence
from mixadv.report.files import Run
from mixadv.report.game_tables import print_game
from mixadv.report.names import number
from mixadv.report.solve import solution_sentences, solution_table
from mixadv.report.tables import progress, results_table


def show_run(run: Run, console: Console) -> None:
    """Print a run: its table, the comparison with its baseline, what is wrong, where the files are."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    if run.get("task") == "solve":
        print_whole(solution_table(run), console)
        for sentence in solution_sentences(run):
            say(sentence)
    elif run.get("task") == "game":
        print_game(run, console)
    elif run.results is not None:
        print_whole(results_table(run), console)
        for sentence in (comparison_sentence(run), member_sentence(run)):
            if sentence:
                say(sentence)
        if run.attacks:
            print_whole(attacks_table(run), console)
    if run.state == "failed":
        say(f"Failed: {run.reason}", "red")
    elif run.state == "running":
        say(f"Running{progress(run)}: {run.reason}.", "cyan")
    elif run.state == "unfinished":
        say(f"Unfinished{progress(run)}: the same command resumes it.", "yellow")
    base = run.baseline
    if base is not None and base.state != "done":
        reason = base.reason or "the same command resumes it"
        say(f"The baseline is {'unfinished' if base.state == 'unfinished' else 'failed'}: {reason}", "yellow")
    for flag in flags_of(run):
        said = ": ".join(part for part in (flag.name, flag.evidence) if part)
        say(f"Flag: {said}{' ' + flag.remedy if flag.remedy else ''}", "yellow")
    for note in (*run.notes, *(base.notes if base is not None else ())):
        say(f"Damaged: {note}", "red")
    seconds = run.get("seconds")
    if isinstance(seconds, dict):
        parts = [f"{name} {value:.0f} s" for name, v in seconds.items() if (value := number(v)) is not None]
        say("Time: " + ", ".join(parts))
    names = [
        *("results.json", "metrics.csv", "records.npz", "game.npz", "report.html"),
        *("curves.png", "solve.png", "game.png"),
        *("attacks.png", "eps.png", "steps.png", "examples.png", "mixture", "checkpoints"),
    ]
    here = [name for name in names if (run.path / name).exists()]
    # Unwrapped, so that the path can be copied.
    console.print(Text(f"Files: {printable(run.path)}"), soft_wrap=True)
    if here:
        say(f"       {', '.join(here)}")
