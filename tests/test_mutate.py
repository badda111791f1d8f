"""The mutator of `tools/mutate.py`: what it changes of a source, and what it leaves alone."""

import ast
import re
import textwrap

import pytest
from tools import mutate

CHANGES = [
    ("a == b", "a != b"),
    ("a < b", "a <= b"),
    ("(a) >= b", "(a) > b"),
    ("a + b", "a - b"),
    ("a * b", "a / b"),
    ("(a) & b", "(a) | b"),
    ("a and b", "a or b"),
    ("~a", "(a)"),
    ("not a", "(a)"),
    ("-jnp.inf", "jnp.inf"),
    ("jnp.where(a, b, c)", "jnp.where(a, c, b)"),
    ("blank_uncounted(a, b)", "(b)"),
    ("safe_multiply(a, b)", "(a * b)"),
    ("jax.lax.stop_gradient((a, b))", "(((a, b)))"),
    ("f(a, 0)", "f(a, 1)"),
    ("jnp.maximum(a, b)", "jnp.minimum(a, b)"),
    ("jnp.isfinite(a)", "(~jnp.isnan(a))"),
    ("jnp.isnan(a)", "(~jnp.isfinite(a))"),
    ("a if b is None else c", "(a)"),
    ("a if b is not None else c", "(c)"),
    ("f(x=None if a is None else b)", "f(x=None)"),
]


def of(body):
    """Return the bodies of all mutants of a function."""
    source = f"def function(a, b, c):\n    return {body}\n"
    return [mutant.apply(source).partition("return ")[2].strip() for mutant in found(source)]


def found(source):
    return mutate.mutants("module", source)


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=[before for before, _ in CHANGES])
def test_an_operator_changes_this_alone(before, after):
    assert of(before) == [after]


@pytest.mark.parametrize(
    "body", ["f(a, -1)", "a is None", "f(*a)", "safe_multiply(*a)", "True", "'a + b'"]
)
def test_what_is_no_number_to_change_stays(body):
    assert of(body) == []


def test_a_branch_is_taken_as_if_it_were_none():
    source = "def function(a):\n    if a is not None:\n        a = f(a)\n    return a\n"
    (mutant,) = found(source)
    assert mutant.apply(source) == source.replace("a is not None", "False")
    assert mutant.line == 2


def test_annotations_docstrings_decorators_and_forms_stay():
    source = '''
        """1 + 1"""
        SIZE = 2 + 3

        @static(0)
        def function(a: "int | None", *, b: int | None = None) -> int | None:
            """a + b"""
            c: int | None = a
            return c

        def _form(a):
            return a + 1
    '''
    assert found(textwrap.dedent(source)) == []


needs_sources = pytest.mark.skipif(
    not (mutate.ROOT / "jaxent").exists(), reason="an installed wheel is judged, without a checkout"
)


@needs_sources
def test_what_is_not_mutated_is_there():
    sources = [path.read_text() for path in (mutate.ROOT / "jaxent").rglob("*.py")]
    names = re.findall(r"^ *def (\w+)", "\n".join(sources), re.MULTILINE)
    assert mutate.SKIPPED.keys() <= set(names)


@needs_sources
@pytest.mark.parametrize("module", mutate.MODULES)
def test_mutants_of_the_package_compile_and_differ(module):
    source = (mutate.ROOT / "jaxent" / f"{module}.py").read_text()
    listed = found(source)
    mutated = {mutant.apply(source) for mutant in listed}
    assert source not in mutated
    assert len(mutated) == len(listed) > 2
    assert len({mutant.key for mutant in listed}) == len(listed)
    ast.parse(listed[0].apply(source))


def test_what_follows_a_letter_of_two_bytes_is_found():
    source = 'def function(a, b):\n    return f("ä", a + b)\n'
    (mutant,) = found(source)
    assert mutant.apply(source) == source.replace("+", "-")
    assert '-    return f("ä", a + b)\n+    return f("ä", a - b)' in mutant.diff(source)


def test_a_draw_takes_modules_in_turn_and_is_the_same_again():
    source = {name: "def f(a, b):\n    return a + b * a - 1\n" for name in ("x", "y")}
    listed = {name: mutate.mutants(name, text) for name, text in source.items()}
    drawn = mutate.draw(listed, 5, seed=0)
    assert [mutant.module for mutant in drawn] == ["x", "y", "x", "y", "x"]
    assert drawn == mutate.draw(listed, 5, seed=0)
    assert len(mutate.draw(listed, 99, seed=0)) == sum(map(len, listed.values()))


def test_every_listed_test_is_one():
    for name in {name for names in mutate.TESTS.values() for name in names}:
        path, _, test = name.partition("::")
        assert not test or f"def {test}(" in (mutate.ROOT / path).read_text()
