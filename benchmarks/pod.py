"""A training pod that is not here: memory and communication of a chip, by ahead-of-time compiling.

    python -m benchmarks.pod [--tokens 16384 131072 1048576] [--only TEXT] [--all]

Loss and gradients, bfloat16, on an explicit mesh of data x model chips: the dense form takes
logits P("data", "model"), the linear one hidden states P("data", None) and a kernel
P(None, "model"), with FSDP P("data", "model"). `--only` keeps the rows whose name contains TEXT;
`--all` compiles every topology with every mesh, head and number of tokens. All numbers are a
chip's, of the program that XLA compiled. A v5p chip is one device.

Scratch is memory beyond arguments and results. Of it, XLA keeps in VMEM what fits there, so it is
given twice: what is left in HBM; and all of it, of the same program compiled without VMEM's use.
A collective counts as the larger of what a chip puts in and gets out, in a loop once a trip.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # where it all compiles

import argparse
import collections
import importlib.metadata
import itertools
import math
import re
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

from . import targets as accelerators
from .tables import header, line

TOKENS = (2**14, 2**17, 2**20)
FORMS = ("dense", "linear", "linear FSDP")
HEADS = {"Gemma 2 2B": (2304, 256000), "Llama 3 8B": (4096, 128256)}  # (D, C)
TOPOLOGIES = {"v5e:16x16": 256, "v5e:8x8": 64, "v5e:4x4": 16, "v5p:8x8x4": 256}  # chips
WHOLE = "v5e:16x16"  # with every mesh and head; the others to compare with
IN_HBM = {"xla_msa_enable": "false"}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CALLS = r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)"


class Case(NamedTuple):
    topology: str
    form: str
    head: str
    mesh: tuple[int, int]
    tokens: int

    @property
    def series(self):
        """What it has in common with the same on other numbers of tokens."""
        return f"TPU {self.topology}", self.form, self.head, "x".join(map(str, self.mesh))

    @property
    def name(self):
        return " ".join(map(str, (*self.series, self.tokens)))


class Measured(NamedTuple):
    arguments: int  # bytes, as all here
    hbm: int
    scratch: int
    counts: collections.Counter  # of collectives, by kind
    sizes: collections.Counter


def cases(tokens, everything):
    for topology, form, head in itertools.product(TOPOLOGIES, FORMS, HEADS):
        chips = TOPOLOGIES[topology]
        side = math.isqrt(chips)
        for mesh in ((chips, 1), (side, side), (1, chips)):
            for n in tokens:
                extra = topology != WHOLE and (mesh[0] != side or "Gemma" not in head or n > 2**17)
                # Where nothing splits the tokens, 2**20 do not fit, and FSDP is no other form.
                if mesh[0] == 1 and (n > 2**17 or form == "linear FSDP"):
                    continue
                if everything or not extra:
                    yield Case(topology, form, head, mesh, n)


def lower(case):
    mesh = accelerators.mesh(case.topology, case.mesh)
    width, classes = HEADS[case.head]

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    targets = array((case.tokens,), "int32", "data")
    if case.form == "dense":
        logits = array((case.tokens, classes), "bfloat16", "data", "model")
        return jax.jit(jax.value_and_grad(jaxent.cross_entropy)).lower(logits, targets)
    rows = "data" if case.form == "linear FSDP" else None
    hidden = array((case.tokens, width), "bfloat16", "data", None)
    kernel = array((width, classes), "bfloat16", rows, "model")
    loss = jax.value_and_grad(jaxent.linear_cross_entropy, (0, 1))
    return jax.jit(loss).lower(hidden, kernel, targets)


def measure(case):
    lowered = lower(case)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    scratch = lowered.compile(compiler_options=IN_HBM).memory_analysis().temp_size_in_bytes
    counts, sizes = read_collectives(compiled.as_text())
    return Measured(
        memory.argument_size_in_bytes, memory.temp_size_in_bytes, scratch, counts, sizes
    )


class Instruction(NamedTuple):
    opcode: str
    result: str  # its type
    operands: list[str]  # theirs
    rest: str


def read_computations(text):
    """The instructions of each computation of a compiled program, and the entry's name."""
    computations, entry, types = {}, None, {}
    for row in text.splitlines():
        if head := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", row):
            current, types = computations.setdefault(head[2], []), {}
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", row):
            name, result, opcode, rest = found.groups()
            types[name] = result
            operands = re.findall(r"%[\w.-]+", rest.split(")")[0])
            operands = [types.get(operand, "") for operand in operands]
            current.append(Instruction(opcode, result, operands, rest))
    return computations, entry


def num_bytes(*types):
    arrays = re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", " ".join(types))
    return sum(
        (int(bits or 8) * math.prod(int(n) for n in shape.split(",") if n) + 7) // 8
        for _, bits, shape in arrays
    )


def num_trips(computations, loop):
    """As XLA noted it; or the bound of the condition, as a scan counts up from 0.

    NaN where values decide it: no collective that is counted may be in such a loop.
    """
    if noted := re.search(r'known_trip_count\D*"(\d+)"', loop.rest):
        return int(noted[1])
    condition = computations[re.search(r"condition=(%[\w.-]+)", loop.rest)[1]]
    bounds = [i.rest for i in condition if i.opcode == "constant"]
    if len(bounds) != 1 or "direction=LT" not in condition[-1].rest:
        return math.nan
    return int(bounds[0].split(")")[0])


def read_collectives(text):
    """How many of each kind a chip takes part in, and their bytes."""
    computations, entry = read_computations(text)
    counts, sizes = collections.Counter(), collections.Counter()

    def visit(computation, times):
        for instruction in computations[computation]:
            opcode, result, operands, rest = instruction
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                given, got = num_bytes(*operands), num_bytes(result)
                # The start of an asynchronous one may hand its operands on, too.
                got -= given if kind != opcode and kind != "all-reduce" else 0
                counts[kind] += times
                sizes[kind] += times * max(given, got)
            if not opcode.endswith(("-done", "-update")):
                trips = num_trips(computations, instruction) if opcode == "while" else 1
                for names in re.findall(CALLS, rest):
                    for name in re.findall(r"%[\w.-]+", names):
                        visit(name, times * trips)

    visit(entry, 1)
    return counts, sizes


def outcome(function, *arguments):
    """Its result, or what went wrong."""
    try:
        return function(*arguments)
    except Exception as error:
        asked = re.search(r"([\d.]+[MG])\b.* exceeds|Used ([\d.]+[MG]) of", str(error))
        return f"does not fit: {asked[1] or asked[2]}" if asked else type(error).__name__


def mb(size):
    if 0 < size < 1e4:
        return "< 0.01"
    return f"{size / 1e6:.0f}" if size >= 1e7 else f"{size / 1e6:.2g}"


def two_digits(ratio):
    return f"{round(ratio, 2) + 0.0:.2f}"  # no -0.00


def table(chosen):
    caption = "Of a chip: MB, and of collectives their number and MB."
    sides = "arguments", "scratch in HBM", "scratch"
    header(caption, "slice", "form", "head", "mesh", "tokens", *sides, *KINDS[:3], "others")
    measured = {}
    for case in chosen:
        found = outcome(measure, case)
        if isinstance(found, str):
            line(*case.series, case.tokens, found, *[""] * 6)
            continue
        measured[case] = found
        cells = [
            f"{found.counts[kind]}: {mb(found.sizes[kind])}" if found.counts[kind] else ""
            for kind in KINDS
        ]
        others = " ".join(filter(None, cells[3:]))
        line(*case.series, case.tokens, *map(mb, found[:3]), *cells[:3], others)
    print()
    return measured


def affine(small, large, sizes):
    """Both coefficients of size = constant + slope * tokens of a chip."""
    per_chip = [case.tokens / case.mesh[0] for case in (small, large)]
    slope = (sizes[1] - sizes[0]) / (per_chip[1] - per_chip[0])
    return sizes[0] - slope * per_chip[0], slope


def growth(measured):
    """What the scratch and the collectives are made of, from the two largest numbers of tokens."""
    print("How they grow, by the two largest numbers of tokens: MB whatever the tokens are, and")
    print("bytes for each token of a chip (tokens / data), each of its logits (tokens x classes /")
    print("chips), each value of its hidden states (tokens x width / data) and, of the MB that")
    header(
        "are sent whatever the tokens are, each value of its classes (width x classes / model).",
        *("slice", "form", "head", "mesh"),
        *("scratch", "a token", "a logit", "a hidden value"),
        *("collectives", "a token", "a hidden value", "a kernel value"),
    )
    together = collections.defaultdict(list)
    for case in measured:
        together[case.series].append(case)
    for series, members in together.items():
        if len(members) < 2:
            continue
        small, large = sorted(members, key=lambda case: case.tokens)[-2:]
        width, classes = HEADS[large.head]
        classes /= large.mesh[1]
        found = measured[small], measured[large]
        fixed, slope = affine(small, large, [one.scratch for one in found])
        sent, sent_slope = affine(small, large, [one.sizes.total() for one in found])
        ratios = slope / width, sent_slope / width, sent / width / classes
        ratios = [""] * 3 if large.form == "dense" else list(map(two_digits, ratios))
        line(
            *series,
            *(mb(fixed), f"{slope:.0f}", two_digits(slope / classes), ratios[0]),
            *(mb(sent), f"{sent_slope:.0f}", *ratios[1:]),
        )
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--all", action="store_true", help="of the other slices, all rows too")
    arguments = parser.parse_args()
    missing = outcome(accelerators.mesh, WHOLE, (256, 1))
    if isinstance(missing, str):
        parser.exit(1, f"{WHOLE}: {missing}; it needs {accelerators.needs(WHOLE)}.\n")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    print(f"With {', '.join(versions)}.\n")
    chosen = cases(arguments.tokens, arguments.all)
    growth(table([case for case in chosen if arguments.only in case.name]))


if __name__ == "__main__":
    main()
