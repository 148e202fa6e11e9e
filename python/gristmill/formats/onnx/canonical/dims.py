"""Sizes of dimensions that need not be known: a number times named factors, exact under multiplication and division."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """`number` times the product of `factors`. A factor is the name of a symbolic dimension or the text of an expression; two
    equal texts always stand for the same number."""

    number: int
    factors: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        return not self.factors

    def __str__(self) -> str:
        return "*".join([*(() if self.number == 1 and self.factors else (str(self.number),)), *self.factors])


ONE = Size(1)


def size(dim: int | str) -> Size:
    return Size(int(dim)) if not isinstance(dim, str) else Size(1, (dim,))


def times(a: Size, b: Size) -> Size:
    number = a.number * b.number
    return Size(number, tuple(sorted(a.factors + b.factors)) if number else ())


def over(a: Size, b: Size) -> Size | None:
    """The quotient where it is exact whatever the factors are. A factor may be 0: those of `b` must not be the last of them."""
    if not b.number or a.number % b.number:
        return None
    rest = list(a.factors)
    for factor in b.factors:
        if factor not in rest:
            return None
        rest.remove(factor)
    return Size(a.number // b.number, tuple(rest))


def plus(a: Size, b: Size, sign: int = 1) -> Size:
    """The sum, or the difference for sign -1."""
    if a.factors == b.factors:
        number = a.number + sign * b.number
        return Size(number, a.factors if number else ())
    if b == Size(0):
        return a
    return Size(1, (f"({a}{'+' if sign > 0 else '-'}{b})",))


def product(sizes: "tuple[Size, ...] | list[Size]") -> Size:
    total = ONE
    for each in sizes:
        total = times(total, each)
    return total
