"""Activations from what exporters spell out: Gelu, Swish, HardSwish, Mish.

Each is a polynomial in its argument x and in one function t of a polynomial of x. An expression is expanded into such polynomials and
held against a table, so that the order of the factors, where 0.5 is multiplied in, and whether a power is a product do not matter.
"""

from dataclasses import dataclass, field
from math import isclose, pi, sqrt
from typing import Any

from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.model import Model
from gristmill.ops import OPS, Node

Powers = dict[tuple[int, int], float]  # the coefficient of x^i t^j
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow")
ATOMS = ("Erf", "Tanh", "Sigmoid", "HardSigmoid", "Clip", "Softplus")
DEPTH = 12  # nodes between an expression and its argument
TOLERANCE = 2e-4  # of coefficients: 1.4142 and the like are rounded in files

ROOT = sqrt(2.0 / pi)
X = {(1, 0): 1.0}
HALVES = {(1, 0): 0.5, (1, 1): 0.5}


@dataclass(frozen=True)
class Form:
    """An activation: `inside` in x makes the argument of `atom`, `outside` in x and t the result."""

    op: str
    atom: str
    inside: Powers
    outside: Powers
    attributes: dict[str, Any] = field(default_factory=dict)


FORMS = (
    Form("Gelu", "Erf", {(1, 0): sqrt(0.5)}, HALVES),
    Form("Gelu", "Tanh", {(1, 0): ROOT, (3, 0): ROOT * 0.044715}, HALVES, {"approximate": "tanh"}),
    Form("Swish", "Sigmoid", X, {(1, 1): 1.0}),
    Form("Swish", "Sigmoid", {(1, 0): 1.702}, {(1, 1): 1.0}, {"alpha": 1.702}),
    Form("HardSwish", "HardSigmoid", X, {(1, 1): 1.0}),
    Form("HardSwish", "Clip", {(0, 0): 3.0, (1, 0): 1.0}, {(1, 1): 1 / 6}),
)


def activations(model: Model) -> Model:
    """Put one node in the place of each spelled-out activation."""
    graph = Graph(model)
    for node in graph.walk("Mul", "Div", "Add"):
        atom = _atom(graph, node)
        if atom is not None:
            made = _mish(graph, node, atom) or _matched(graph, node, atom)
            if made is not None:
                graph.put(made)
    return graph.done()


def _atom(graph: Graph, node: Node, depth: int = 4) -> Node | None:
    """The function that an expression applies, next to its end."""
    for name in node.inputs:
        maker = graph.maker(name)
        if maker is None:
            continue
        if maker.op in ATOMS:
            return maker
        if maker.op in ("Add", "Mul", "Div") and depth and (maker.op != "Add" or graph.split_scalar(maker)):
            found = _atom(graph, maker, depth - 1)
            if found is not None:
                return found
    return None


def _matched(graph: Graph, node: Node, atom: Node) -> Node | None:
    if not _standard(graph, atom):
        return None
    for x in _arguments(graph, atom):
        for form in FORMS:
            if form.atom != atom.op or ("", form.op) not in OPS:
                continue
            if not all(key in OPS["", form.op].attributes for key in form.attributes):
                continue
            if _alike(_expand(graph, atom.inputs[0], x, ""), form.inside) and _alike(
                _expand(graph, node.name, x, atom.name, node), form.outside
            ):
                return Node(form.op, (x,), node.outputs, form.attributes)
    return None


def _standard(graph: Graph, atom: Node) -> bool:
    """Whether HardSigmoid and Clip have the constants that HardSwish has."""
    if atom.op == "HardSigmoid":
        alpha, beta = atom.attributes.get("alpha", 0.2), atom.attributes.get("beta", 0.5)
        return isclose(alpha, 1 / 6, rel_tol=1e-4) and isclose(beta, 0.5, rel_tol=1e-4)
    if atom.op == "Clip":
        low, high = (graph.scalar(atom.input(at)) if atom.input(at) else None for at in (1, 2))
        return low == 0 and high == 6
    return True


def _arguments(graph: Graph, atom: Node) -> list[str]:
    """Values that the argument of an atom may be an expression of, the nearest first."""
    found, names = [atom.inputs[0]], [atom.inputs[0]]
    while names and len(found) < DEPTH:
        node = graph.maker(names.pop(0), *ARITHMETIC)
        for name in node.inputs if node is not None else ():
            if graph.scalar(name) is None and name not in found:
                found.append(name)
                names.append(name)
    return found


def _expand(graph: Graph, name: str, x: str, t: str, given: Node | None = None, depth: int = DEPTH) -> Powers | None:
    """The polynomial in x and t that a value is, or None."""
    if given is None:
        if name in (x, t):
            return {(1, 0): 1.0} if name == x else {(0, 1): 1.0}
        value = graph.scalar(name)
        if value is not None:
            return {(0, 0): float(value)}
    node = given or graph.maker(name, *ARITHMETIC)
    if node is None or not depth or len(node.inputs) != 2:
        return None
    if node.op == "Pow":
        base, power = _expand(graph, node.inputs[0], x, t, None, depth - 1), graph.scalar(node.inputs[1])
        if base is None or power not in (2, 3):
            return None
        return _times(base, base) if power == 2 else _times(_times(base, base), base)
    a, b = (_expand(graph, value, x, t, None, depth - 1) for value in node.inputs)
    if a is None or b is None:
        return None
    if node.op == "Mul":
        return _times(a, b)
    if node.op == "Div":
        return {k: v / b[0, 0] for k, v in a.items()} if b.keys() == {(0, 0)} and b[0, 0] else None
    sign = -1.0 if node.op == "Sub" else 1.0
    return {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in {*a, *b}}


def _times(a: Powers, b: Powers) -> Powers:
    out: Powers = {}
    for (i, j), left in a.items():
        for (k, m), right in b.items():
            out[i + k, j + m] = out.get((i + k, j + m), 0.0) + left * right
    return out


def _alike(found: Powers | None, wanted: Powers) -> bool:
    if found is None:
        return False
    found = {key: value for key, value in found.items() if value}
    return found.keys() == wanted.keys() and all(isclose(found[key], wanted[key], rel_tol=TOLERANCE) for key in wanted)


def _mish(graph: Graph, node: Node, atom: Node) -> Node | None:
    """x * tanh(softplus(x))."""
    inner = graph.maker(atom.inputs[0], "Softplus") if atom.op == "Tanh" else None
    if inner is None or node.op != "Mul" or ("", "Mish") not in OPS:
        return None
    return Node("Mish", inner.inputs, node.outputs) if sorted(node.inputs) == sorted((inner.inputs[0], atom.name)) else None
