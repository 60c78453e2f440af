"""The papers of the attacks."""

from __future__ import annotations

from collections.abc import Iterable

# First part of an attack's name -> (citation, arXiv number).
_PAPERS = {
    "apgd": (
        "APGD: F. Croce, M. Hein. Reliable evaluation of adversarial robustness with an ensemble of diverse "
        "parameter-free attacks. ICML 2020,",
        "2003.01690",
    ),
    "square": (
        "Square: M. Andriushchenko, F. Croce, N. Flammarion, M. Hein. Square Attack: a query-efficient black-box "
        "adversarial attack via random search. ECCV 2020,",
        "1912.00049",
    ),
    "arc": (
        "ARC: H. Dbouk, N. R. Shanbhag. Adversarial Vulnerability of Randomized Ensembles. ICML 2022,",
        "2206.06737",
    ),
    "climber": (
        "Lattice Climber: L. Gnecco-Heredia, B. Negrevergne, Y. Chevaleyre. Adversarial attacks for mixtures of "
        "classifiers. 2023,",
        "2307.10788",
    ),
    "pgd": (
        "PGD: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu. Towards Deep Learning Models Resistant to "
        "Adversarial Attacks. ICLR 2018,",
        "1706.06083",
    ),
}


def papers_of(attacks: Iterable[str]) -> list[tuple[str, str]]:
    """(citation, arXiv number) of each algorithm that the attacks' names begin with, without repetition."""
    used = {name.partition("-")[0] for name in attacks}
    return [paper for algorithm, paper in _PAPERS.items() if algorithm in used]
