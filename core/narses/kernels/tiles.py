"""The machine code of narses.kernels.distances: tiles of pairs of rows, added up block by block, as LLVM IR.

Rounding is part of the definition, so every addition is written out: within a block 16 float32 lanes, joined by a fixed
tree; from there on float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from narses.kernels import jit

Term = Literal["squares", "absolute", "largest"]  # what is summed; the largest is "summed" by max

# Columns added in float32. Each lane takes 10 steps, the tree 4, the difference counts twice in its square: 16 roundings of
# 2^-24 at most, so no numbers whatever, honest or not, move a sum by 1e-6 of itself. Longer blocks are 5 % faster.
BLOCK = 160
EDGE = 4  # rows on each side of a full tile, which leaves 16 sums
TALL = 8  # rows of a tile against one other row: joining lanes would take longer than summing them, for 4

# (rows, other rows, whether both are the same rows) of the tiles that there is code for.
SHAPES = [(a, b, False) for a in range(1, EDGE + 1) for b in range(1, a + 1)]
SHAPES += [(a, a, True) for a in range(2, EDGE + 1)]
SHAPES += [(TALL, 1, False)]

# Addresses of rows, (T, 3) int32 tiles and their number, float64 sums (S, T, 16) that hold zeros; how far to go along the
# other rows for each column (1, or 0 where one block of zeros stands for all); columns in all, in a segment, in a span; the
# next segment, which threads share; the segment that `sums` begins with, and the last one + 1.
PARAMETERS = (
    *("ptr %rows", "ptr %tiles", "i64 %tile_count", "ptr %sums", "i64 %step", "i64 %columns", "i64 %width"),
    *("i64 %span_width", "ptr %next", "i64 %first", "i64 %segments"),
)

F, W, BITS = "<16 x float>", "<16 x double>", "<16 x i1>"

# Below, products that underflowed could show in the sum, even where the CPU flushes subnormal numbers to zero.
_LEAST = "0x3AF0000000000000"  # 2^-80
_INFINITY = "0x7FF0000000000000"


def pairs(a: int, b: int, same: bool) -> list[tuple[int, int, int]]:
    """(which of the tile's 16 sums, row, other row) of each pair of a tile."""
    return [((u << _shift(a)) + v, u, v) for u in range(a) for v in range(b) if v > u or not same]


def _shift(a: int) -> int:
    """A row's first sum is its number shifted by this: there is room for 4 sums of each of 4 rows, or 2 of each of 8."""
    return 1 if a == TALL else 2


def source(term: Term) -> str:
    """IR of the kernel with PARAMETERS."""
    text = [f"declare {F} @llvm.masked.load.v16f32.p0(ptr, i32, {BITS}, {F})", "declare i32 @llvm.cttz.i32(i32, i1)"]
    for kind, suffix in ((F, "v16f32"), (W, "v16f64")):
        text.append(f"declare {kind} @llvm.fma.{suffix}({kind}, {kind}, {kind})")
        text.append(f"declare {kind} @llvm.fabs.{suffix}({kind})")
    text += [_exact(term), _repair(term)]
    text += [_tile(term, shape, *SHAPES[shape]) for shape in range(len(SHAPES))]
    text.append(_driver())
    return "\n".join(text)


def _tile(term: Term, shape: int, a: int, b: int, same: bool) -> str:
    """One block of a x b pairs, joined to the tile's 16 float64 totals."""
    code = Code()
    found = pairs(a, b, same)
    code.do(f"define internal void @tile{shape}(ptr %p, ptr %q, i64 %start, i64 %count, i64 %step, ptr %totals) {{")
    code.do("entry:", "%whole = and i64 %count, -16", f"%wide = alloca {W}, align 64")
    rows = [_row(code, "%p", u, "%start") for u in range(a)]
    if not same:
        offset = code("mul i64 %start, %step")
        rows += [_row(code, "%q", v, offset) for v in range(b)]

    def step(x: list[str], acc: list[str]) -> list[str]:
        y = x if same else x[a:]
        return [code.term(term, F, x[u], y[v], acc[k]) for k, (_, u, v) in enumerate(found)]

    sums = code.over_columns("sum", "entry", rows, F, len(found), step)
    lanes = ["zeroinitializer"] * 16
    for name, (place, _, _) in zip(sums, found, strict=True):
        lanes[place] = name
    total_16 = code.tree(term, F, lanes)
    small = code(f"fcmp ult {F} {total_16}, {_splat(_LEAST)}")
    large = code(f"fcmp uge {F} {total_16}, {_splat(_INFINITY)}")
    used = ", ".join(f"i1 {int(lane != 'zeroinitializer')}" for lane in lanes)
    wrong = code(f"or {BITS} {small}, {large}")
    bits = code(f"bitcast {BITS} {code(f'and {BITS} <{used}>, {wrong}')} to i16")
    wide = code(f"fpext {F} {total_16} to {W}")
    before = code(f"load {W}, ptr %totals, align 8")
    code.do(f"br i1 {code(f'icmp eq i16 {bits}, 0')}, label %add, label %again", "again:")
    code.do(f"store {W} {wide}, ptr %wide, align 64")
    bits = code(f"zext i16 {bits} to i32")
    rest = "ptr %p, ptr %q, i64 %start, i64 %count, i64 %step"
    code.do(f"call void @repair(ptr %wide, i32 {bits}, i32 {_shift(a)}, {rest})")
    exact = code(f"load {W}, ptr %wide, align 64")
    code.do("br label %add", "add:")
    block = code(f"phi {W} [ {wide}, %sum.done ], [ {exact}, %again ]")
    code.do(f"store {W} {code.join(term, W, before, block)}, ptr %totals, align 8", "ret void", "}")
    return "\n".join(code.lines)


def _repair(term: Term) -> str:
    """Replace the sums whose bits are set by what float64 gives for this block."""
    code = Code()
    rest = "ptr %p, ptr %q, i64 %start, i64 %count, i64 %step"
    code.do(f"define internal void @repair(ptr %wide, i32 %bits, i32 %shift, {rest}) {{")
    code.do("entry:", "%offset = mul i64 %start, %step", "%sums = shl i32 1, %shift", "%low = sub i32 %sums, 1")
    code.do("br label %next", "next:")
    code.do("%left = phi i32 [ %bits, %entry ], [ %fewer, %next ]")
    k = code("call i32 @llvm.cttz.i32(i32 %left, i1 true)")
    x = _row(code, "%p", code(f"lshr i32 {k}, %shift"), "%start")
    y = _row(code, "%q", code(f"and i32 {k}, %low"), "%offset")
    total = code(f"call double @exact(ptr {x}, ptr {y}, i64 %count)")
    code.do(f"store double {total}, ptr {code(f'getelementptr double, ptr %wide, i32 {k}')}, align 8")
    code.do(f"%fewer = and i32 %left, {code('sub i32 %left, 1')}")
    code.do(f"br i1 {code('icmp eq i32 %fewer, 0')}, label %done, label %next", "done:", "ret void", "}")
    return "\n".join(code.lines)


def _exact(term: Term) -> str:
    """The sum of one pair and block in float64. Equal rows, which attackers send in dozens, only cost the comparison."""
    code = Code()
    code.do("define internal double @exact(ptr %x, ptr %y, i64 %count) {", "entry:", "%whole = and i64 %count, -16")

    def differ(x: list[str], acc: list[str]) -> list[str]:
        return [code(f"or {BITS} {acc[0]}, {code(f'fcmp une {F} {x[0]}, {x[1]}')}")]

    def step(x: list[str], acc: list[str]) -> list[str]:
        wide = [code(f"fpext {F} {value} to {W}") for value in x]
        return [code.term(term, W, wide[0], wide[1], acc[0])]

    (different,) = code.over_columns("compare", "entry", ["%x", "%y"], BITS, 1, differ)
    equal = code(f"icmp eq i16 {code(f'bitcast {BITS} {different} to i16')}, 0")
    code.do(f"br i1 {equal}, label %zero, label %wide", "zero:", "ret double 0.0", "wide:")
    sums = code.over_columns("sum", "wide", ["%x", "%y"], W, 1, step)
    code.do(f"ret double {code(f'extractelement {W} {code.tree(term, W, sums)}, i64 0')}", "}")
    return "\n".join(code.lines)


def _driver() -> str:
    """Segments, until none is left: in a span of columns, which stays in the cache meanwhile, all tiles block by block."""
    code = Code()
    code.do(f"define void @{jit.ENTRY}({', '.join(PARAMETERS)}) {{", "entry:", "br label %segment", "segment:")
    code.do("%s = atomicrmw add ptr %next, i64 1 monotonic")
    begin = code("mul i64 %s, %width")
    most = code(f"add i64 {begin}, %width")
    end = code(f"call i64 @llvm.smin.i64(i64 {most}, i64 %columns)")
    code.do(f"br i1 {code('icmp slt i64 %s, %segments')}, label %span, label %done", "span:")
    code.do(f"%from = phi i64 [ {begin}, %segment ], [ %to, %end_span ]")
    code.do("%to_most = add i64 %from, %span_width", f"%to = call i64 @llvm.smin.i64(i64 %to_most, i64 {end})")
    code.do("br label %tile", "tile:", "%t = phi i64 [ 0, %span ], [ %next_tile, %end_tile ]")
    part = code(f"add i64 %t, {code('mul i64 %tile_count, ' + code('sub i64 %s, %first'))}")
    code.do(f"%totals = getelementptr double, ptr %sums, i64 {code(f'mul i64 {part}, 16')}")
    entry = code(f"getelementptr i32, ptr %tiles, i64 {code('mul i64 %t, 3')}")
    shape, i, j = (code(f"load i32, ptr {code(f'getelementptr i32, ptr {entry}, i64 {k}')}, align 4") for k in range(3))
    p, q = (code(f"getelementptr ptr, ptr %rows, i32 {row}") for row in (i, j))
    code.do("br label %block", "block:", "%start = phi i64 [ %from, %tile ], [ %stop, %end_block ]")
    code.do(f"%stop_most = add i64 %start, {BLOCK}", "%stop = call i64 @llvm.smin.i64(i64 %stop_most, i64 %to)")
    code.do("%count = sub i64 %stop, %start")
    cases = " ".join(f"i32 {k}, label %shape{k}" for k in range(len(SHAPES)))
    code.do(f"switch i32 {shape}, label %done [ {cases} ]")
    for k in range(len(SHAPES)):
        arguments = f"ptr {p}, ptr {q}, i64 %start, i64 %count, i64 %step, ptr %totals"
        code.do(f"shape{k}:", f"call void @tile{k}({arguments})", "br label %end_block")
    code.do("end_block:")
    code.do(f"br i1 {code('icmp slt i64 %stop, %to')}, label %block, label %end_tile", "end_tile:")
    code.do("%next_tile = add i64 %t, 1", "%same_span = icmp slt i64 %next_tile, %tile_count")
    code.do("br i1 %same_span, label %tile, label %end_span", "end_span:")
    code.do(f"br i1 {code(f'icmp slt i64 %to, {end}')}, label %span, label %segment")
    code.do("done:", "ret void", "}", "declare i64 @llvm.smin.i64(i64, i64)")
    return "\n".join(code.lines)


def _row(code: Code, table: str, index: int | str, offset: str) -> str:
    pointer = code(f"load ptr, ptr {code(f'getelementptr ptr, ptr {table}, i32 {index}')}, align 8")
    return code(f"getelementptr float, ptr {pointer}, i64 {offset}")


def _splat(value: str) -> str:
    return f"<{', '.join([f'float {value}'] * 16)}>"


class Code:
    """LLVM IR under construction: calling it emits an instruction and gives the name of its result."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, instruction: str) -> str:
        self.lines.append(f"  %t{len(self.lines)} = {instruction}")
        return f"%t{len(self.lines) - 1}"

    def do(self, *lines: str) -> None:
        self.lines += [line if line.endswith((":", "{", "}")) else f"  {line}" for line in lines]

    def over_columns(
        self,
        label: str,
        before: str,
        rows: Sequence[str],
        kind: str,
        acc: int,
        body: Callable[[list[str], list[str]], list[str]],
    ) -> list[str]:
        """A loop over %count columns at the pointers `rows`, 16 at a time, the rest padded with zeros; entered from `before`.

        body(x, acc) emits one step from a vector of each row and the accumulators, which start as zero, and gives their new
        values. Left in the block `label`.done with the last ones.
        """
        names = [f"%{label}.acc{k}" for k in range(acc)]
        self.do(f"br label %{label}.head", f"{label}.head:")
        hole = len(self.lines)
        self.do(*[""] * (acc + 1))
        more = self(f"icmp slt i64 %{label}.w, %whole")
        self.do(f"br i1 {more}, label %{label}.body, label %{label}.rest", f"{label}.body:")
        at = [self(f"getelementptr float, ptr {row}, i64 %{label}.w") for row in rows]
        step = body([self(f"load {F}, ptr {pointer}, align 4") for pointer in at], names)
        following = self(f"add i64 %{label}.w, 16")
        self.do(f"br label %{label}.head")
        self.lines[hole] = f"  %{label}.w = phi i64 [ 0, %{before} ], [ {following}, %{label}.body ]"
        for k, (name, new) in enumerate(zip(names, step, strict=True)):
            self.lines[hole + 1 + k] = f"  {name} = phi {kind} [ zeroinitializer, %{before} ], [ {new}, %{label}.body ]"

        self.do(f"{label}.rest:")
        left = self(f"icmp slt i64 %{label}.w, %count")
        self.do(f"br i1 {left}, label %{label}.tail, label %{label}.done", f"{label}.tail:")
        one = self(f"insertelement <16 x i64> poison, i64 {self(f'sub i64 %count, %{label}.w')}, i64 0")
        splat = self(f"shufflevector <16 x i64> {one}, <16 x i64> poison, <16 x i32> zeroinitializer")
        mask = self(f"icmp ult <16 x i64> <{', '.join(f'i64 {k}' for k in range(16))}>, {splat}")
        at = [self(f"getelementptr float, ptr {row}, i64 %{label}.w") for row in rows]
        load = f"call {F} @llvm.masked.load.v16f32.p0(ptr {{}}, i32 4, {BITS} {mask}, {F} zeroinitializer)"
        last = body([self(load.format(pointer)) for pointer in at], names)
        self.do(f"br label %{label}.done", f"{label}.done:")
        return [
            self(f"phi {kind} [ {name}, %{label}.rest ], [ {new}, %{label}.tail ]")
            for name, new in zip(names, last, strict=True)
        ]

    def term(self, term: Term, kind: str, x: str, y: str, acc: str) -> str:
        """acc joined with |x - y| or its square."""
        suffix = "v16f32" if kind == F else "v16f64"
        difference = self(f"fsub {kind} {x}, {y}")
        if term == "squares":
            return self(f"call {kind} @llvm.fma.{suffix}({kind} {difference}, {kind} {difference}, {kind} {acc})")
        return self.join(term, kind, acc, self(f"call {kind} @llvm.fabs.{suffix}({kind} {difference})"))

    def join(self, term: Term, kind: str, a: str, b: str) -> str:
        if term != "largest":
            return self(f"fadd {kind} {a}, {b}")
        return self(f"select {BITS} {self(f'fcmp ogt {kind} {a}, {b}')}, {kind} {a}, {kind} {b}")

    def tree(self, term: Term, kind: str, vectors: Sequence[str]) -> str:
        """Each vector's lanes joined: lane l with l + 8, then l + 4, 2, 1. Vector k's result in lane k if there are 16."""
        vectors = list(vectors)
        for half in (8, 4, 2, 1):
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0],) * 2]
            low = [lane for lane in range(32) if not lane & half]
            halves = [
                [
                    self(
                        f"shufflevector {kind} {a}, {kind} {b}, "
                        f"<16 x i32> <{', '.join(f'i32 {lane + shift}' for lane in low)}>"
                    )
                    for shift in (0, half)
                ]
                for a, b in pairs
            ]
            vectors = [self.join(term, kind, *both) for both in halves]
        return vectors[0]
