"""Mutate the package, a copy at a time, and see whether the tests notice.

    python tests/tools/mutate.py --mutants 200 --seed 0 --out mutants.json

A mutant is one small change of one module's text. It is killed where a test of its module's list
fails, or where it takes too long; the others survive, and each is either a hole in the tests or the
same function as before. The working tree is only read: each mutant lives in a temporary folder.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import difflib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]

# What is not mutated: names of functions, with why the tests need not notice a change in them.
SKIPPED = {
    "_form": "how a CPU sums up: every form gives the same numbers",
    "sum_form": "the same",
    "_is_faster_in_one_loop": "the same",
    "are_few": "the same",
    "can_keep": "the same",
    "sums_mass_as_it_is": "the same",
    "has_blocks": "the same",
    "num_blocks": "any number of blocks gives the same sums",
    "computed_again": "what XLA is to make again",
    "choose_chunk": "any size of a chunk gives the same numbers",
    "choose_block": "any size of a block gives the same numbers",
    "_block_size": "the same",
    "whole_logits_block": "the same",
    "is_widened_on_cpu": "how a CPU computes half precision",
    "balance": "the same; too small a size is a time limit, too large a one is the length",
    "on_platform": "the CPU's own form of half precision",
    "_slice_kernel": "bits in place of halves, for speed",
    "is_identity": "the identity may be computed, too",
}

# Calls without their guard, made of the arguments' text.
GUARDS = {
    "blank_uncounted": "{1}",
    "safe_value": "{1}",
    "without_infinite_derivative": "{0}",
    "blank_hidden": "{0}",
    "stop_gradient": "{0}",
    "nan_to_num": "{0}",
    "safe_multiply": "{0} * {1}",
    "product": "{0} * {1}",
    "finite_exp": "jnp.exp({0})",
}
# A function for another one of its kind.
RENAMED = {"maximum": "minimum", "minimum": "maximum", "pmax": "pmin", "pmin": "pmax"}
# One kind of number that is not finite is let through, or caught too.
NOT_FINITE = {
    "isfinite": "~jnp.isnan({0})",
    "isnan": "~jnp.isfinite({0})",
    "isinf": "jnp.isnan({0})",
}
COMPARISONS: dict[type, tuple[str, str]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
}
ARITHMETIC: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}

# The tests of each module, the quick ones that kill most of its mutants before the others.
_FIRST = {
    "dense": ["laws::law_2_cross_entropy_equals_its_reference"],
    "head": [
        "laws::law_10_head_equals_cross_entropy_of_its_logits",
        "linear::second_order_equals_the_reference",
    ],
    "uncounted": ["laws::law_8_uncounted_example_acts_as_deleted"],
    "mean": ["extremes::mean_over_nothing_is_zero_with_zero_gradient"],
}
_THEN = {
    "mesh": ["mesh", "class_sharding"],
    "divergence": [
        "distillation::law_2_distillation_equals_its_reference",
        "distillation::law_15_distillation_of_heads_equals_that_of_their_logits",
        "distillation",
    ],
    "mean": [
        "laws::law_2_total_weight_equals_its_reference_and_what_mean_divides_by",
        "laws::law_2_nll_equals_its_reference",
        "extremes::a_denominator_of_0_is_the_constant_1",
        "sharding::none_is_each_shards_own_part_of_the_whole",
        "sharding::shard_without_counted_examples_changes_nothing",
        "sharding::scalar_sample_weight_that_all_shards_have_gets_the_wholes_gradient",
        "sharding::batch_and_positions_sharded_over_two_axes_gather_nothing",
        "mesh::what_has_few_numbers_is_moved_to_its_tokens",
    ],
    "dense": [
        "laws::law_2_nll_equals_its_reference",
        "laws::law_2_log_softmax_equals_its_reference",
        "laws::law_2_total_weight_equals_its_reference_and_what_mean_divides_by",
        "extremes::minus_infinity_elsewhere_is_a_class_of_probability_zero",
        "extremes::minus_infinity_at_the_target_is_an_infinite_loss_with_a_finite_gradient",
        "extremes::smoothing_gives_minus_infinity_target_mass",
        "extremes::zero_target_mass_on_minus_infinity_is_zero",
        "extremes::traced_smoothing_of_zero_ignores_minus_infinity",
        "extremes::infinite_class_weight_hurts_only_its_class",
        "extremes::infinite_class_weight_of_the_target_is_infinite_with_the_gradients_signs",
        "extremes::nan_in_a_counted_row_shows_in_its_row_alone",
        "extremes::target_out_of_range_poisons_the_gradients_that_examples_share",
        "extremes::uncounted_target_out_of_range_is_no_error",
        "extremes::a_denominator_of_0_is_the_constant_1",
        "extremes::traced_smoothing_out_of_range_is_nan",
        "extremes::softcap_bounds_what_infinity_does",
        "extremes::nan_weight_of_a_class_of_uncounted_mass_reaches_no_gradient",
        "extremes::int64_targets_beyond_32_bits_are_out_of_range",
        "gradients::second_derivatives_of_uncounted_nan_rows_are_zero",
        "gradients::grad_of_grad_of_shared_arguments_passes_by_uncounted_nan_rows",
        "gradients::grad_of_grad_with_smoothing_passes_by_uncounted_nan_rows",
        "gradients::gradient_of_logits_that_a_vmap_over_targets_shares",
        "gradients::vmap_over_targets_and_class_mask",
        "laws::law_8_excluded_class_acts_as_deleted",
        "laws::law_4_smoothing_is_a_mixture_with_uniform_targets",
        "confidence::law_13_a_nearly_certain_row_of_many_classes_is_exact",
        "confidence::law_13_entropy_of_a_nearly_certain_row_is_exact",
        "confidence::law_13_a_nearly_certain_row_is_exact",
        "laws::law_11_split_log_probabilities_equal_the_whole",
        "laws::law_11_split_classes_equal_the_whole",
        "class_sharding::prediction_of_split_classes_is_the_first_of_equals",
        "class_sharding::law_11_loss_and_gradient_outside_the_mapped_function_equal_the_whole",
        "extremes::class_weights_that_nobody_asks_for_reach_no_derivative_of_smoothing",
        "extremes::predictions_of_many_classes_are_argmax",
        "linear::dense_token_stats_are_those_of_the_head",
        "class_sharding::what_is_not_finite_is_as_loud_as_in_whole_rows",
    ],
    "head": [
        "extremes::prediction_of_nan_is_argmax_and_of_no_class_none",
        "linear::law_2_token_stats_equal_their_reference",
        "linear::target_out_of_range_is_loud",
        "linear::law_8_nan_of_uncounted_tokens_reaches_nothing",
        "linear::law_8_nan_of_an_excluded_class_reaches_nothing",
        "linear::dtype_is_that_of_the_matmuls_and_gradients_are_the_parameters",
        "linear::predictions_under_vmap_leave_gradients_alone",
        "linear::transformations_of_the_streamed_form",
        "extremes::entropy_over_chunks_of_the_smallest_logits_is_finite",
        "confidence::law_13_a_nearly_certain_token_of_a_head_is_exact",
        "laws::law_11_head_of_split_classes_equals_the_whole",
        "linear::a_class_that_no_counted_token_has_may_be_nan",
        "linear::a_class_of_nan_that_a_counted_token_has_shows_beside_a_mask",
        "mesh::law_11_loss_and_gradient_equal_the_whole_and_are_split_like_their_arguments",
    ],
}


def _listed(first: str, then: str) -> list[str]:
    """Return the tests of these groups, as pytest names them."""
    names = [x for group in first.split() for x in _FIRST[group]]
    names += [x for group in then.split() for x in _THEN[group]]
    return [
        "tests/test_" + name.replace("::", ".py::test_")
        if "::" in name
        else f"tests/test_{name}.py"
        for name in names
    ]


TESTS = {
    "_numerics": _listed("uncounted dense", "dense"),
    "_rows": _listed("dense uncounted head", "dense head"),
    "_targets": _listed("dense uncounted", "dense"),
    "_dense": _listed("dense uncounted", "dense"),
    "_reduction": _listed("dense mean", "mean"),
    "_xla/blocks": _listed("dense uncounted", "dense"),
    "_xla/classes": _listed("dense uncounted head", "dense head"),
    "_xla/heads": _listed("head", "head"),
    "_xla/kept": _listed("dense uncounted head", "dense head"),
    "_xla/mass": _listed("dense uncounted", "dense"),
    "_xla/one_loop": _listed("dense uncounted", "dense"),
    "_xla/sums": _listed("dense uncounted", "dense"),
    "_head/chunks": _listed("head", "head"),
    "_head/streaming": _listed("head", "head"),
    "_head/tokens": [*_listed("head", "head"), "tests/test_tokens.py"],
    "_head/forward": _listed("head", "head"),
    "_head/mesh": _listed("", "mesh"),
    "_divergence": _listed("", "divergence"),
    "_head/divergence": _listed("", "divergence"),
}
MODULES = list(TESTS)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of a module's text: what lies between two offsets, in bytes, becomes another."""

    module: str
    line: int
    start: int
    end: int
    text: str
    kind: str

    @property
    def key(self) -> str:
        return f"{self.module}:{self.line}:{self.start}-{self.end}:{self.kind}:{self.text}"

    def apply(self, source: str) -> str:
        """Return the module's text, mutated."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    def diff(self, source: str) -> str:
        """Return the change as a unified diff."""
        name = f"jaxent/{self.module}.py"
        lines = source.splitlines(), self.apply(source).splitlines()
        return "\n".join(
            difflib.unified_diff(*lines, f"{name}:{self.line}", name, lineterm="", n=1)
        )


def mutants(module: str, source: str) -> list[Mutant]:
    """Return every mutant of a module that compiles and differs."""
    found = {}
    for start, end, text, kind, line in _Changes(source).of(ast.parse(source)):
        mutant = Mutant(module, line, start, end, text, kind)
        mutated = mutant.apply(source)
        try:
            ast.parse(mutated)
        except SyntaxError:
            continue
        if mutated != source:
            found.setdefault(mutated, mutant)
    return list(found.values())


class _Changes:
    """The changes of a source, each (start, end, text, kind, line)."""

    def __init__(self, source: str):
        self.data = source.encode()
        lines = self.data.splitlines(keepends=True)
        self.lines = [sum(map(len, lines[:i])) for i in range(len(lines))]

    def of(self, node: ast.AST) -> Iterator[tuple[int, int, str, str, int]]:
        """Yield the changes of a node and of what it is made of."""
        for start, end, text, kind in self.at(node):
            yield start, end, text, kind, self.data[:start].count(b"\n") + 1
        for child in self.children(node):
            yield from self.of(child)

    def children(self, node):
        """Yield what may be changed: no annotation, decorator, docstring, or axis of -1."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name in SKIPPED:
                return
            if isinstance(node, ast.FunctionDef):
                yield from (x for x in (*node.args.defaults, *node.args.kw_defaults) if x)
            yield from node.body
        elif isinstance(node, ast.AnnAssign):
            yield from [node.value] if node.value else []
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield from [] if isinstance(node.operand, ast.Constant) else [node.operand]
        elif isinstance(node, ast.Module):
            yield from (x for x in node.body if isinstance(x, ast.FunctionDef | ast.ClassDef))
        else:
            yield from ast.iter_child_nodes(node)

    def at(self, node):
        """Yield the changes of the node itself."""
        match node:
            case ast.BinOp() if type(node.op) in ARITHMETIC:
                yield self.between(node.left, node.right, *ARITHMETIC[type(node.op)])
            case ast.AugAssign() if type(node.op) in ARITHMETIC:
                old, new = ARITHMETIC[type(node.op)]
                yield self.between(node.target, node.value, f"{old}=", f"{new}=")
            case ast.BoolOp():
                names = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:]):
                    yield self.between(left, right, *names)
            case ast.Compare() if type(node.ops[0]) in COMPARISONS and len(node.ops) == 1:
                new = COMPARISONS[type(node.ops[0])]
                yield self.between(node.left, node.comparators[0], *new)
            case ast.UnaryOp(ast.Invert() | ast.Not()):
                yield *self.span(node), f"({self.text(node.operand)})", "without a not"
            case ast.UnaryOp(ast.USub(), ast.Attribute() | ast.Call()):
                yield *self.span(node), self.text(node.operand), "without a minus"
            case ast.Constant(value=0 | 1 as value) if type(value) is int:
                yield *self.span(node), str(1 - value), "another constant"
            case ast.IfExp(test) if (side := _none_side(test, node.body, node.orelse)) is not None:
                if not _is_none(side):
                    yield *self.span(node), f"({self.text(side)})", "as if it were None"
            case ast.If(test) if (kind := _of_none(test)) is not None:
                yield *self.span(test), str(kind), "as if it were None"
            case ast.keyword(arg=str(), value=ast.IfExp(test, body, orelse)):
                if (side := _none_side(test, body, orelse)) is not None and _is_none(side):
                    yield *self.span(node.value), "None", "a keyword of None"
            case ast.Call() if (name := _name(node.func)) is not None:
                yield from self.of_call(node, name)

    def of_call(self, node, name):
        """Yield the changes of a call."""
        texts = [self.text(x) for x in node.args]
        if name == "where" and len(texts) == 3:
            start, end = self.span(node.args[1])[0], self.span(node.args[2])[1]
            yield start, end, f"{texts[2]}, {texts[1]}", "where, swapped"
        for table, kind in ((GUARDS, "without its guard"), (NOT_FINITE, "another not finite")):
            if name in table and texts and not any(isinstance(x, ast.Starred) for x in node.args):
                wrapped = [x if re.fullmatch(r"[\w.]+", x) else f"({x})" for x in texts]
                yield *self.span(node), f"({table[name].format(*wrapped)})", kind
        if name in RENAMED and isinstance(node.func, ast.Attribute):
            end = self.span(node.func)[1]
            yield end - len(name), end, RENAMED[name], "another extreme"

    def between(self, left, right, old, new):
        """Return the change of an operator, which stands between its operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        at = start + self.data[start:end].decode().index(old)
        return at, at + len(old), new, f"{old} to {new}"

    def span(self, node):
        return (
            self.lines[node.lineno - 1] + node.col_offset,
            self.lines[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node):
        start, end = self.span(node)
        return self.data[start:end].decode()


def _name(function):
    return getattr(function, "attr", getattr(function, "id", None))


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def _of_none(test):
    """What `x is None` would be of None, and `x is not None`; None for another test."""
    match test:
        case ast.Compare(_, [ast.Is() | ast.IsNot() as op], [ast.Constant(value=None)]):
            return isinstance(op, ast.Is)
    return None


def _none_side(test, body, orelse):
    kind = _of_none(test)
    return None if kind is None else body if kind else orelse


def draw(found: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Return some mutants, of each module in turn."""
    generator = random.Random(seed)
    left = [generator.sample(x, len(x)) for x in found.values()]
    drawn = []
    while len(drawn) < count and any(left):
        drawn += [x.pop() for x in left if x]
    return drawn[:count]


@dataclasses.dataclass
class Verdict:
    """What became of a mutant: the test that failed, the time limit, or nothing."""

    key: str
    where: str
    diff: str
    killed: bool
    by: str
    seconds: float


class Runner:
    """Runs tests of the package, or of a mutant, in a temporary folder of its own."""

    def __init__(self, copy: str, cache: str, limit: float, examples: str):
        # The working tree may change meanwhile.
        self.copy = copy
        for name in ("jaxent", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, f"{copy}/{name}", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        # JAX's cache is keyed by the program: what a mutation leaves alone is compiled once.
        self.env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAXENT_EXAMPLES": examples,
            "HYPOTHESIS_PROFILE": "mutants",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.env.pop("CI", None)
        self.limit = limit

    def run(self, tests: list[str], mutant: Mutant | None = None) -> tuple[bool, str, float]:
        """Return whether the tests passed, else by what they did not, and the seconds."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.copy, folder, dirs_exist_ok=True)
            if mutant is not None:
                path = pathlib.Path(folder, "jaxent", f"{mutant.module}.py")
                path.write_text(mutant.apply(path.read_text()))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "--assert=plain"]
            command += ["-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=self.env | {"PYTHONPATH": folder},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=self.limit if mutant else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return False, "time limit", time.monotonic() - began
        seconds = time.monotonic() - began
        if process.returncode == 0:
            return True, "", seconds
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        if process.returncode in (4, 5) or (mutant is None):
            raise SystemExit(output)  # no such test, or the tests fail as they are
        return False, failed[1] if failed else f"exit status {process.returncode}", seconds


def judge(runner: Runner, mutant: Mutant, source: str) -> Verdict:
    """Return whether the tests notice the mutant."""
    passed, by, seconds = runner.run(TESTS[mutant.module], mutant)
    where = f"jaxent/{mutant.module}.py:{mutant.line}"
    return Verdict(mutant.key, where, mutant.diff(source), not passed, by, round(seconds, 1))


def main() -> None:
    """Judge mutants and print what survives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="without .py; all by default")
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", type=int, default=1, help="processes")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a mutant")
    parser.add_argument("--examples", default="0.1", help="JAXENT_EXAMPLES of the tests")
    parser.add_argument("--out", help="JSON of the verdicts; those it has are not judged again")
    parser.add_argument("--cache", help="folder of compiled programs; a temporary one by default")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    options = parser.parse_args()

    sources = {x: (ROOT / "jaxent" / f"{x}.py").read_text() for x in options.modules}
    found = {module: mutants(module, source) for module, source in sources.items()}
    drawn = draw(found, options.mutants, options.seed)
    print(*(f"{module}: {len(x)}" for module, x in found.items()), sep=", ", flush=True)
    if options.list:
        print(*(mutant.diff(sources[mutant.module]) for mutant in drawn), sep="\n")
        return
    verdicts: dict[str, Verdict] = {}
    if options.out and os.path.exists(options.out):
        verdicts = {
            x["key"]: Verdict(**x) for x in json.loads(pathlib.Path(options.out).read_text())
        }
    with tempfile.TemporaryDirectory() as copy, tempfile.TemporaryDirectory() as cache:
        runner = Runner(copy, options.cache or cache, options.limit, options.examples)
        tests = list(dict.fromkeys(test for x in options.modules for test in TESTS[x]))
        print(f"unmutated: {runner.run(tests)[2]:.0f} s", flush=True)
        waiting = [mutant for mutant in drawn if mutant.key not in verdicts]
        with concurrent.futures.ThreadPoolExecutor(options.j) as pool:
            jobs = [pool.submit(judge, runner, x, sources[x.module]) for x in waiting]
            for i, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                verdict = job.result()
                verdicts[verdict.key] = verdict
                fate = f"killed by {verdict.by}" if verdict.killed else f"SURVIVED\n{verdict.diff}"
                head = f"[{i}/{len(waiting)}] {verdict.seconds:.0f} s {verdict.where}"
                print(head, fate, flush=True)
                if options.out:
                    listed = [dataclasses.asdict(x) for x in verdicts.values()]
                    pathlib.Path(options.out).write_text(json.dumps(listed, indent=1))
    judged = [verdicts[mutant.key] for mutant in drawn]
    survivors = [verdict for verdict in judged if not verdict.killed]
    print(f"\n{len(survivors)} survived:", *(x.diff for x in survivors), sep="\n")
    print(f"\nscore: {len(judged) - len(survivors)} of {len(judged)}")


if __name__ == "__main__":
    main()
