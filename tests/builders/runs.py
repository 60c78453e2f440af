"""The files of finished runs, as tests read them: not by the readers of the package."""

import csv
import json


def read_results(path):
    """results.json of the run in `path`."""
    return json.loads((path / "results.json").read_text())


def read_metrics(path):
    """The rows of metrics.csv of the run in `path`: a number for each cell that is not empty."""
    with (path / "metrics.csv").open(newline="") as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
