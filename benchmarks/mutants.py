"""How many small faults in a module its tests catch: mutants of cosmic-ray, a seeded draw of them, each in a fork.

    make mutants MODULE=hf_distill/losses/divergences.py

One process imports the heavy packages once; each mutant is a child whose import of the module gives the mutated source,
and which runs the module's own in-process tests until the first failure. What differs in annotations and docstrings
alone is no mutant. A survivor is printed as a diff: a fault that no test sees, or a change that changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# modules whose tests do not lie under their own name
TESTS = {
    "hf_distill/losses/tile.py": ["tests/losses/test_tile.py", "tests/losses/test_divergences.py"],
    # from quick to slow: a run ends with the first failure
    "hf_distill/losses/engines.py": [
        *(f"tests/losses/test_{name}.py" for name in ("fused", "mixture", "sparse", "engine_choice", "engines"))
    ],
    "hf_distill/losses/source.py": ["tests/losses/test_fused.py", "tests/losses/test_mixture.py"],
    "hf_distill/losses/functional.py": ["tests/losses/test_divergences.py"],
    "hf_distill/losses/targets.py": ["tests/losses/test_divergences.py", "tests/losses/test_fused.py"],
    "hf_distill/losses/metrics.py": ["tests/losses/test_divergences.py", "tests/losses/test_fused.py"],
    "hf_distill/losses/precision.py": ["tests/losses/test_fused.py", "tests/losses/test_features.py"],
    "hf_distill/signals.py": ["tests/losses/test_fused.py", "tests/losses/test_mixture.py", "tests/test_heads.py"],
    "hf_distill/training/mixin.py": ["tests/training/test_scaling.py", "tests/training/test_bad_input.py"],
    "hf_distill/training/evaluation.py": ["tests/training/test_scaling.py", "tests/training/test_callbacks.py"],
}
DRAWN, SEED, WORKERS = 60, 0, 2
SAME = ("Eq_Is", "NotEq_IsNot", "Is_Eq", "IsNot_NotEq", "NoOp")  # of None, small numbers and names: no fault


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module from a changed source."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=str(self.path))
        spec.has_location = True
        return spec

    def exec_module(self, module):
        exec(compile(self.source, self.path, "exec"), module.__dict__)


def mutants(source: str, number: int, seed: int) -> tuple[list[str], int]:
    """A draw of sources with one fault each, and how many there are to draw from."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, every = list(ast_nodes(get_ast(source))), []
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if not operator.arguments() and not name.endswith(SAME):  # those with arguments must be told which variables
            count = sum(len(list(operator().mutation_positions(node))) for node in nodes)
            every += [(operator, occurrence) for occurrence in range(count)]
    same, found = meaning(source), []
    for operator, occurrence in random.Random(seed).sample(every, len(every)):
        if len(found) == number:
            break
        code = mutate_code(source, operator(), occurrence)
        if code is not None and meaning(code) not in (same, None):
            found.append(code)
    return found, len(every)


def meaning(source: str) -> str | None:
    """The syntax tree without annotations and docstrings; None where it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Name("a", ast.Load())
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


def tests_of(module: str) -> list[str]:
    """Test files of a module, those of the same name and `<name>_<more>`.

    Raises:
        ValueError: there are none.
    """
    if module in TESTS:
        return TESTS[module]
    path = Path(module).relative_to("hf_distill")
    folder, name = ROOT / "tests" / path.parent, path.stem
    found = [p for p in sorted(folder.glob(f"test_{name}*.py")) if "two_ranks" not in p.name]
    if not found:
        raise ValueError(f"{module} has no tests under its name: add them to TESTS in benchmarks/mutants.py")
    return [str(p.relative_to(ROOT)) for p in found]


def start(module: str, source: str, tests: list[str]) -> int:
    """The process id of a child that runs the tests on a source; it exits with pytest's code."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 3
    try:
        import pytest

        name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        sys.meta_path.insert(0, Mutated(name, ROOT / module, source))
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
    finally:
        os._exit(code)


def run_all(
    module: str, sources: list[str], tests: list[str], limit: float, workers: int, until: float = float("inf")
) -> list[bool]:
    """Whether each source was caught: a test failed, or it ran longer than `limit` seconds. None begins after `until`,
    but for the first."""
    caught: dict[int, bool] = {}
    waiting, running = list(enumerate(sources)), {}
    while waiting or running:
        if time.monotonic() > until and len(waiting) < len(sources):
            waiting.clear()
        while waiting and len(running) < workers:
            index, source = waiting.pop(0)
            running[start(module, source, tests)] = (index, time.monotonic())
        for pid, (index, begun) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - begun > limit:
                os.killpg(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0)
            if done:
                caught[index] = os.waitstatus_to_exitcode(status) != 0
                del running[pid]
                print("." if caught[index] else "S", end="", flush=True)
        time.sleep(0.05)
    print()
    return [caught[i] for i in sorted(caught)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="path of a module of hf_distill")
    parser.add_argument("--mutants", type=int, default=DRAWN)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--minutes", type=float, default=10.0, help="mutants that do not fit are left out, said aloud")
    parser.add_argument("--least", type=float, default=0.0, help="share to catch; below it the exit status is 1")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.chdir(ROOT)
    module = str(Path(options.module).resolve().relative_to(ROOT))
    source = (ROOT / module).read_text(encoding="utf-8")
    tests = tests_of(module)
    drawn, every = mutants(source, options.mutants, options.seed)

    import datasets  # noqa: F401  once, for all children
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    torch.set_num_threads(1)
    begun = time.monotonic()
    if run_all(module, [source], tests, 600, 1) != [False]:
        raise SystemExit(f"the tests fail before anything is changed: {' '.join(tests)}")
    seconds = time.monotonic() - begun
    print(f"{module}: {len(drawn)} of {every} mutants, seed {options.seed}; {' '.join(tests)} {seconds:.0f} s")
    caught = run_all(module, drawn, tests, 3 * seconds + 10, WORKERS, until=begun + options.minutes * 60)
    if len(caught) < len(drawn):
        print(f"{len(drawn) - len(caught)} left out: they did not fit into {options.minutes:g} minutes")
    for code, found in zip(drawn, caught, strict=False):
        if not found:
            lines = difflib.unified_diff(source.splitlines(), code.splitlines(), "sound", "survivor", lineterm="", n=1)
            print("\n".join(lines))
    share = sum(caught) / len(caught)
    print(f"{module}: {sum(caught)} of {len(caught)} caught, {share:.0%}")
    sys.exit(share < options.least)


if __name__ == "__main__":
    main()
