"""Regular expressions of untrusted files, matched in time that is bounded whatever they are.

Python's own matcher backtracks: patterns such as `(a+)+$`, and even `.*a.*a.*a.*a$`, take time without bound on short names. Here
a pattern becomes an automaton whose set of states walks over the name once (Thompson 1968, "Regular expression search
algorithm"); sets and their successors are remembered, so that the usual cost is one look-up for each character.

Known are literals, `.`, classes, groups, `|`, `*`, `+`, `?`, `{m,n}`, `^`, `$` and the escapes d, w, s and those of punctuation.
What a set of states cannot do, such as looking ahead and back references, is refused by name.
"""

from collections.abc import Callable
from typing import Any

from gristmill.errors import FormatError

LONGEST = 1000  # characters of a pattern, and of a name that is matched
DEPTH = 30  # of groups in groups
STATES = 1000
REMEMBERED = 4096  # sets of states of one pattern
STEPS = 50_000_000  # of all matches with one file's patterns: some seconds

Test = Callable[[str], bool]
ESCAPES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
    "D": lambda c: not c.isdecimal(),
    "W": lambda c: not (c.isalnum() or c == "_"),
    "S": lambda c: not c.isspace(),
}
ANY: Test = lambda c: c != "\n"  # noqa: E731
START, END = "^", "$"


class Budget:
    """The steps that are left to all patterns of a file."""

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise FormatError("the patterns of config.json take too long to match; list the layers by name, or use simpler ones")


class Pattern:
    """A regular expression.

    Example:
        >>> Pattern(r".*layers\\.\\d+\\.(q|k)_proj").matches("model.layers.12.q_proj.lora")
        True
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        """Raises FormatError: the pattern is damaged, too long, or uses what is not known."""
        self.budget = Budget() if budget is None else budget
        if len(text) > LONGEST:
            raise FormatError(f"a pattern of {len(text)} characters is longer than {LONGEST}")
        self.automaton = _Automaton(text)
        self.closed: dict[tuple[frozenset[int], bool, bool], tuple[frozenset[int], bool]] = {}
        self.followed: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, name: str) -> bool:
        """Whether the beginning of a name matches, as `re.match` has it.

        Raises:
            FormatError: the name is too long, or no steps are left.
        """
        if len(name) > LONGEST:
            raise FormatError(f"the name '{name[:80]}...' has {len(name)} characters, too many to match a pattern")
        states: frozenset[int] = frozenset([self.automaton.first])
        for at, character in enumerate(name):
            states, accepted = self._close(states, at == 0, at == len(name) - 1 and character == "\n")
            if accepted or not states:
                return accepted
            states = self._follow(states, character)
        return self._close(states, not name, True)[1]

    def _close(self, states: frozenset[int], start: bool, end: bool) -> tuple[frozenset[int], bool]:
        """The states that take a character, after all steps that take none; and whether the end is among them."""
        self.budget.spend(1)
        key = (states, start, end)
        if key not in self.closed:
            self._forget(self.closed)
            self.closed[key] = self.automaton.close(states, start, end)
            self.budget.spend(len(self.automaton.states))
        return self.closed[key]

    def _follow(self, states: frozenset[int], character: str) -> frozenset[int]:
        key = (states, character)
        if key not in self.followed:
            self._forget(self.followed)
            self.followed[key] = self.automaton.follow(states, character)
            self.budget.spend(len(states))
        return self.followed[key]

    @staticmethod
    def _forget(remembered: dict[Any, Any]) -> None:
        if len(remembered) >= REMEMBERED:
            remembered.clear()


class _Automaton:
    """States of a pattern: (what a character must pass, the next state), or (None, states reached without a character), or
    (START or END, the state reached there). State 0 is the end."""

    def __init__(self, text: str) -> None:
        self.states: list[tuple[Any, Any]] = [(None, ())]
        self.first = self._emit(_Parser(text).parse(), 0)

    def close(self, states: frozenset[int], start: bool, end: bool) -> tuple[frozenset[int], bool]:
        seen, waiting, takers = set(states), list(states), set()
        while waiting:
            state = waiting.pop()
            test, after = self.states[state]
            if test is None:
                reached = after
            elif test in (START, END):
                reached = (after,) if (start if test == START else end) else ()
            else:
                takers.add(state)
                continue
            waiting += [each for each in reached if each not in seen]
            seen.update(reached)
        return frozenset(takers), 0 in seen

    def follow(self, states: frozenset[int], character: str) -> frozenset[int]:
        return frozenset(self.states[state][1] for state in states if self.states[state][0](character))

    def _add(self, test: Any, after: Any) -> int:
        if len(self.states) >= STATES:
            raise FormatError(f"a pattern takes more than {STATES} states; its counts are too large")
        self.states.append((test, after))
        return len(self.states) - 1

    def _emit(self, node: tuple[Any, ...], after: int) -> int:
        """Add the states of a part of the pattern that lead to `after`; return the first of them."""
        match node:
            case ("test", test):
                return self._add(test, after)
            case ("all", parts):
                for part in reversed(parts):
                    after = self._emit(part, after)
                return after
            case ("any", choices):
                return self._add(None, tuple(self._emit(choice, after) for choice in choices))
            case ("repeat", part, least, most):
                return self._repeat(part, least, most, after)
        raise AssertionError(node)

    def _repeat(self, part: tuple[Any, ...], least: int, most: int | None, after: int) -> int:
        first = after
        if most is None:
            first = self._add(None, ())
            self.states[first] = (None, (self._emit(part, first), after))
        for _ in range((most or least) - least):
            first = self._add(None, (self._emit(part, first), after))
        for _ in range(least):  # one state each even if the part has none, so that counts in counts are bounded
            first = self._emit(part, self._add(None, (first,)))
        return first


class _Parser:
    """Text to ("test", test), ("all", parts), ("any", choices) and ("repeat", part, least, most or None)."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def fault(self, what: str) -> FormatError:
        return FormatError(f"pattern {self.text[:80]!r}: {what}")

    def parse(self) -> tuple[Any, ...]:
        node = self._choices()
        if self.at < len(self.text):
            raise self.fault("a ) has no (")
        return node

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise self.fault("it ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _choices(self) -> tuple[Any, ...]:
        choices = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            choices.append(self._sequence())
        return choices[0] if len(choices) == 1 else ("any", choices)

    def _sequence(self) -> tuple[Any, ...]:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return ("all", parts)

    def _repeated(self, part: tuple[Any, ...]) -> tuple[Any, ...]:
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in counts and self._peek():
            least, most = counts[self._next()]
        elif self._peek() == "{":
            least, most = self._counts()
        else:
            return part
        if part[0] == "test" and part[1] in (START, END):
            raise self.fault(f"{part[1]} cannot be repeated")
        if self._peek() == "?":  # taking as little as possible matches the same names
            self.at += 1
        if self._peek() and self._peek() in "*+?{":
            raise self.fault("a repetition of a repetition is not known")
        return ("repeat", part, least, most)

    def _counts(self) -> tuple[int, int | None]:
        self.at += 1
        inner, closed, _ = self.text[self.at :].partition("}")
        least, comma, most = inner.partition(",")
        if not closed or not _is_count(least) or (most and not _is_count(most)):
            raise self.fault("counts must be {m}, {m,} or {m,n}; write \\{ for the character")
        self.at += len(inner) + 1
        low = int(least)
        high = int(most) if most else None if comma else low
        if high is not None and high < low:
            raise self.fault(f"the counts {{{inner}}} do not rise")
        return low, high

    def _atom(self) -> tuple[Any, ...]:
        character = self._next()
        match character:
            case "(":
                return self._group()
            case "[":
                return ("test", self._class())
            case ".":
                return ("test", ANY)
            case "^" | "$":
                return ("test", character)
            case "\\":
                return ("test", self._escape())
            case "*" | "+" | "?" | "{":
                raise self.fault(f"{character} repeats nothing")
        return ("test", _equal(character))

    def _group(self) -> tuple[Any, ...]:
        self.depth += 1
        if self.depth > DEPTH:
            raise self.fault(f"groups in groups more than {DEPTH} deep")
        if self._peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                raise self.fault(f"({self.text[self.at : self.at + 2]} is not known; list the layers by name instead")
            self.at += 2
        node = self._choices()
        if self._peek() != ")":
            raise self.fault("a ( has no )")
        self.at += 1
        self.depth -= 1
        return ("all", [node])

    def _escape(self) -> Test:
        character = self._next()
        if character in ESCAPES:
            return ESCAPES[character]
        if character.isalnum():
            raise self.fault(f"\\{character} is not known")
        return _equal(character)

    def _class(self) -> Test:
        negated = self._peek() == "^"
        self.at += negated
        tests: list[Test] = []
        begin = self.at
        while self._peek() != "]" or self.at == begin:
            low = self._next()
            if low == "\\":
                tests.append(self._escape())
                if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                    raise self.fault("a range that begins with an escape is not known")
                continue
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._next()
                if high == "\\" or high < low:
                    raise self.fault(f"the range {low}-{high} is not known")
                tests.append(_between(low, high))
            else:
                tests.append(_equal(low))
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negated


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _equal(wanted: str) -> Test:
    return lambda c: c == wanted


def _between(low: str, high: str) -> Test:
    return lambda c: low <= c <= high
