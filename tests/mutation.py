"""Mutation run: plant small faults in the sources, one at a time, and see whether the fast tests notice.

    python tests/mutation.py --whole 'sampling.py|jump' --sample 1000       (resumable; state in .mutation/, summary in
                                                                             tests/mutation.json)

First the fast tests run once with a tracer: which test runs which line, and how long it takes. Then mutants are tried: all of
those whose name matches `--whole` (a file, a function, a line), then a random sample of the others. Each is tried in a fork of
a process that has collected all tests, with those that run the mutated lines, until one fails or takes far too long; the quick
ones come first, and those that have killed mutants near by.

Not mutated: annotations, docstrings, imports, and what stands in `raise`, `assert`, f-strings and logged texts.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
STATE, SUMMARY = ROOT / ".mutation", ROOT / "tests" / "mutation.json"
NOW = STATE / "now.txt"  # the test that runs
SOURCES = [
    *(f"src/discrete_schedulers/{name}.py" for name in "processes sampling exact scud information".split()),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "src/discrete_schedulers/schedulers").glob("[!_]*.py")),
    *(f"training/{name}.py" for name in "objectives marginal temperatures jump_steps".split()),
]
TESTS = """adaptive bad_input correctors diffusers_contract exact_simulation information informed interop jump_steps learn2pd
    learned likelihood marginal mixture numbers objectives order_search ordered_grid orders processes rdlm remasking
    sampling schedulers scud speed spread temperatures theta uniform""".split()


def both_ways(pairs: str) -> dict[str, str]:
    """Each word of a pair to the other."""
    return dict(turned for pair in pairs.split(", ") for turned in (pair.split(), pair.split()[::-1]))


SWAPS = both_ways("Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, Add Sub, Mult Div, BitAnd BitOr, And Or")
SWAPS |= {"FloorDiv": "Div", "Mod": "Div", "Pow": "Mult"}
NAMES = both_ways("any all, min max, amin amax, argmin argmax, cummin cummax, minimum maximum, floor ceil, tril triu")
OPTIONS = ["-m", "not slow", *"-q -p no:cacheprovider -p no:xdist --hypothesis-seed=0 --no-header --tb=line".split()]
LOG = os.dup(1)  # pytest takes 1 away
FAULT = 99
FAILED: dict[str, list[int]] = {"failed": []}  # in place of the lines of a test
MEMORY = 12 * 2**30  # of address space, for a mutant that runs away
DROPPED = {"double", "abs", "round", "flip"}  # x.double(...) becomes x
DROPPED |= {"clamp", "clamp_", "nan_to_num", "nan_to_num_", "masked_fill", "masked_fill_"}
PLAIN = (bool, int, float, str, tuple, list, dict, set, frozenset)
SILENT = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)


def copy_of(node: Any, **changes: Any) -> Any:
    """The node with some fields changed."""
    fields = {name: getattr(node, name) for name in node._fields if hasattr(node, name)}
    return ast.copy_location(type(node)(**(fields | changes)), node)


def swapped(operator: ast.AST) -> list[Any]:
    """The operators that are put in the place of this one."""
    name = type(operator).__name__
    return [getattr(ast, SWAPS[name])()] if name in SWAPS else []


def variants(node: Any) -> Iterator[ast.AST]:
    """Every fault that can be planted at this node."""
    if isinstance(node, ast.Compare):
        yield from (copy_of(node, ops=[op, *node.ops[1:]]) for op in swapped(node.ops[0]))
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        yield from (copy_of(node, op=op) for op in swapped(node.op))
    if isinstance(node, ast.UnaryOp) and ast.unparse(node) != "-1":  # as an axis of two it is 1 too; it becomes -2
        yield node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield copy_of(node, value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield copy_of(node, value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield copy_of(node, value="XX" + node.value)
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield copy_of(node, id=NAMES[node.id])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield copy_of(node, attr=NAMES[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
        yield node.func.value
    if isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield copy_of(node, test=ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.copy_location(ast.Pass(), node)


class Spot(NamedTuple):
    """A node that can be mutated: the lines whose tests run it, whether these run when a function is called, not when the
    module is imported, the name of its function, and the code of its line."""

    node: Any
    lines: tuple[int, int] = (1, 10**6)
    is_inside: bool = False
    function: str = "module"
    code: str = ""


def spots(spot: Spot) -> Iterator[Spot]:
    """This node and all below it that can be mutated."""
    node = spot.node
    if isinstance(node, SILENT) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return
    if isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in ("warnings", "logger"):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        spot = spot._replace(function=f"{spot.function}.{node.name}".removeprefix("module."))
    if isinstance(node, ast.stmt):
        spot = spot._replace(code=next(text for text in ast.unparse(node).split("\n") if not text.startswith("@")))
    yield spot
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            lines, is_inside = spot.lines, spot.is_inside or (isinstance(node, ast.FunctionDef) and field == "body")
            is_head = isinstance(child, ast.expr) and isinstance(node, ast.stmt) and hasattr(node, "body")  # of an if
            if isinstance(node, ast.FunctionDef) and field == "args":  # defaults matter where the function is called
                lines = (node.lineno, node.end_lineno or 0)
            elif is_inside and (is_head or isinstance(child, ast.stmt)):
                last = child.test if isinstance(child, ast.If) else child
                lines = (child.lineno, last.end_lineno or 0)
            yield from spots(spot._replace(node=child, lines=lines, is_inside=is_inside))


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source: str) -> list[dict[str, Any]]:
    """All mutants of a file."""
    found: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    tree = ast.parse((ROOT / source).read_text())
    for spot in spots(Spot(tree)):
        for new in variants(spot.node):
            before, after = (ast.unparse(n).split("\n")[0] for n in (spot.node, new))
            key = f"{source} {spot.function} | {spot.code} | {before} -> {after}"
            seen[key] += 1
            key += f" #{seen[key]}" if seen[key] > 1 else ""
            found.append(
                {"key": key, "source": source, "tree": tree, "new": new, "line": spot.node.lineno, **spot._asdict()}
            )
    return found


class Original(NamedTuple):
    """What a source became when it was imported."""

    module: ModuleType
    functions: list[FunctionType]


def originals() -> dict[str, Original]:
    """Of each path of a source that was imported."""
    of = functools.cache(lambda name: os.path.realpath(name or ""))
    made = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType):
            made[of(thing.__code__.co_filename)].append(thing)
    modules = {of(getattr(module, "__file__", None)): module for module in reversed(list(sys.modules.values()))}
    paths = [str(ROOT / source) for source in SOURCES]
    return {path: Original(modules[path], made[path]) for path in paths if path in modules}


def plant(mutant: dict[str, Any], original: Original) -> None:
    """Runs the mutated module beside the one that is there, and gives that one's functions, plain class attributes and plain
    globals, also where others have imported them, their new values. The mutant's tree changes too."""
    path, module = str(ROOT / mutant["source"]), original.module
    tree = Replace(mutant["node"], mutant["new"]).visit(mutant["tree"])
    code, fresh = compile(ast.fix_missing_locations(tree), path, "exec"), ModuleType(module.__name__)
    fresh.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    exec(code, fresh.__dict__)
    place = {}
    for new in [thing for thing in gc.get_objects() if isinstance(thing, FunctionType)]:  # what was there is frozen
        if new.__code__.co_filename == path:
            place[new.__code__.co_qualname, new.__code__.co_firstlineno] = new
    for old in original.functions:
        new = place.get((old.__code__.co_qualname, old.__code__.co_firstlineno))
        if new is not None:
            old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
    for kept in [thing for thing in vars(module).values() if hasattr(thing, "cache_clear")]:
        kept.cache_clear()  # of what was there
    for name, value in list(vars(fresh).items()):
        old = getattr(module, name, None)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for attribute, content in list(vars(value).items()):
                if isinstance(content, PLAIN) and not attribute.startswith("__"):
                    setattr(old, attribute, content)
        elif isinstance(value, PLAIN) and not name.startswith("__") and value != old:
            for other in list(sys.modules.values()):
                if getattr(other, "__dict__", {}).get(name) is old:
                    setattr(other, name, value)


class Recorder:
    """Pytest plugin: the lines of our sources that each test runs, and its seconds. Tests that fail are left out."""

    def __init__(self) -> None:
        self.of = functools.cache(lambda name: {str(ROOT / s): s for s in SOURCES}.get(os.path.realpath(name)))
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.tests: dict[str, dict[str, list[int]]] = {}
        self.seconds: Counter[str] = Counter()

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        source = self.of(frame.f_code.co_filename)
        if source is None:
            return None
        lines = self.lines[source]

        def local(frame: Any, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return local

        return local(frame, event, argument)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.lines.clear()
        failed = item.session.testsfailed
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            is_good = item.session.testsfailed == failed
            self.tests[item.nodeid] = {s: sorted(lines) for s, lines in self.lines.items()} if is_good else FAILED

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration


def run_tests(items: list[Any], before: Callable[[Any], None] = lambda item: None, maxfail: float = math.inf) -> int:
    """Runs collected tests, and returns how many failed."""
    for item, following in zip(items, [*items[1:], None], strict=False):
        before(item)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed >= maxfail:
            break
    return items[0].session.testsfailed if items else 0


class Forks:
    """Pytest plugin: instead of all tests runs some of them for each mutant, in a fork of its own."""

    def __init__(self, todo: list[dict[str, Any]], cap: float) -> None:
        self.todo, self.cap = todo, cap

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert not session.testsfailed, "tests could not be collected"  # and every mutant would be taken for killed
        record = self.record(session)
        items = {item.nodeid: item for item in session.items}
        imported = originals()
        gc.freeze()

        def start(test: pytest.Item) -> None:
            NOW.write_text(test.nodeid)
            limit_time(record["seconds"][test.nodeid])

        for mutant in self.todo:
            names = choose(mutant, record, read(STATE / "results.json"), self.cap)
            chosen = [items[name] for name in names if name in items]

            def run(mutant: dict[str, Any] = mutant, chosen: list[Any] = chosen) -> int:
                try:
                    plant(mutant, imported[str(ROOT / mutant["source"])])
                except Exception:  # the module cannot be imported
                    return 1
                return run_tests(chosen, start, 1)

            NOW.write_text("")
            settle(mutant, fork(run, 30 + sum(record["seconds"][item.nodeid] for item in chosen)))
        return True

    def record(self, session: pytest.Session) -> dict[str, Any]:
        """Seconds of each test, and for each file and line the tests that run it. Tests are recorded that have not been since
        they or the sources changed."""
        digest = hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES)).hexdigest()
        record = read(STATE / "record.json")
        if record.get("sources") != digest:
            record = {"sources": digest, "tests": {}, "seconds": {}, "code": {}}

        def run() -> int:
            recorder = Recorder()
            session.config.pluginmanager.register(recorder)
            run_tests(unknown)
            for part in ("tests", "seconds"):
                record[part] |= getattr(recorder, part)
            record["code"] |= code
            write(STATE / "record.json", record)
            return 0

        source_of = functools.cache(inspect.getsource)  # once for all cases of a test
        code = {item.nodeid: source_of(item.function) for item in session.items}
        code = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in code.items()}
        if unknown := [item for item in session.items if record["code"].get(item.nodeid) != code[item.nodeid]]:
            assert fork(run) == 0, "the tests could not be recorded"
            record = read(STATE / "record.json")
        lines: dict[str, dict[int, list[str]]] = {source: defaultdict(list) for source in SOURCES}
        for name, of_test in record["tests"].items():
            for source, numbers in of_test.items() if of_test != FAILED else ():
                for number in numbers:
                    lines[source][number].append(name)
        idle = {name for name, of_test in record["tests"].items() if not of_test}
        return {"seconds": record["seconds"], "lines": lines, "idle": idle}


def choose(mutant: dict[str, Any], record: dict[str, Any], results: dict[str, Any], cap: float) -> list[str]:
    """Tests that run the mutant's lines, up to `cap` seconds: the quick ones first. The k-th case of a test function counts as
    k times as slow, those in a file named like the module as four times as quick, those that killed mutants of the same
    module, or even function, as quicker by each. After the first seconds tests run by file, whose fixtures they share. What is
    in no function is near to many tests: it gets four times as many seconds."""
    (first, last), seconds, of_line = mutant["lines"], record["seconds"], record["lines"][mutant["source"]]
    names = {name for line, some in of_line.items() if first <= line <= last for name in some}
    stem = Path(mutant["source"]).stem.removeprefix("scheduling_")
    if not mutant["is_inside"]:  # and those that look at signatures, class attributes and constants
        names |= {name for name in seconds if name in record["idle"] or stem in name.split("::")[0]}
        word = re.compile(rf"\b{mutant['code'].split(' ')[0].rstrip(':')}\b")
        text = enumerate((ROOT / mutant["source"]).read_text().splitlines(), 1)
        names |= {name for number, line in text if word.search(line) for name in of_line.get(number, ())}
    kills: Counter[str] = Counter()
    function = mutant["key"].split(" | ")[0]
    for key, result in results.items():
        kills[result["test"]] += (key.split(" ")[0] == mutant["source"]) + 4 * (key.split(" | ")[0] == function)
    cases: Counter[str] = Counter()
    ranked = []
    for name in sorted(names, key=lambda name: (seconds[name] / (1 + kills[name]), name)):
        file, case = name.split("::")[0], name.split("[")[0]
        cases[case] += 1
        cost = cases[case] * seconds[name] / (1 + kills[name]) / (4 if stem in file else 1)
        ranked.append((cost, file, name))
    cap *= 1 if mutant["is_inside"] else 4
    chosen: list[tuple[str, str]] = []
    total = 0.0
    for _, file, name in sorted(ranked):
        if total + seconds[name] <= cap:
            total += seconds[name]
            chosen.append(("" if total < cap / 5 else file, name))
    return [name for _, name in sorted(chosen, key=lambda item: item[0])]


def limit_time(seconds: float) -> None:
    """Ends this process after a few times so many more seconds of CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + 5 + 2 * seconds), -1))


def fork(run: Callable[[], int], seconds: float = 1e6) -> int:
    """What it returns in a child process with so many seconds of CPU time, or minus the signal that ended it; FAULT if it
    raises."""
    child = os.fork()
    if child == 0:
        limit_time(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = FAULT
        try:
            code = int(run())
        except BaseException:
            os.write(LOG, traceback.format_exc().encode())
        finally:
            os._exit(code)
    end = time.monotonic() + 30 * seconds
    while not (status := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:  # waits for something
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1])


def settle(mutant: dict[str, Any], code: int) -> None:
    """Writes down what became of a mutant, by the exit code of its tests, and which ended it. `closed` is one that survived
    until a test was written."""
    results = read(STATE / "results.json")
    result = {0: "survived", FAULT: "fault"}.get(code, "timeout" if code < 0 else "killed")
    if results.get(mutant["key"], {}).get("result") in ("survived", "closed") and result in ("killed", "timeout"):
        result = "closed"
    results[mutant["key"]] = {"result": result, "test": NOW.read_text() if code != 0 else ""}
    write(STATE / "results.json", results)
    os.write(LOG, f"{time.strftime('%H:%M:%S')} {result:8} {mutant['line']:4} {mutant['key']}\n".encode())


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: Any) -> None:
    """As JSON, whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").rename(path)


def is_in(whole: str, mutant: dict[str, Any]) -> bool:
    """Whether a mutant is one of those that are tried wholly."""
    return re.search(whole, mutant["key"].split(" -> ")[0]) is not None


def shuffled(some: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Mutants in a random order that goes by their names: a larger sample begins with the smaller one, and where the sources
    change, the mutants that stay are drawn as before."""
    return sorted(some, key=lambda mutant: hashlib.sha256(f"{seed} {mutant['key']}".encode()).digest())


def interval(number: int, total: int) -> str:
    """Wilson's 95 % interval of a share, in per cent."""
    share, z = number / max(total, 1), 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return f"{100 * share:.1f} % ({100 * (middle - half):.1f} to {100 * (middle + half):.1f})"


def summarise(everything: list[dict[str, Any]], results: dict[str, Any], whole: str, sample: set[str]) -> None:
    """Counts of those that were to be tried wholly, of the sample of the others, of what else was tried earlier, and of each
    file, and the survivors, each with the reason that stands in the summary already."""
    old = read(SUMMARY).get("survivors", {})
    parts = {part: Counter(mutants=0, tried=0, survived=0) for part in ("whole", "sample", "others")}
    counts = {source: Counter(mutants=0, tried=0, survived=0) for source in SOURCES}
    for mutant in everything:
        result = results.get(mutant["key"], {}).get("result")
        part = "whole" if is_in(whole, mutant) else "sample" if mutant["key"] in sample else "others"
        for count in (counts[mutant["source"]], parts[part]):
            count.update(["mutants", *(["tried", result] if result else [])])
    survivors = {key: old.get(key, "") for key, result in results.items() if result["result"] == "survived"}
    total, drawn = sum(counts.values(), Counter()), parts["sample"]
    files = {s: f"{c['tried']} of {c['mutants']} tried, {c['survived']} survived" for s, c in counts.items()}
    shares: dict[str, str] = {}
    if drawn["tried"]:
        shares["sample survived at first"] = interval(drawn["survived"] + drawn["closed"], drawn["tried"])
        shares["sample survives now"] = interval(drawn["survived"], drawn["tried"])
    found = {"total": total, "pattern of the whole": whole, **parts, **shares, "files": files}
    write(SUMMARY, found | {"survivors": {m["key"]: survivors[m["key"]] for m in everything if m["key"] in survivors}})
    print(f"{dict(total)}: {total['survived'] / max(total['tried'], 1):.1%} survive")
    print(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", default="^$", help="of these try all: a pattern for file, function and line")
    parser.add_argument("--sample", type=int, default=400, help="of the others try so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cap", type=float, default=15.0, help="seconds of tests for one mutant")
    parser.add_argument("--again", action="store_true", help="try survivors again that have no reason in the summary")
    arguments = parser.parse_args()
    STATE.mkdir(exist_ok=True)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork
    everything = [mutant for source in SOURCES for mutant in mutants(source)]
    ordered = shuffled(everything, arguments.seed)
    whole = [mutant for mutant in ordered if is_in(arguments.whole, mutant)]
    sample = [mutant for mutant in ordered if not is_in(arguments.whole, mutant)][: arguments.sample]
    results = read(STATE / "results.json")
    known = {key for key, reason in read(SUMMARY).get("survivors", {}).items() if reason}
    survived = {key for key, result in results.items() if result["result"] == "survived"}
    again = survived - known if arguments.again else set()
    todo = [mutant for mutant in [*whole, *sample] if mutant["key"] not in results or mutant["key"] in again]
    if todo:
        files = [f"tests/test_{name}.py" for name in TESTS]
        pytest.main([*OPTIONS, *files], plugins=[Forks(todo, arguments.cap)])
    summarise(everything, read(STATE / "results.json"), arguments.whole, {mutant["key"] for mutant in sample})


if __name__ == "__main__":
    main()
