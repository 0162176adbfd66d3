"""Take every validity check out of the package, one at a time, and say which test notices (`make mutate`).

A check is a condition under which a region is refused or not seen (each part of one: an operand of `or` where it
refuses, of `and` where it recognises), a call of a `check` function, or one of the things that such a function goes
through. A first run of the tests notes in which of them each condition had the value that taking it out would change:
only those can notice, so only those run again. What is known is kept in build/mutate_checks.json: a run goes on there.
Exits with 1 if no test notices some check.
"""

import argparse
import ast
import builtins
import contextlib
import hashlib
import importlib
import importlib.machinery
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import conftest  # the interpreter is chosen before Triton is imported

ROOT = Path(conftest.__file__).parents[1]
RECORD = ROOT / "build" / "mutate_checks.json"
MODULES = (
    "validity",
    "rewrite",
    "linear",
    *(f"patterns.{file.stem}" for file in sorted(ROOT.glob("patterns/[!_]*.py"))),
)
TESTS = (
    *(str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("tests/patterns/test_*.py"))),
    "tests/test_validity.py",
    "tests/test_rewrite.py",
    "tests/test_near_misses.py",
)
ONLY_SAY = {"near_miss", "_miss", "_seen_as_heads", "_near_misses", "_work", "_is_parameter", "_site", "_new_node"}
"""Functions that describe, and decide about no region."""
LIMIT = 300
"""Seconds of computing for the tests of one check: a test that never ends has noticed."""


@dataclass(frozen=True)
class Check:
    key: str
    line: int
    node: ast.AST
    instead: bool | None
    """The constant in place of a condition. None: a statement, or an item of a loop, that is left out."""
    loop: tuple[int, int] = (0, 0)
    """First and last line of the loop whose item it is: whoever sees a check in there may notice."""


def parts(test: ast.expr, want: bool) -> Iterator[tuple[ast.expr, bool]]:
    """The smallest parts of `test` that make it `want` more often when they are constant."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            yield from parts(inner, not want)
        case ast.BoolOp(op=op, values=values) if isinstance(op, ast.And) is want:
            for part in values:
                yield from parts(part, want)
        case ast.Call(func=ast.Name(id=("all" | "any") as name), args=[ast.GeneratorExp(elt=elt)]) if (
            name == "all"
        ) is want:
            yield from parts(elt, want)
        case ast.IfExp(body=one, orelse=other):
            yield from parts(one, want)
            yield from parts(other, want)
        case _:
            yield test, want


def is_nothing(found: ast.expr | None) -> bool:
    """Whether a function that returns `found` says that it has recognised nothing."""
    match found:
        case None | ast.Constant(value=None | False) | ast.Tuple(elts=[_, ast.Tuple(elts=[])]):
            return True
    return False


def conditions(node: ast.AST) -> Iterator[tuple[ast.AST, bool | None]]:
    """What can be taken out of the statement or comprehension `node` itself, and what stands there then."""
    match node:
        case ast.If(test=test, body=[*_, ast.Raise() | ast.Continue()]):
            yield from parts(test, False)
        case ast.If(test=test, body=[*_, ast.Return(value=found)]):
            yield from parts(test, not is_nothing(found))
        case ast.Return(value=ast.IfExp(test=test, body=body, orelse=other)) if is_nothing(body) or is_nothing(other):
            yield from parts(test, is_nothing(other))
        case ast.Return(value=ast.BoolOp() | ast.Compare() | ast.UnaryOp(op=ast.Not()) as test):
            yield from parts(test, True)
            yield from parts(test, False)
        case ast.Return(value=ast.Call(func=ast.Name(id="all" | "any")) as test):
            yield from parts(test, True)
            yield from parts(test, False)
        case ast.Assign(value=ast.BoolOp(op=ast.And()) | ast.Call(func=ast.Name(id="all" | "any")) as test):
            yield from parts(test, True)
        case ast.comprehension(ifs=[test]):
            yield from parts(test, True)
            yield from parts(test, False)
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))) if "check" in name:
            yield node, None
        case ast.ExceptHandler(body=[ast.Raise() as statement]):
            yield statement, None


def checks(tree: ast.Module, module: str) -> list[Check]:
    """The checks of a module, in a fixed order."""
    found: dict[str, Check] = {}

    def add(function: str, node: Any, instead: bool | None, loop: tuple[int, int] = (0, 0)) -> None:
        text = f"{module}:{function}: {ast.unparse(node)}" + ("" if instead is None else f" -> {instead}")
        twins = sum(key.split(" #")[0] == text for key in found)
        key = f"{text} #{twins + 1}" if twins else text
        found[key] = Check(key, node.lineno, node, instead, loop)

    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name in ONLY_SAY:
            continue
        for node in ast.walk(function):
            for target, instead in conditions(node):
                add(function.name, target, instead)
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and "check" in function.name:
                for item in node.iter.elts:
                    add(function.name, item, None, (node.lineno, node.end_lineno or 0))
    return list(found.values())


class Edit(ast.NodeTransformer):
    """`change(check, node)` in place of the node of each check."""

    def __init__(self, checks: list[Check], change: Callable[[Check, Any], Any]) -> None:
        self.checks, self.change = checks, change

    def visit(self, node: ast.AST) -> Any:
        new: Any = self.generic_visit(node)
        for check in self.checks:
            if check.node is node:
                new = self.change(check, new)
        return new and ast.copy_location(new, node)


def without(check: Check, node: Any) -> Any:
    """What stands in the place of `check` when it is taken out."""
    if check.loop != (0, 0):
        return None
    if check.instead is None:
        return ast.Pass()
    names = [inner for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]
    constant = ast.Constant(check.instead)
    # What the condition binds is used later.
    return ast.Subscript(ast.Tuple([node, constant], ast.Load()), ast.Constant(1), ast.Load()) if names else constant


def noted(check: Check, node: Any) -> Any:
    """`check` as it was, which tells `_note` when taking it out would make a difference."""
    if check.loop != (0, 0):
        return node
    key = ast.Constant(check.key)
    if check.instead is not None:
        return ast.Call(ast.Name("_note", ast.Load()), [key, ast.Constant(check.instead), node], [])
    call = ast.Call(ast.Name("_note", ast.Load()), [key, ast.Constant(True), ast.Constant(False)], [])
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Expr(call), ast.Raise(None, None)])
    return ast.Try([node], [handler], [], [])


def source(module: str) -> Path:
    return ROOT / "fusepass" / f"{module.replace('.', '/')}.py"


class Edited:
    """Import `fusepass.<module>` with its checks, or the one named `key`, changed. The file stays as it is."""

    def __init__(self, modules: tuple[str, ...], change: Callable[[Check, Any], Any], key: str | None = None) -> None:
        self.modules, self.change, self.key = modules, change, key

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        module = name.removeprefix("fusepass.")
        spec = importlib.machinery.PathFinder.find_spec(name, path) if module in self.modules else None
        if spec is None or spec.loader is None:
            return None
        tree = ast.parse(source(module).read_text())
        chosen = [check for check in checks(tree, module) if self.key in (None, check.key)]
        code = compile(ast.fix_missing_locations(Edit(chosen, self.change).visit(tree)), str(source(module)), "exec")
        spec.loader.get_code = lambda _: code  # type: ignore[attr-defined]
        return spec


class Listener:
    """A pytest plugin: how long each test took, which failed, and what it saw of the checks."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.current: set[str] = set()

    def note(self, key: str, instead: bool, value: Any) -> Any:
        if bool(value) != instead:
            self.current.add(key)
        return value

    def pytest_runtest_logstart(self) -> None:
        self.current = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "failed": False, "saw": []})
        test["seconds"] += report.duration
        test["failed"] |= report.failed
        test["saw"] = sorted(self.current)


def too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {LIMIT} s")


def run(edited: Edited, tests: list[str]) -> dict[str, dict[str, Any]]:
    """Run `tests` in this process, which has not imported fusepass yet. With one check changed, until a test fails."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT if edited.key else 0)
    listener = Listener()
    sys.meta_path.insert(0, edited)  # type: ignore[arg-type]
    vars(builtins)["_note"] = listener.note
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        options = ["-x"] if edited.key else []
        code = pytest.main([*options, "-q", "-m", "not gpu and not slow", *tests], plugins=[listener])
    if code not in (0, 1):  # a module that cannot be imported any more
        listener.tests["import"] = {"seconds": 0.0, "failed": True, "saw": []}
    return listener.tests


def isolated(edited: Edited, tests: list[str]) -> dict[str, dict[str, Any]]:
    """`run` in a fork of this process, which has imported what is slow to import."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(run, (edited, tests))


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def what_tests_see(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every test that passes, how long it takes and the checks that it sees; each file of tests is run if it is new."""
    sources = [*map(source, MODULES), source("graph"), ROOT / "tests/models.py", ROOT / "tests/patterns/toys.py"]
    tests: dict[str, dict[str, Any]] = {}
    for file in TESTS:
        version = digest(*sources, ROOT / file)
        if record["files"].get(file, {}).get("digest") != version:
            print(f"what the tests of {file} see", flush=True)
            record["files"][file] = {"digest": version, "tests": isolated(Edited(MODULES, noted), [file])}
            RECORD.write_text(json.dumps(record, indent=1))
        tests |= {name: test for name, test in record["files"][file]["tests"].items() if not test["failed"]}
    return tests


def who_notices(
    check: Check, others: list[Check], tests: dict[str, dict[str, Any]], known: dict[str, Any]
) -> str | None:
    """The test that fails without `check`; None if none does. `known`: what an earlier run found, or an empty dict.
    What it found of a source and tests that have changed since is not known any more."""
    inside = {other.key for other in others if check.loop[0] <= other.line <= check.loop[1]} | {check.key}
    candidates = [name for name, test in tests.items() if not inside.isdisjoint(test["saw"])]
    module = check.key.split(":")[0]
    files = sorted({ROOT / name.split("::")[0] for name in candidates})
    version = digest(source(module), *files) + hashlib.sha256(json.dumps(sorted(candidates)).encode()).hexdigest()[:16]
    if known.get("version") == version:
        return known["test"]
    # The one that noticed the last time, then the quickest.
    candidates.sort(key=lambda name: (name != known.get("test"), tests[name]["seconds"]))
    results = isolated(Edited((module,), without, check.key), candidates) if candidates else {}
    noticed = next((name for name, test in results.items() if test["failed"]), None)
    known.update(version=version, test=noticed, candidates=len(candidates))
    return noticed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only the checks whose name contains one of these")
    words = parser.parse_args().words
    for slow in ("torch._dynamo", "torch._inductor.compile_fx", "transformers", "triton"):
        importlib.import_module(slow)
    RECORD.parent.mkdir(exist_ok=True)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"files": {}, "checks": {}}
    tests = what_tests_see(record)
    found = {module: checks(ast.parse(source(module).read_text()), module) for module in MODULES}
    unnoticed = 0
    for module, of_module in found.items():
        for check in of_module:
            if words and not any(word in check.key for word in words):
                continue
            known = record["checks"].setdefault(check.key, {})
            noticed = who_notices(check, of_module, tests, known)
            RECORD.write_text(json.dumps(record, indent=1))
            unnoticed += noticed is None
            by = noticed or f"NO TEST ({known['candidates']} see it)"
            print(f"{module}:{check.line}  {check.key.split(':', 1)[1].strip()}\n    {by}", flush=True)
    total = sum(map(len, found.values()))
    print(f"{total} checks; of those asked for, no test notices {unnoticed}")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
