"""What a set of generated molecules is worth, judged by RDKit: valid, unique, new, diverse.

Molecules are SMILES strings. One molecule has many of them, so everything is counted on RDKit's canonical string, and a number
belongs to one version of RDKit. The four must be read together: a sampler that writes benzene every time is valid.

Each share has the one before it as its base, as in MOSES: of n strings v are valid, these are u different molecules, and w of
them are not in the reference: validity = v / n, uniqueness = u / v, novelty = w / u.

Source: Polykovskiy et al. 2020, Molecular Sets (MOSES), arXiv 1811.12823, section "Metrics". Needs the extra `molecules`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

NO_RDKIT = "molecules are judged by RDKit, which is not installed: pip install 'discrete_schedulers[molecules]'"


def _rdkit() -> Any:
    """RDKit's module of molecules."""
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ImportError(NO_RDKIT) from error
    return Chem


@lru_cache(maxsize=2**20)  # a training set is passed again and again: half a minute for 300,000 molecules, once
def canonical_smiles(smiles: str) -> str | None:
    """RDKit's one string for this molecule, or `None` where the string is not a molecule: open rings and brackets, impossible
    valences, aromatic rings without a Kekulé structure, or no atom at all.

    Raises:
        ImportError: RDKit is not installed.
    """
    chem = _rdkit()
    from rdkit import rdBase

    with rdBase.BlockLogs():  # it would print a line for each string that fails
        molecule = chem.MolFromSmiles(smiles)
    return chem.MolToSmiles(molecule) or None if molecule is not None else None


def _canonical(smiles: Iterable[str], name: str) -> list[str | None]:
    if isinstance(smiles, str):
        raise ValueError(f"{name} must be a list of SMILES strings, got one str: put it into a list.")
    strings = list(smiles)
    if not strings:
        raise ValueError(f"{name} must hold at least one SMILES string, got none.")
    return [canonical_smiles(string) for string in strings]


def _molecules(smiles: Iterable[str], name: str) -> list[str]:
    """The canonical strings of those that are valid."""
    return [string for string in _canonical(smiles, name) if string is not None]


def validity(smiles: Sequence[str]) -> float:
    """Share of the strings that are molecules, in [0, 1].

    Raises:
        ValueError: `smiles` is one str or empty.
        ImportError: RDKit is not installed.
    """
    return len(_molecules(smiles, "smiles")) / len(smiles)


def uniqueness(smiles: Sequence[str]) -> float:
    """Different molecules as a share of the valid strings, in (0, 1]; NaN where none is valid.

    It falls as the set grows: compare sets of one size only.

    Raises:
        ValueError: `smiles` is one str or empty.
        ImportError: RDKit is not installed.
    """
    valid = _molecules(smiles, "smiles")
    return len(set(valid)) / len(valid) if valid else math.nan


def novelty(smiles: Sequence[str], reference: Iterable[str]) -> float:
    """Share of the different valid molecules that are not in the reference, in [0, 1]; NaN where none is valid.

    Args:
        smiles: what a model wrote.
        reference: what it was trained on, as SMILES in any writing.

    Raises:
        ValueError: an argument is one str or empty.
        ImportError: RDKit is not installed.
    """
    found, known = set(_molecules(smiles, "smiles")), set(_molecules(reference, "reference"))
    return len(found - known) / len(found) if found else math.nan


def internal_diversity(smiles: Sequence[str]) -> float:
    """One minus the mean similarity of two valid strings, MOSES' IntDiv_1; NaN where none is valid.

        IntDiv = 1 - 1/v^2 sum_ij T(i, j),    T = |a and b| / |a or b|  of Morgan fingerprints (radius 2, 1024 bits)

    i = j counts, as it does there: one molecule alone, or one again and again, has diversity 0.

    Raises:
        ValueError: `smiles` is one str or empty.
        ImportError: RDKit is not installed.
    """
    valid = _molecules(smiles, "smiles")
    if not valid:
        return math.nan
    from rdkit import DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    prints = [generator.GetFingerprint(_rdkit().MolFromSmiles(string)) for string in valid]
    similar = math.fsum(math.fsum(DataStructs.BulkTanimotoSimilarity(one, prints)) for one in prints)
    return 1 - similar / len(prints) ** 2


def molecule_metrics(smiles: Sequence[str], reference: Iterable[str]) -> dict[str, float]:
    """`validity`, `uniqueness`, `novelty` and `internal_diversity` of what a model wrote.

    Args:
        smiles: the strings, valid or not.
        reference: the molecules that the model was trained on.

    Raises:
        ValueError: an argument is one str or empty.
        ImportError: RDKit is not installed.
    """
    return {
        "validity": validity(smiles),
        "uniqueness": uniqueness(smiles),
        "novelty": novelty(smiles, reference),
        "internal_diversity": internal_diversity(smiles),
    }
