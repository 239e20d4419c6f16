"""Programs drawn at random for the property of splitting: statements over tensors [n, 4] that share memory, change in
place, allocate, draw random numbers, and pass sizes and tuples around.

Takes a seed; gives the source of a function `program(x, w)`.
"""

from random import Random

STATEMENTS = {
    "arithmetic": "{new} = {a} + {b} * 0.5",
    "activation": "{new} = torch.relu({a}) - torch.sin({b})",
    "linear": "{new} = torch.nn.functional.linear({a}, w)",
    "norm": "{new} = torch.nn.functional.layer_norm({a}, (4,))",
    "softmax": "{new} = {a}.softmax(-1)",
    "views": "{new} = {a}.t().t().unsqueeze(0)[0]",
    "view of a view": "{new} = {a}.view({a}.shape[0], 2, 2).transpose(1, 2).flatten(1)",
    "chunks": "left, right = {a}.chunk(2, dim=1)\n    {new} = torch.cat([right, left], 1)",
    "a tuple as a whole": "{new} = torch.cat({a}.split(1, 1)[::-1], 1)",
    "sorted": "values, order = torch.sort({a}, dim=1)\n    {new} = values + order",
    "largest": "{new} = {a} - {b}.max(dim=1, keepdim=True).values",
    "full of a size": "{new} = torch.full({a}.size(), 2.0) * {b}",
    "zeros of a size": "{new} = {a}.new_zeros(size={b}.size()) + {b}",
    "nested size": "{new} = torch.ones(({a}.shape[0] * 2, 4))[: {b}.shape[0]] + {a}",
    "arange": "{new} = torch.arange({a}.shape[0])[:, None] * 0.1 + {b}",
    "float of a size": "{new} = {a} / math.sqrt({b}.shape[0])",
    "expand": "{new} = {a}[:1].expand({b}.shape[0], 4) + {b}",
    "empty": "{new} = torch.empty_like({a})\n    {new}.copy_({b})",
    "empty in front": "buffer = torch.empty({a}.shape[0], 4)\n    other = {a} * 2\n    {new} = buffer.copy_(other)",
    "zeros in front": "{new} = torch.zeros_like({a})\n    {new}.add_({b})",
    "changed in place": "{new} = {a}.clone()\n    {new}.mul_(1.5)",
    "changed under a view": "base = {a} * 1.0\n    part = base[:, 1:3]\n    base.add_(1)\n    "
    "{new} = torch.nn.functional.pad(part, (1, 1)) + base",
    "changed through a view": "base = {a} * 1.0\n    base[:, :2].zero_()\n    {new} = base",
    "an earlier value changed": "{a}.add_(0.25)\n    {new} = {b} * 1.0",
    "an earlier value's view changed": "{a}[:, 0].mul_(0.5)\n    {new} = {b} - 1.0",
    "a view that stays": "{new} = {a}[:, [0, 1, 2, 3]] if False else {a}.view(-1, 4)",
    "assigned": "base = {a} + 0.0\n    base[:, 0] = {b}[:, 1]\n    {new} = base",
    "input changed": "x.mul_(1.1)\n    {new} = {a} + x",
    "random": "{new} = {a} * torch.rand_like({b})",
    "random normal": "{new} = {a} + torch.randn({b}.shape[0], 4)",
    "masked": "{new} = {a} + {b}.masked_select({b} > 0).sum()",
    "cumulated": "{new} = {a}.cumsum(0)",
    "where": "{new} = torch.where({a} > {b}, {a}, 1 - {b})",
    "detached": "{new} = {a}.detach() + 1",
    "reduced": "{new} = {a} - {b}.mean(0)",
}  # fmt: skip


def draw_program(seed: int) -> tuple[str, list[str]]:
    """The source, and the names of its statements."""
    random = Random(seed)
    names = ["x"]
    lines, used = [], []
    for number in range(random.randint(4, 10)):
        kind = random.choice(list(STATEMENTS))
        new = f"t{number}"
        text = STATEMENTS[kind].format(new=new, a=random.choice(names), b=random.choice(names))
        lines.append(text)
        names.append(new)
        used.append(kind)
    results = random.sample(names, min(len(names), random.randint(1, 3)))
    body = "\n    ".join([*lines, f"return {', '.join(results)},"])
    return f"import math\n\nimport torch\n\n\ndef program(x, w):\n    {body}\n", used
