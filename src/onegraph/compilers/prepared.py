"""Inductor's wrapper in two parts: what follows from sizes alone, done once for a size, and what is left for each call.

Takes the wrapper's text. Gives the text of functions that stand in the same module:

- `scratch_layouts(sizes)`, `results_layouts(sizes)`: the buffers that the piece needs, as (size, stride, dtype);
- `scratch(buffers, sizes)`, `results(buffers, sizes)`: those buffers and all views of them that a call uses;
- `check(args, sizes)`: Inductor's checks of what it is given;
- `run(scratch, results, args)`: the kernels' calls. It allocates nothing, but where an op gives new memory itself.

Which buffers can be reused between calls is read from the text: one that goes to anything but a kernel, which neither
keeps nor returns it, is allocated in each call as before. So is everything in a form that isn't known here.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from onegraph.compilers.wrapper import OWN_OPS
from onegraph.ir.artifact import BufferUse, SizeSource

_SIZE_NAME = re.compile(r"[su]\d+")
_ASKED = {"": "", "size()": ".shape", "stride()": ".stride()"}
_PURE = ("max", "min", "int")
"""What an expression of sizes may call."""


@dataclass
class Buffer:
    """Memory that a piece allocates: `first` and `last` are the statements between which it is used."""

    name: str
    layout: str
    """`(size), (stride), dtype`: expressions over sizes."""
    first: int
    last: int
    is_result: bool = False

    def use(self) -> BufferUse:
        return BufferUse(self.name, self.layout, self.first, self.last)


@dataclass(frozen=True)
class Prepared:
    """The text, and what is known of it.

    `sizes` are where the sizes called `size_names` come from; `kept_inputs` those that may be returned, or kept
    by what they are given to.
    """

    source: str
    sizes: tuple[SizeSource, ...]
    size_names: tuple[str, ...]
    kept_inputs: frozenset[int]
    scratch: tuple[BufferUse, ...]
    results: tuple[BufferUse, ...]
    outputs: tuple[tuple[int, int] | None, ...]
    """For each output the result that it shows, and its place in what `results` returns; or None."""
    lines: tuple[int, ...]
    """For each line of the text the wrapper's line that it was made of; 0 where it isn't made of one."""


def prepare(source: str) -> Prepared | None:
    """None for a wrapper in a form that this version doesn't know."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    returned = functions[0].body[-1] if len(functions) == 1 else None
    if not isinstance(returned, ast.Return) or not isinstance(returned.value, ast.Tuple):
        return None
    kernels = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("kernels[")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    analysis = _Analysis(functions[0].body, kernels)
    return None if analysis.inputs is None else _Printer(analysis).printed()


@dataclass
class _Analysis:
    """What each name of the wrapper's `call` stands for.

    `roots` has the buffer or input whose memory a name shows, `sizes` the names of whole numbers; `unplanned` are roots
    that something else than a kernel is given.
    """

    body: list[ast.stmt]
    kernels: set[str]
    inputs: list[str] | None = None
    size_sources: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name of a size -> the input, and what is asked of it: nothing, or `.shape[0]`."""
    tuples: dict[str, tuple[int, str]] = field(default_factory=dict)
    sizes: set[str] = field(default_factory=set)
    roots: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    unplanned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        stored = Counter(name for statement in self.body for name in _names(statement, ast.Store))
        for number, statement in enumerate(self.body):
            self._read(number, statement)
            again = {name for name in _names(statement, ast.Store) if stored[name] > 1}
            self.unplanned |= {self.roots[name] for name in again if name in self.roots}
        self.unplanned -= self.sizes

    def _read(self, number: int, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Delete):
            return
        for name in _names(statement, ast.Load):
            if (buffer := self.buffers.get(self.roots.get(name, ""))) is not None:
                buffer.last = number
        for node in ast.walk(statement):  # a view whose size is found in the call
            if isinstance(node, ast.Call) and _viewed(node) and not all(map(self.follows_from_sizes, node.args[1:])):
                self._give_up(node)
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._read_assignment(number, statement.targets[0], statement.value)
        elif isinstance(statement, ast.Return):
            for name in _names(statement, ast.Load):
                if (root := self.roots.get(name)) is not None:
                    if root in self.buffers:
                        self.buffers[root].is_result = True
                    else:
                        self.unplanned.add(root)
        elif not (self.is_check(statement) or self.is_kernel_call(statement)):
            self._give_up(statement)

    def _read_assignment(self, number: int, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Name) and value.id == "args":
            self.inputs = [element.id for element in target.elts if isinstance(element, ast.Name)]
            self.roots.update({name: name for name in self.inputs})
            return
        if not isinstance(target, ast.Name):
            return self._give_up(value)
        called = ast.unparse(value.func) if isinstance(value, ast.Call) else None
        shown = _viewed(value)
        source = self._size_source(value)
        if source is not None and source[1] in (".shape", ".stride()"):
            self.tuples[target.id] = source
        elif source is not None and _SIZE_NAME.fullmatch(target.id):
            self.size_sources[target.id] = source
            self.sizes |= {target.id} if source[1] else {target.id, ast.unparse(value)}
        elif shown is not None and shown in self.roots:
            self.roots[target.id] = self.roots[shown]
        elif called == "empty_strided_cpu" and self.follows_from_sizes(value):
            layout = ", ".join(map(ast.unparse, value.args))  # type: ignore[attr-defined]
            self.roots[target.id] = target.id
            self.buffers[target.id] = Buffer(target.id, layout, number, number)
        elif called is None and self.follows_from_sizes(value) and not isinstance(value, ast.Constant):
            self.sizes.add(target.id)
        else:
            self._give_up(value)

    def _size_source(self, value: ast.expr) -> tuple[int, str] | None:
        """The input that a number or a tuple of sizes comes from: `arg1_1`, `arg2_1.size()`, `arg2_1_size[0]`."""
        if isinstance(value, ast.Subscript) and ast.unparse(value.value) in self.tuples:
            index, asked = self.tuples[ast.unparse(value.value)]
            return index, f"{asked}[{ast.unparse(value.slice)}]"
        name, _, asked = ast.unparse(value).partition(".")
        if name in (self.inputs or ()) and asked in _ASKED:
            return (self.inputs or []).index(name), _ASKED[asked]
        return None

    def _give_up(self, node: ast.AST) -> None:
        self.unplanned |= {self.roots[name] for name in _names(node, ast.Load) if name in self.roots}

    def follows_from_sizes(self, value: ast.AST) -> bool:
        """Whether an expression has the same value in each call with the same sizes."""
        calls = [node for node in ast.walk(value) if isinstance(node, ast.Call) and node is not value]
        known = {*self.sizes, *_PURE, "empty_strided_cpu", "torch"}
        return set(_names(value, ast.Load)) <= known and all(ast.unparse(call.func) in _PURE for call in calls)

    def is_check(self, statement: ast.stmt) -> bool:
        """Whether it only raises, for sizes or for an input's strides."""
        if isinstance(statement, ast.If) and not statement.orelse:
            return all(isinstance(one, ast.Raise) for one in statement.body) and self.follows_from_sizes(statement.test)
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], ast.Name):
            return False
        is_known = call.args[0].id in (self.inputs or ()) and all(map(self.follows_from_sizes, call.args[1:]))
        return is_known and ast.unparse(call.func) in ("assert_size_stride", "assert_alignment")

    def is_kernel_call(self, statement: ast.stmt) -> bool:
        """Whether it calls a kernel, with names and views of them, for what the kernel writes."""
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call):
            return False
        called = ast.unparse(call.func)
        if called == "args.clear":
            return True
        if called.startswith(("extern_kernels.", f"{OWN_OPS}.")):
            return any(keyword.arg == "out" for keyword in call.keywords)
        return called in self.kernels

    def is_planned(self, name: str) -> bool:
        """Whether a name shows memory that can be the same in each call."""
        root = self.roots.get(name)
        return root in self.buffers and root not in self.unplanned


class _Printer(ast.NodeTransformer):
    """Prints the functions; views of planned buffers inside of calls get names of their own."""

    def __init__(self, analysis: _Analysis) -> None:
        self.known = analysis
        self.lines: dict[bool, list[str]] = {False: [], True: []}
        """Of `scratch` and of `results`."""
        self.views: dict[str, str] = {}
        self.used: dict[str, None] = {}

    def printed(self) -> Prepared:
        known = self.known
        rest: list[ast.stmt] = []
        checks: list[str] = []
        computed: list[str] = []
        loaded = {name for statement in known.body for name in _names(statement, ast.Load)}
        for statement in known.body:
            if isinstance(statement, ast.Assign):
                target = statement.targets[0]
                if isinstance(target, ast.Name) and known.is_planned(target.id):
                    if known.roots[target.id] != target.id:
                        self._line(target.id).append(f"{target.id} = {ast.unparse(statement.value)}")
                    continue
                if isinstance(target, ast.Name) and target.id in known.sizes - known.size_sources.keys():
                    computed.append(ast.unparse(statement))
                elif isinstance(statement.value, ast.Constant) and not loaded & set(_names(statement, ast.Store)):
                    continue  # Inductor's name for a check
            if known.is_check(statement):
                checks += ast.unparse(statement).splitlines()
            elif isinstance(statement, ast.Delete):
                targets = [one for one in statement.targets if not known.is_planned(ast.unparse(one))]
                rest += [ast.Delete(targets)] if targets else []
            else:
                rest.append(self.visit(statement))
        return self._prepared(rest, checks, computed)

    def _line(self, name: str) -> list[str]:
        return self.lines[self.known.buffers[self.known.roots[name]].is_result]

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if self.known.is_planned(node.id):
            self.used[node.id] = None
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        shown = _viewed(node)
        if shown is None or not self.known.is_planned(shown):
            self.generic_visit(node)
            return node
        text = ast.unparse(node)
        if text not in self.views:
            self.views[text] = f"view{len(self.views)}"
            self._line(shown).append(f"{self.views[text]} = {text}")
            self.known.roots[self.views[text]] = self.known.roots[shown]
        return self.visit_Name(ast.Name(self.views[text], ast.Load()))

    def _prepared(self, rest: list[ast.stmt], checks: list[str], computed: list[str]) -> Prepared:
        known = self.known
        planned = [buffer for name, buffer in known.buffers.items() if known.is_planned(name)]
        scratch = tuple(buffer for buffer in planned if not buffer.is_result)
        results = tuple(buffer for buffer in planned if buffer.is_result)
        sizes = "".join(f", {name}" for name in known.size_sources)
        text: list[str] = []
        for name, buffers, lines in (("scratch", scratch, self.lines[False]), ("results", results, self.lines[True])):
            layouts = [f"    ({buffer.layout})," for buffer in buffers]
            text += [f"def {name}_layouts({sizes[2:]}):", *_indented([*computed, "return [", *layouts, "]"])]
            taken = _tuple([buffer.name for buffer in buffers])
            given = _tuple(self._of(buffers))
            text += [
                f"def {name}(buffers{sizes}):",
                *_indented([*computed, *([f"{taken} = buffers"] if buffers else []), *lines, f"return {given}"]),
            ]
        inputs = _tuple(known.inputs or [])
        text += [f"def check(args{sizes}):", *_indented([f"{inputs} = args", *computed, *checks])]
        numbers = [0] * (sum(line.count("\n") + 1 for line in text) + 1)
        groups = (("scratch", self._of(scratch)), ("results", self._of(results)))
        body = [f"{_tuple(names)} = {group}" for group, names in groups if names]
        numbers += [0] * len(body)
        for statement in rest:
            number = getattr(statement, "lineno", numbers[-1])
            body += ast.unparse(ast.fix_missing_locations(statement)).splitlines()
            numbers += [number] * (len(body) + len(text) + 1 - len(numbers))
        text += ["def run(scratch, results, args):", *_indented(body)]
        return Prepared(
            source="\n".join(text) + "\n",
            sizes=tuple(SizeSource(*source) for source in known.size_sources.values()),
            size_names=tuple(known.size_sources),
            kept_inputs=frozenset(i for i, name in enumerate(known.inputs or ()) if name in known.unplanned),
            scratch=tuple(buffer.use() for buffer in scratch),
            results=tuple(buffer.use() for buffer in results),
            outputs=tuple(self._shown(rest[-1], results)),
            lines=tuple(numbers),
        )

    def _of(self, buffers: tuple[Buffer, ...]) -> list[str]:
        """The names of a group of buffers, and of their views, that calls use."""
        names = {buffer.name for buffer in buffers}
        return [name for name in self.used if self.known.roots[name] in names]

    def _shown(self, returned: ast.stmt, results: tuple[Buffer, ...]) -> Iterator[tuple[int, int] | None]:
        """For each output the result that it shows, and its place among the views."""
        numbers = {buffer.name: number for number, buffer in enumerate(results)}
        views = self._of(results)
        assert isinstance(returned, ast.Return) and isinstance(returned.value, ast.Tuple)
        for element in returned.value.elts:
            name = element.id if isinstance(element, ast.Name) else ""
            number = numbers.get(self.known.roots.get(name, ""))
            yield None if number is None else (number, views.index(name))


def _viewed(value: ast.AST) -> str | None:
    """The name whose memory an expression shows: `buf0`, `reinterpret_tensor(buf0, …)`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "reinterpret_tensor" and value.args:
        value = value.args[0]
    return value.id if isinstance(value, ast.Name) else None


def _names(node: ast.AST, context: type[ast.expr_context]) -> list[str]:
    return [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, context)]


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
