"""The mutation run: which faults it plants, and that it plants them."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import mutation
import pytest
from mutation import SOURCES, Spot, choose, interval, mutants, settle, spots, summarise, variants

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


def mutant_of(function: str) -> dict:
    key = f"{SOURCES[0]} {function} | x < 0 | x < 0 -> x <= 0"
    return {"key": key, "source": SOURCES[0], "lines": (3, 4), "is_inside": True, "line": 3}


def test_quick_tests_and_those_that_killed_near_by_come_first() -> None:
    slow, near, quick, other = (f"tests/test_{name}.py::test_it" for name in ("b", "a", "c", "d"))
    seconds = {slow: 6.0, near: 6.1, quick: 0.5, other: 0.1, "tests/test_a.py::test_long": 20.0}
    of_line = {3: [slow, near, "tests/test_a.py::test_long"], 4: [quick, near], 5: [other]}
    record = {"seconds": seconds, "lines": {SOURCES[0]: of_line}, "idle": set()}
    assert choose(mutant_of("f"), record, {}, cap=15.0) == [quick, near, slow]
    killed = {mutant_of("f")["key"]: {"result": "killed", "test": slow}}
    assert choose(mutant_of("f"), record, killed, cap=40.0)[0] == quick  # .5 s; one that took 6 counts as 6 / (1 + 5)
    killed[mutant_of("g")["key"] + " #2"] = {"result": "killed", "test": slow}
    killed |= {f"{mutant_of('f')['key']} #{number}": {"result": "killed", "test": slow} for number in range(2, 4)}
    assert choose(mutant_of("f"), record, killed, cap=40.0)[0] == slow  # 6 / (1 + 3 * 5 + 1)
    assert choose(mutant_of("h"), record, killed, cap=40.0)[0] == quick  # 6 / (1 + 4)


def test_a_survivor_that_a_new_test_kills_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "STATE", tmp_path)
    monkeypatch.setattr(mutation, "NOW", tmp_path / "now.txt")
    monkeypatch.setattr(mutation, "SUMMARY", tmp_path / "summary.json")
    (tmp_path / "now.txt").write_text("tests/test_a.py::test_it")
    of = {name: mutant_of(name) for name in "abcde"}
    for name, codes in {"a": [1], "b": [0], "c": [0, 1], "d": [0, 1, -9]}.items():
        for code in codes:
            settle(of[name], code)
    results = mutation.read(tmp_path / "results.json")
    assert [result["result"] for result in results.values()] == ["killed", "survived", "closed", "closed"]
    assert [result["test"] for result in results.values()] == [
        "tests/test_a.py::test_it",
        "",
        *2 * ["tests/test_a.py::test_it"],
    ]
    summarise(list(of.values()), results, "py a ", {of[name]["key"] for name in "bc"})
    summary = mutation.read(tmp_path / "summary.json")
    assert Counter(summary["total"]) == Counter(mutants=5, tried=4, killed=1, survived=1, closed=2)
    assert [summary[part]["tried"] for part in ("whole", "sample", "others")] == [1, 2, 1]
    assert summary["sample survived at first"].startswith("100.0 %")
    assert list(summary["survivors"]) == [of["b"]["key"]]


def test_interval_of_a_share() -> None:
    assert interval(5, 100) == "5.0 % (2.2 to 11.2)"  # (.05 + .0192 -+ 1.96 sqrt(.000475 + .000096)) / 1.0384
