"""The mutation run: which faults it plants, and that it plants them."""

from __future__ import annotations

import ast

from mutation import SOURCES, Spot, mutants, spots, variants

CODE = """
def clipped(x: "Tensor" = 1.5) -> "Tensor":
    "Not 0, not 1."
    if x.any() and x < 0:
        raise ValueError(f"`x` is {-x}" + "!")
    return -x.clamp(0)
"""


def test_faults_of_a_function_by_hand() -> None:
    found = [
        (ast.unparse(spot.node), ast.unparse(new), spot.lines)
        for spot in spots(Spot(ast.parse(CODE)))
        for new in variants(spot.node)
    ]
    assert sorted(found) == sorted(
        [
            ("1.5", "2.5", (2, 6)),  # a default: whoever calls the function
            ("x.any() and x < 0", "x.any() or x < 0", (4, 4)),
            ("x.any", "x.all", (4, 4)),
            ("x < 0", "x <= 0", (4, 4)),
            ("0", "1", (4, 4)),
            ("-x.clamp(0)", "x.clamp(0)", (6, 6)),
            ("x.clamp(0)", "x", (6, 6)),
            ("0", "1", (6, 6)),
        ]
    )


def test_every_mutant_has_a_name_of_its_own() -> None:
    keys = [mutant["key"] for source in SOURCES[:5] for mutant in mutants(source)]
    assert len(set(keys)) == len(keys) > 900
