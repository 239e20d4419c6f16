"""Models drawn at random from named constructs, as source text: what the property of capture is tested on.

Takes a seed; gives a Case: the constructs that it is made of, the declared ranges, and a sequence of calls with
changes of the world between them. `Case.source` is a whole Python file with the model, its dynamic shapes, and
its arguments for each call, so that the same model can be made twice, with globals and closures of its own.

The hidden state `h` has shape [n, 4]; each part works on it and may leave further results in `outs`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

NARROWS = frozenset({"ConstraintError"})
BREAKS = frozenset({"CaptureError"})
CONTRACT = frozenset({"InputContractError"})


@dataclass(frozen=True)
class Part:
    """One construct in one model, as text. `#` stands for its number, which keeps the names of parts apart.

    `allowed` names the errors with which a call may be refused because of this part. `changes` are statements
    on the world (`model`, globals, environment) that may run between calls.
    """

    construct: str = ""
    body: str = ""
    init: str = ""
    before: str = ""
    parameter: str = ""
    argument: str = ""
    dims: str = ""
    changes: tuple[str, ...] = ()
    allowed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call: its sizes, the statements that run before it, and whether x is given by position."""

    n: int
    m: int
    changes: tuple[str, ...] = ()
    positional: bool = False


@dataclass(frozen=True)
class Case:
    """A drawn program. `ranges` are (min, max) of n and m; `options` are fields of CompilationConfig."""

    seed: int
    parts: tuple[tuple[int, Part], ...]
    ranges: tuple[tuple[int, int], tuple[int, int]]
    calls: tuple[Call, ...]
    kind: str = "module"
    result: str = "dict"
    context: str = "torch.enable_grad()"
    decorator: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def constructs(self) -> frozenset[str]:
        return frozenset(part.construct for _, part in self.parts)

    @property
    def uses_m(self) -> bool:
        return any("M" in part.dims for _, part in self.parts)

    def in_range(self, call: Call) -> bool:
        sizes = (call.n, call.m) if self.uses_m else (call.n,)
        return all(low <= size <= high for size, (low, high) in zip(sizes, self.ranges, strict=False))

    def source(self) -> str:
        """The Python file of the case, up to its calls."""

        def texts(name: str) -> list[str]:
            found = [(number, getattr(part, name)) for number, part in self.parts]
            return [text.replace("#", str(number)) for number, text in found if text]

        (n_min, n_max), (m_min, m_max) = self.ranges
        given = [(part.parameter.replace("#", str(number)), part) for number, part in self.parts if part.parameter]
        keyword_only = [text[len("*, ") :] for text, _ in given if text.startswith("*, ")]
        parameters = [text for text, _ in sorted(given, key=lambda pair: "=" in pair[0]) if not text.startswith("*, ")]
        signature = ", ".join(["x", *parameters, *(["*", *keyword_only] if keyword_only else [])])
        names = [text.removeprefix("*, ").partition("=")[0] for text, _ in given]
        by_name = [(name, part) for name, (_, part) in zip(names, given, strict=True)]
        arguments = ", ".join(["'x': rand(n, 4)", *(f"{name!r}: {part.argument}" for name, part in by_name)])
        dims = ", ".join(["'x': {0: N}", *(f"{name!r}: {part.dims}" for name, part in by_name if part.dims)])
        results = {"dict": "outs", "tuple": "tuple(outs.values())", "dataclass": "Result(h, outs)"}
        targets = {"module": "model", "method": "model.forward", "function": "run"}
        body = "\n".join(texts("body")) or "pass"
        return "\n".join(
            [
                PRELUDE,
                f'N = Dim("n", min={n_min}, max={n_max})',
                f'M = Dim("m", min={m_min}, max={m_max})',
                *texts("before"),
                "",
                "class Model(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                textwrap.indent("\n".join(texts("init")), " " * 8),
                "",
                *([f"    {self.decorator}"] if self.decorator else []),
                f"    def forward(self, {signature}):",
                "        h, n, outs = x, x.shape[0], {}",
                textwrap.indent(body, " " * 8),
                '        outs["h"] = h',
                f"        return {results[self.result]}",
                "",
                "torch.manual_seed(0)",
                "model = Model()",
                f"def run({signature}):",
                f"    return model({', '.join(f'{a}={a}' for a in ['x', *names])})",
                f"target = {targets[self.kind]}",
                f"dynamic_shapes = {{{dims}}}",
                "def arguments(n, m, call):",
                "    rand = Rand(call)",
                f"    return {{{arguments}}}",
                "",
            ]
        )

    def program(self, backend: str) -> str:
        """The whole case as a program that fails where the property fails."""
        lines = [
            self.source(),
            "# ---- the calls, once compiled; compare with `target` of a second copy of this file",
            "import onegraph",
            f"compiled = onegraph.compile(target, dynamic_shapes=dynamic_shapes, "
            f"config={{'backend': {backend!r}, **{self.options!r}}})",
        ]
        for index, call in enumerate(self.calls):
            lines += call.changes
            lines += [
                f"with {self.context}:",
                f"    print({index}, compiled(**arguments({call.n}, {call.m}, {index})))",
            ]
        return "\n".join(lines)


PRELUDE = '''\
import collections, dataclasses, functools, math, os, random, types
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

class Rand:
    """Random values that depend on the number of the call alone."""
    def __init__(self, call):
        self.generator = torch.Generator().manual_seed(100 + call)
    def __call__(self, *shape):
        return torch.randn(*shape, generator=self.generator)

@dataclasses.dataclass
class Result:
    h: torch.Tensor
    outs: dict

@dataclasses.dataclass
class Batch:
    ids: torch.Tensor
    note: str
    more: list

Pair = collections.namedtuple("Pair", ["left", "right"])

def handed_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

def of_a_module(function):
    @functools.wraps(function)
    def wrapper(self, *rest, **named):
        return function(self, *rest, **named)
    return wrapper
'''

Draw = Callable[[Random, tuple[int, int]], Part]


def _body(*lines: str, allowed: frozenset[str] = frozenset()) -> Part:
    return Part(body="\n".join(lines), allowed=allowed)


def branch_on_size(r: Random, ranges: tuple[int, int]) -> Part:
    low, high = ranges
    bound = r.randint(max(low - 1, 0), high + 1)
    test = r.choice([f"n > {bound}", f"n < {bound}", f"n == {bound}", f"n != {bound}", f"not n >= {bound}"])
    return _body(f"h = h * 2 if {test} else h + 1", allowed=NARROWS)


def divisibility_branch(r: Random, ranges: tuple[int, int]) -> Part:
    k = r.choice([2, 3, 4, 8])
    test = r.choice([f"n % {k} == 0", f"n // {k} == 1", f"(n * 4) % {4 * k}", f"(n + 1) % {k} != 1"])
    return _body(f"if {test}:", "    h = h + 3", "else:", "    h = h * 0.5", allowed=NARROWS)


def view_or_reshape(r: Random, ranges: tuple[int, int]) -> Part:
    return r.choice(
        [
            _body("outs['flat_#'] = h.reshape(-1) * 2"),
            _body("h = h.reshape(n, 2, 2).transpose(1, 2).reshape(n, 4)"),
            _body("h = h.unflatten(1, (2, 2)).flip(2).flatten(1)"),
            _body("h = (h.t().contiguous() * 2).t()"),
            _body("outs['three_#'] = h.reshape(n * 2, 2).sum(1).reshape(n, 2)"),
            _body("outs['pairs_#'] = h.reshape(-1, 2, 4).sum(1)", allowed=NARROWS),
            _body("outs['eights_#'] = h.reshape(-1, 8) + 1", allowed=NARROWS),
            _body("outs['fours_#'] = h.reshape(2, -1).sum(1)", allowed=NARROWS),
        ]
    )


def sort_or_topk(r: Random, ranges: tuple[int, int]) -> Part:
    return r.choice(
        [
            _body("outs['sorted_#'] = h.sort(dim=0, stable=True).values"),
            _body("outs['order_#'] = h.argsort(dim=0, stable=True, descending=True)"),
            _body("h = h.sort(dim=1).values"),
            _body("outs['top_#'] = h.topk(2, dim=1).values"),
            _body("outs['some_#'] = h.topk(min(n, 2), dim=0).values", allowed=NARROWS),
            _body("outs['two_#'] = h.topk(2, dim=0).values", allowed=NARROWS | BREAKS),
            _body("outs['sums_#'] = h.cumsum(0)"),
        ]
    )


def nested_inputs(r: Random, ranges: tuple[int, int]) -> Part:
    parameter, argument, dims, read = r.choice(
        [
            ("d#", "{'a': rand(n, 4), 'b': {'c': [rand(n)]}}", "{'a': {0: N}, 'b': {'c': [{0: N}]}}",
             "d#['a'] + d#['b']['c'][0][:, None]"),
            ("t#", "(rand(n, 4), (rand(4), None))", "({0: N}, (None, None))", "t#[0] * t#[1][0]"),
            ("b#", "Batch(rand(n, 4), 'twice', [rand(n, 1)])", "{'ids': {0: N}, 'more': [{0: N}]}",
             "b#.ids * (2 if b#.note == 'twice' else 3) + b#.more[0]"),
            ("p#", "Pair(rand(n, 4), rand(1, 4))", "({0: N}, None)", "p#.left - p#.right"),
            ("l#", "[{'k': rand(n, 4)}, rand(n, 4)]", "[{'k': {0: N}}, {0: N}]", "l#[0]['k'] * l#[1]"),
        ]
    )  # fmt: skip
    return Part(parameter=parameter, argument=argument, dims=dims, body=f"h = h + ({read})")


def two_symbols(r: Random, ranges: tuple[int, int]) -> Part:
    body, allowed = r.choice(
        [
            ("h = h + y#.sum(0)", frozenset()),
            ("outs['scores_#'] = h @ y#.t()", frozenset()),
            ("outs['both_#'] = torch.cat([h, y#])", frozenset()),
            ("outs['outer_#'] = h[:, None, 0] * y#[None, :, 1]", frozenset()),
            ("outs['sum_#'] = h + y#", NARROWS | BREAKS),
            ("h = h * 2 if n == y#.shape[0] else h * 3", NARROWS),
            ("h = h * 2 if n < y#.shape[0] else h * 3", NARROWS),
            ("outs['rows_#'] = torch.cat([h, y#]).reshape(y#.shape[0] + n, 2, 2).sum(2)", frozenset()),
        ]
    )
    return Part(parameter="y#", argument="rand(m, 4)", dims="{0: M}", body=body, allowed=allowed)


def attribute_read(r: Random, ranges: tuple[int, int]) -> Part:
    init, body, changes = r.choice(
        [
            ("self.scale_# = 2.0", "h = h * self.scale_#", ("model.scale_# = 3.0", "model.scale_# = -1.5")),
            ("self.kind_# = 1", "outs['kind_#'] = torch.arange(n) * self.kind_#",
             ("model.kind_# = 1.0", "model.kind_# = True", "model.kind_# = 2")),
            ("self.mode_# = 'a'", "h = h + 1 if self.mode_# == 'a' else h - 1", ("model.mode_# = 'b'",)),
            ("self.cfg_# = {'scale': 2.0}", "h = h * self.cfg_#['scale']",
             ("model.cfg_#['scale'] = 4.0", "model.cfg_# = {'scale': 5.0}")),
            ("self.list_# = [1.0, 2.0]", "for v in self.list_#:\n    h = h + v",
             ("model.list_#.append(3.0)", "model.list_#[0] = 7.0")),
            ("self.ns_# = types.SimpleNamespace(k=2.0)", "h = h * self.ns_#.k", ("model.ns_#.k = 6.0",)),
            ("", "h = h * 2 if hasattr(self, 'extra_#') else h * 3", ("model.extra_# = 1",)),
            ("type(self).factor_# = 2.0", "h = h * self.factor_#",
             ("Model.factor_# = 3.0", "model.factor_# = 9.0")),
            ("self.limit_# = 2", "outs['some_#'] = h[:, : self.limit_#]", ("model.limit_# = 3",)),
            ("self.tensors_# = [torch.ones(4)]", "h = h * self.tensors_#[0]",
             ("model.tensors_#[0] = torch.full((4,), 3.0)", "model.tensors_# = [torch.full((4,), 4.0)]")),
            ("self.tensor_# = torch.ones(4)", "h = h * self.tensor_#",
             ("model.tensor_# = torch.full((4,), 3.0)", "model.tensor_# = torch.full((1,), 2.0)",
              "model.tensor_# = torch.ones(4, dtype=torch.float64)")),
            ("self.flag_# = True", "h = h * 2 if self.flag_# else h", ("model.flag_# = False", "model.flag_# = None")),
        ]
    )  # fmt: skip
    allowed = CONTRACT if "tensor" in init else frozenset()  # a weight of another shape or dtype may be refused
    return Part(init=init, body=body, changes=changes, allowed=allowed)


def global_state(r: Random, ranges: tuple[int, int]) -> Part:
    before, body, changes = r.choice(
        [
            ("SCALE_# = 2.0", "h = h * SCALE_#", ("SCALE_# = 3.0",)),
            ("CONFIG_# = {'scale': 2.0, 'other': 1}", "h = h * CONFIG_#['scale']", ("CONFIG_#['scale'] = 3.0",)),
            ("NAMES_# = ['a', 'b']", "h = h + len(NAMES_#)", ("NAMES_#.append('c')", "NAMES_# = []")),
            ("BIAS_# = torch.ones(4)", "h = h + BIAS_#", ("BIAS_#.mul_(3)", "BIAS_# = torch.full((4,), 5.0)")),
            ("class Settings_#:\n    gain = 2.0", "h = h * Settings_#.gain", ("Settings_#.gain = 4.0",)),
        ]
    )
    return Part(before=before, body=body, changes=changes)


def closure_cell(r: Random, ranges: tuple[int, int]) -> Part:
    first, second = r.choice([("1.0", "2.5"), ("True", "False"), ("torch.ones(4)", "torch.full((4,), 3.0)")])
    before = f"""\
def make_#():
    held = {first}
    def add(h):
        return h + held
    def put(value):
        nonlocal held
        held = value
    return add, put
add_#, put_# = make_#()"""
    return Part(before=before, body="h = add_#(h)", changes=(f"put_#({second})",))


def environment_read(r: Random, ranges: tuple[int, int]) -> Part:
    read = r.choice(["os.environ.get('DRAWN_#', '1')", "os.getenv('DRAWN_#', '1')", "os.environ['DRAWN_#']"])
    return Part(
        before="os.environ['DRAWN_#'] = '2'",
        body=f"h = h * float({read})",
        changes=("os.environ['DRAWN_#'] = '3'", "os.environ['DRAWN_#'] = '5'"),
        allowed=BREAKS,
    )


def folded_call(r: Random, ranges: tuple[int, int]) -> Part:
    return r.choice(
        [
            Part(
                before="FACTOR_# = 2.0\n@functools.lru_cache\ndef cached_#():\n    return FACTOR_#",
                body="h = h * cached_#()",
                changes=("FACTOR_# = 3.0; cached_#.cache_clear()",),
                allowed=BREAKS,
            ),
            Part(
                before="@functools.lru_cache\ndef scale_#(n):\n    return 1.0 / (n + 1)",
                body="h = h * scale_#(n)",
                allowed=NARROWS | BREAKS,
            ),
            Part(body="h = h * math.sqrt(h.shape[1]) + math.pi"),
            Part(
                before="def cutoff_#(k=2.0):\n    return math.floor(k * 3)",
                body="h = h + cutoff_#()",
                changes=("cutoff_#.__defaults__ = (4.0,)",),
            ),
        ]
    )


def table_by_size(r: Random, ranges: tuple[int, int]) -> Part:
    size = ranges[1] + 2
    read = r.choice(
        ["TABLE_#[n]", "TABLE_#[n // 2]", "int(math.log2(n + 1))", "BY_SIZE_#.get(n, 0.5)", "(n).bit_length()"]
    )
    before = f"TABLE_# = [float(i % 5) for i in range({size})]\nBY_SIZE_# = {{1: 2.0, 2: 3.0}}"
    return Part(before=before, body=f"h = h + {read}", allowed=NARROWS | BREAKS)


def buffer_mutation(r: Random, ranges: tuple[int, int]) -> Part:
    body = r.choice(
        [
            "self.total_#.add_(h.sum(0))",
            "self.total_# = self.total_# + h.sum(0)",
            "self.total_#[1:3] += 1\nh = h + self.total_#",
            "h = h + self.total_#\nself.total_#.mul_(0.5)",
            "self.total_#.copy_(h.amax(1).sum())",
            "self.total_# += 1\nouts['total_#'] = self.total_# * 2",
        ]
    )
    return Part(init="self.register_buffer('total_#', torch.ones(4))", body=body, changes=("model.total_#.fill_(2.0)",))


def input_mutation(r: Random, ranges: tuple[int, int]) -> Part:
    rows = ranges[1] + 3
    argument, dims, body = r.choice(
        [
            ("[torch.zeros(4), torch.ones(4)]", "", "w#[0].add_(h.sum(0))"),
            (f"[torch.zeros({rows}, 4), torch.arange(n)]", "[None, {0: N}]", "w#[0].index_copy_(0, w#[1], h)"),
            (f"[torch.zeros({rows}, 4), torch.arange(n) + 1]", "[None, {0: N}]",
             "w#[0].view(-1)[w#[1] * 4] = h[:, 0]"),
            (f"[torch.zeros(2, {rows}, 4), torch.arange(n)]", "[None, {0: N}]", "w#[0][1][w#[1]] = h"),
            ("[rand(n, 4)]", "[{0: N}]", "w#[0].mul_(2)\nh = h + w#[0]"),
            ("[rand(n, 4)]", "[{0: N}]", "h = h + w#[0]\nw#[0][:, 1] = h[:, 0]"),
        ]
    )  # fmt: skip
    return Part(parameter="w#", argument=argument, dims=dims, body=body)


def output_aliasing(r: Random, ranges: tuple[int, int]) -> Part:
    body = r.choice(
        [
            "outs['same_#'] = x",
            "outs['flat_#'] = x.view(-1)",
            "outs['column_#'] = x[:, 1]",
            "h = h * 1\nouts['view_#'] = h.view(n, 2, 2)",
            "outs['kept_#'] = self.kept_#",
            "outs['kept_#'] = self.kept_#[1:]",
            "outs['twice_#'] = (h, h)",
            "outs['detached_#'] = x.detach()",
            "outs['unchanged_#'] = h + torch.zeros(n, 4)\nouts['ones_#'] = x * torch.ones(n, 4)",
        ]
    )
    return Part(init="self.register_buffer('kept_#', torch.arange(4.0))", body=body)


def random_op(r: Random, ranges: tuple[int, int]) -> Part:
    body = r.choice(
        [
            "h = h + torch.rand_like(h)",
            "h = h + torch.randn(4)",
            "h = F.dropout(h, 0.5, training=True)",
            "outs['coins_#'] = torch.bernoulli(h.sigmoid())",
            "outs['drawn_#'] = torch.randint(0, 10, (n,))",
            "outs['normal_#'] = torch.empty(n).normal_()",
        ]
    )
    return _body(body, allowed=BREAKS)


def python_random(r: Random, ranges: tuple[int, int]) -> Part:
    return _body(r.choice(["h = h * random.random()", "h = h + random.randint(1, 9)"]), allowed=BREAKS)


def optional_argument(r: Random, ranges: tuple[int, int]) -> Part:
    parameter, argument, dims, body, allowed = r.choice(
        [
            ("o#=None", "None", "", "h = h if o# is None else h + o#", frozenset()),
            ("o#=None", "rand(n, 4)", "{0: N}", "h = h if o# is None else h + o#", frozenset()),
            ("o#=None", "rand(n, 4) if call % 2 else None", "", "h = h if o# is None else h + o#",
             CONTRACT | {"ConfigError", "ConstraintError"}),
            ("*, o#=2.0", "2.0", "", "h = h * o#", frozenset()),
            ("*, o#=2.0", "2.0 + call // 2", "", "h = h * o#", CONTRACT),
            ("*, o#='a'", "'ab'[call % 2]", "", "h = h + 1 if o# == 'a' else h", CONTRACT),
            ("*, o#=1", "[1, True, 1.0][call % 3]", "", "outs['o_#'] = torch.arange(n) * o#", CONTRACT),
            ("*, o#=0.0", "[0.0, -0.0][call % 2]", "",
             "outs['o_#'] = torch.copysign(torch.ones(4), torch.full((4,), o#))", CONTRACT),
        ]
    )  # fmt: skip
    return Part(parameter=parameter, argument=argument, dims=dims, body=body, allowed=allowed)


def odd_tensor(r: Random, ranges: tuple[int, int]) -> Part:
    """An argument that changes its dtype, layout or rank between calls."""
    odd = r.choice(
        [
            "rand(n, 4).double()", "rand(4, n).t()", "rand(1, 4).expand(n, 4)", "rand(n, 8)[:, ::2]", "rand(n, 1)",
            "rand(n, 4).requires_grad_()", "rand(n * 4 + 1)[1:].view(n, 4)", "rand(n + 1, 4)", "rand(n)[:, None]",
            "torch._neg_view(rand(n, 4))", "rand(n, 4).to(torch.int32)", "nn.Parameter(rand(n, 4), False)",
        ]
    )  # fmt: skip
    when = "call == 0" if r.random() < 0.3 else "call > 1"
    return Part(
        parameter="q#",
        argument=f"{odd} if {when} else rand(n, 4)",
        dims="{0: N}",
        body="outs['q_#'] = q# * 2 + 1",
        allowed=CONTRACT | BREAKS | {"ConfigError", "ShapeOutOfRangeError"},
    )


def slice_by_size(r: Random, ranges: tuple[int, int]) -> Part:
    part = r.choice(
        ["h[: n // 2]", "h[-3:]", "h[n - 1 :]", "h[:5]", "h[1:]", "h[n // 2 :] * 2", "h.narrow(0, 0, n // 2)", "h[::2]",
         "torch.arange(n + 1)[1:]", "torch.zeros(n + 2, 4)[2:] + h", "h[:, : min(n, 3)]", "h[-1:]"]
    )  # fmt: skip
    return _body(f"outs['slice_#'] = {part}", allowed=NARROWS)


def where(r: Random, ranges: tuple[int, int]) -> Part:
    k = r.randint(1, 4)
    body = r.choice(
        [
            "h = torch.where(h > 0, h, -2 * h)",
            f"h = torch.where((torch.arange(n) % {k} == 0)[:, None], h, h + 1)",
            "h = torch.where(torch.arange(n)[:, None] < n // 2, h, 0.0)",
            "h = h.masked_fill(h < 0, 0.5)",
            f"h = h * torch.where(torch.scalar_tensor(n) % {k} == 0, 2.0, 3.0)",
        ]
    )
    return _body(body)


def data_dependent(r: Random, ranges: tuple[int, int]) -> Part:
    body = r.choice(
        [
            "h = h * h.sum().item()",
            "if h.sum() > 0:\n    h = h + 1",
            "outs['kept_#'] = h[h[:, 0] > 0]",
            "h = h + len(h.tolist())",
            "h = h + float(h.sum().detach().numpy())",
            "h = h + int(h.sum().round())",
            "print('a line', end='')",
        ]
    )
    return _body(body, allowed=BREAKS | NARROWS)


def replaced_weights(r: Random, ranges: tuple[int, int]) -> Part:
    changes = (
        "model.linear_#.load_state_dict({'weight': torch.eye(4) * 2, 'bias': torch.ones(4)}, strict=False)",
        "model.linear_#.weight = nn.Parameter(torch.full((4, 4), 0.25))",
        "torch.manual_seed(3); model.linear_# = nn.Linear(4, 4)",
        "model.linear_#.weight.data = torch.full((4, 4), 0.125)",
        "torch.no_grad()(model.linear_#.weight.mul_)(3)",
        "model.linear_#.bias = None",
    )
    return Part(init="self.linear_# = nn.Linear(4, 4)", body="h = self.linear_#(h)", changes=changes, allowed=CONTRACT)


def module_tree(r: Random, ranges: tuple[int, int]) -> Part:
    init = "self.layers_# = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Tanh()])"
    changes = (
        "model.layers_#.append(nn.ReLU())",
        "del model.layers_#[1]",
        "model.layers_#[0].register_forward_hook(lambda module, args, out: out + 1)",
        "model.layers_#[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))",
        "model.layers_#[0].forward = lambda h: h * 3",
        "model.layers_#[0] = nn.ReLU()",
    )
    return Part(init=init, body="for layer in self.layers_#:\n    h = layer(h)", changes=changes)


def training_flag(r: Random, ranges: tuple[int, int]) -> Part:
    body = r.choice(["h = h * (2.0 if self.training else 3.0)", "h = self.norm_#(h)"])
    return Part(
        init="self.norm_# = nn.Dropout(1.0)",
        body=body,
        changes=("model.eval()", "model.train()"),
        allowed=CONTRACT | BREAKS,
    )


def torch_global_state(r: Random, ranges: tuple[int, int]) -> Part:
    body, changes = r.choice(
        [
            ("outs['default_#'] = torch.full((2,), 0.1)", ("torch.set_default_dtype(torch.float64)",)),
            ("outs['auto_#'] = h @ torch.ones(4, 4)", ("torch.set_autocast_enabled('cpu', True)",)),
            ("outs['det_#'] = h * (2 if torch.are_deterministic_algorithms_enabled() else 3)",
             ("torch.use_deterministic_algorithms(True)",)),
        ]
    )  # fmt: skip
    return Part(body=body, changes=changes, allowed=CONTRACT | BREAKS)


def signed_constants(r: Random, ranges: tuple[int, int]) -> Part:
    init, body, changes = r.choice(
        [
            ("self.zero_# = 0.0", "outs['sign_#'] = torch.copysign(torch.ones(4), torch.full((4,), self.zero_#))",
             ("model.zero_# = -0.0", "model.zero_# = 0.0")),
            ("self.zero_# = -0.0", "outs['sign_#'] = torch.full_like(h, self.zero_#).reciprocal()",
             ("model.zero_# = 0.0",)),
            ("self.nan_# = math.nan", "outs['nan_#'] = h + self.nan_#",
             ("model.nan_# = 1.0", "model.nan_# = math.nan")),
            ("self.inf_# = math.inf", "h = h.clamp(max=self.inf_#)", ("model.inf_# = 0.25", "model.inf_# = -math.inf")),
        ]
    )  # fmt: skip
    return Part(init=init, body=body, changes=changes)


def python_effect(r: Random, ranges: tuple[int, int]) -> Part:
    init, before, body, allowed = r.choice(
        [
            ("self.calls_# = 0", "", "self.calls_# += 1", frozenset()),
            ("", "LOG_# = []", "LOG_#.append('called')", frozenset({"StateChangedError"})),
            ("self.last_# = None", "", "self.last_# = n", NARROWS),
            ("self.seen_# = {}", "", "self.seen_#['last'] = h", BREAKS | {"StateChangedError"}),
            ("self.calls_# = 0", "", "self.calls_# += 1\nh = h + self.calls_#", BREAKS),
            ("", "COUNT_# = 0", "global COUNT_#\nCOUNT_# = 3", BREAKS),
        ]
    )
    return Part(init=init, before=before, body=body, allowed=allowed)


def size_zero_or_one(r: Random, ranges: tuple[int, int]) -> Part:
    body, allowed = r.choice(
        [
            ("outs['mean_#'] = h.mean(0)", frozenset()),
            ("outs['std_#'] = h.std(0)", frozenset()),
            ("outs['kept_#'] = h / (1 + h.abs().sum(0, keepdim=True))", frozenset()),
            ("outs['squeezed_#'] = h.squeeze(0)", NARROWS),
            ("h = h + 1 if h.numel() else h", NARROWS),
            ("h = h + 1 if n else h + 2", NARROWS),
            ("h = h + 1 if h.is_contiguous() else h", NARROWS),
            ("h = h + torch.ones(3, 4)", NARROWS | BREAKS),
            ("outs['wide_#'] = h[:, None].expand(n, 2, 4).sum(1)", frozenset()),
            ("outs['largest_#'] = h.amax(0)", NARROWS),
            ("outs['softmax_#'] = h.softmax(0)", frozenset()),
        ]
    )
    return _body(body, allowed=allowed)


def size_in_result(r: Random, ranges: tuple[int, int]) -> Part:
    body, allowed = r.choice(
        [
            ("outs['n_#'] = n", frozenset()),
            ("outs['n_#'] = [n * 2 + 1, h.numel()]", frozenset()),
            ("outs['shape_#'] = tuple(h.shape)", frozenset()),
            ("h = h * n", frozenset()),
            ("h = h / (n + 1)", frozenset()),
            ("outs['full_#'] = torch.full((n,), n)", frozenset()),
            ("outs['mean_#'] = h.sum() / max(n, 1)", frozenset()),
            ("outs['float_#'] = torch.ones(()) * float(n)", NARROWS | BREAKS),
            ("for i in range(n):\n    h = h + i", NARROWS | BREAKS),
            ("outs['rows_#'] = [row * 2 for row in h.unbind(0)]", NARROWS | BREAKS),
            ("outs['text_#'] = f'{n} rows'", NARROWS | BREAKS),
            ("outs['columns_#'] = list(h.unbind(1))", frozenset()),
        ]
    )
    return _body(body, allowed=allowed)


def shared_inputs(r: Random, ranges: tuple[int, int]) -> Part:
    """Two arguments that share memory in some calls and not in others, where one may be changed in place."""
    apart, same = "[rand(n, 4), rand(n, 4)]", "[rand(n, 4)] * 2"
    overlapping = "(lambda t: [t[:n], t[1:]])(rand(n + 1, 4))"
    first, later = r.choice(
        [(apart, same), (same, apart), (apart, overlapping), (overlapping, apart), (same, same), (overlapping, same)]
    )
    body = r.choice(["h = h + s#[0] * s#[1]", "s#[0].mul_(2)\nh = h + s#[1]", "s#[0][:, 0] = 1\nouts['s_#'] = s#[1]"])
    return Part(
        parameter="s#",
        argument=f"{first} if call < 2 else {later}",
        dims="[{0: N}, {0: N}]",
        body=body,
        allowed=CONTRACT | NARROWS | {"CompileError"},
    )


def swapped_function(r: Random, ranges: tuple[int, int]) -> Part:
    before = "def double_#(h):\n    return h * 2\ndef triple_#(h):\n    return h * 3\nact_# = double_#"
    init, body, changes = r.choice(
        [
            ("", "h = act_#(h)", ("act_# = triple_#", "act_# = torch.relu")),
            ("self.act_# = double_#", "h = self.act_#(h)", ("model.act_# = triple_#", "model.act_# = torch.tanh")),
            ("", "h = double_#(h)", ("double_#.__code__ = triple_#.__code__",)),
            ("self.act_# = functools.partial(torch.mul, other=2.0)", "h = self.act_#(h)",
             ("model.act_# = functools.partial(torch.mul, other=4.0)",)),
        ]
    )  # fmt: skip
    return Part(before=before, init=init, body=body, changes=changes)


def identity(r: Random, ranges: tuple[int, int]) -> Part:
    """Objects and tensors that are one object or two, in the module, in globals and among the arguments."""
    before = "class Mode_#:\n    gain = 2.0\nONE_# = Mode_#()\nOTHER_# = Mode_#()"
    tied = "self.left_# = nn.Parameter(torch.ones(4))\nself.right_# = self.left_#"
    return r.choice(
        [
            Part(
                before=before,
                init="self.mode_# = ONE_#",
                body="h = h * (self.mode_#.gain + 1 if self.mode_# is ONE_# else 5)",
                changes=("model.mode_# = OTHER_#", "model.mode_# = Mode_#()", "ONE_# = Mode_#()"),
            ),
            Part(
                before=before,
                init="self.modes_# = [ONE_#, OTHER_#]",
                body="h = h * (3 if ONE_# in self.modes_#[1:] else 5)",
                changes=("model.modes_#[1] = ONE_#", "model.modes_#[:] = [OTHER_#, ONE_#]"),
            ),
            Part(
                before=f"{before}\ndef gain_#(mode, gains={{ONE_#: 2.0, OTHER_#: 3.0}}):\n    return gains[mode]",
                init="self.mode_# = ONE_#",
                body="h = h * gain_#(self.mode_#)",
                changes=("model.mode_# = OTHER_#", "gain_#.__defaults__[0][ONE_#] = 4.0"),
                allowed=BREAKS,
            ),
            Part(
                init=tied,
                body="h = h * (3 if self.left_# is self.right_# else 5) + self.right_#",
                changes=("model.right_# = nn.Parameter(torch.full((4,), 2.0))", "model.left_# = model.right_#"),
            ),
            Part(
                parameter="i#",
                argument="[rand(n, 4)] * 2 if call % 2 else [rand(n, 4), rand(n, 4)]",
                dims="[{0: N}, {0: N}]",
                body="h = h + i#[0] * (3 if i#[0] is i#[1] else 5)",
                allowed=CONTRACT,
            ),
            Part(
                parameter="i#",
                argument="(lambda one: (one, one) if call % 2 else (one, [1.0]))([1.0])",
                body="i#[0].append(2.0)\nh = h * len(i#[1])",
                allowed=CONTRACT | BREAKS,
            ),
            Part(
                before=before,
                init="self.last_# = ONE_#\nself.first_# = ONE_#",
                body="h = h * (3 if self.last_# is self.first_# else 5)\nself.last_# = OTHER_#",
                changes=("model.last_# = model.first_#",),
                allowed=frozenset({"StateChangedError"}),  # it decides on what it replaces itself
            ),
        ]
    )


CONSTRUCTS: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        branch_on_size, divisibility_branch, view_or_reshape, sort_or_topk, nested_inputs, two_symbols, attribute_read,
        global_state, closure_cell, environment_read, folded_call, table_by_size, buffer_mutation, input_mutation,
        output_aliasing, random_op, python_random, optional_argument, odd_tensor, slice_by_size, where, data_dependent,
        replaced_weights, module_tree, training_flag, torch_global_state, signed_constants, python_effect,
        size_zero_or_one, size_in_result, shared_inputs, swapped_function, identity,
    )
}  # fmt: skip

REFUSERS = {"branch_on_size", "divisibility_branch", "table_by_size", "data_dependent", "python_random"}
"""Constructs that mostly end in an error; they are added to others more seldom, so that those get to run."""

RANGES = [(0, 1), (0, 8), (1, 2), (1, 7), (1, 16), (1, 64), (2, 9), (3, 5), (4, 32), (0, 5), (1, 4096)]

OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {},
    {"on_state_change": "error"},
    {"on_constraint": "split"},
    {"dynamic_shapes": "backed"},
    {"dynamic_shapes": "backed", "on_constraint": "split"},
    {"dynamic_shapes": "backed_size_oblivious"},
    {"dynamic_shapes": "backed_size_oblivious", "on_state_change": "error"},
)
"""Fields of CompilationConfig that a case draws one of."""

DECORATORS = ("", "", "", "@torch.no_grad()", "@handed_on", "@of_a_module")


def draw_case(seed: int, first: str | None = None, max_parts: int = 4, max_changes: int = 2) -> Case:
    """The case of a seed. Its first construct goes round with the seed, or is `first`."""
    r = Random(seed)
    names = sorted(CONSTRUCTS)
    chosen = [first or names[seed % len(names)]]
    refusers = sorted(REFUSERS)
    runs = [name for name in names if name not in REFUSERS]
    for _ in range(r.choice([0, 1, 2, 2, 3, 3])):
        chosen.append(r.choice(refusers if r.random() < 0.15 else runs))
    chosen = chosen[:max_parts]
    r.shuffle(chosen)
    ranges = (r.choice(RANGES), r.choice(RANGES))
    parts = []
    for number, name in enumerate(chosen):
        part = CONSTRUCTS[name](r, ranges[0])
        parts.append((number, Part(**{**vars(part), "construct": name})))
    possible = [change.replace("#", str(number)) for number, part in parts for change in part.changes]
    calls = []
    for index in range(r.randint(3, 5)):
        changes = tuple(r.choice(possible) for _ in range(r.randint(0, max_changes))) if possible and index else ()
        calls.append(Call(_size(r, ranges[0]), _size(r, ranges[1]), changes, r.random() < 0.3))
    return Case(
        seed=seed,
        parts=tuple(parts),
        ranges=ranges,
        calls=tuple(calls),
        kind=r.choice(["module", "module", "module", "method", "function"]),
        result=r.choice(["dict", "tuple", "dataclass"]),
        context=r.choice(["torch.enable_grad()", "torch.no_grad()", "torch.inference_mode()"]),
        options=r.choice(OPTIONS),
        decorator=r.choice(DECORATORS),
    )


def _size(r: Random, ranges: tuple[int, int]) -> int:
    low, high = ranges
    if r.random() < 0.06:
        return r.choice([size for size in (low - 1, high + 1) if size >= 0])
    near = [size for size in (low, low + 1, 0, 1, 2, 3, 4, 7, 8, 16, high - 1, high) if low <= size <= high]
    return r.choice([r.choice(near), r.randint(low, min(high, low + 12))])
