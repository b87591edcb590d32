"""Final answers: where a text states one, what the reference says, and whether the two are equal."""

from __future__ import annotations

import functools
import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any, Literal

from llm2_fast.errors import ArgumentError, MissingDependencyError

AnswerKind = Literal["number", "math"]

_MARKED = re.compile(r"####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_STATED = re.compile(  # perhaps in a line of its own, in bold or as a displayed formula
    r"\banswer is(?:[\s*:]|\$\$|\\[(\[])*(?![\s*:]|\$\$|\\[(\[]|\.(?:\s|$))(.+?)"
    r"(?:[ \t*]|\$\$|\\[)\]])*(?:\.\**(?=\s|$)|$)",
    re.IGNORECASE | re.MULTILINE,
)
# A minus sign belongs to a number only if no operand stands before it, and digits inside a word (x2) are no number.
_SIGN = r"(?:(?<![\w)])-)?(?:\$\s?)?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?<!\w)(?<!\d\.)(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")
_FRACTION = re.compile(r"\s*/\s*(\d+)")
# What may stand around a number: words of two letters or more, since one letter may be a variable.
_UNITS = re.compile(
    r"(?:[\s.,%$\u20ac\u00a3\u00a5\u20b9\u00b0]|\u00b0[CF]\b"
    r"|(?<![\w/'-])(?!(?:pi|root|sqrt|sin|cos|tan|log|ln|exp|mod|plus|minus|negative|times|over|factorial)\b)"
    r"[^\W\d_]{2,}(?:[-/'\u2019][^\W\d_]+)*)*"
)
_LATEX_FRACTION = re.compile(r"(?<![\w)}])\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_OPERATION = re.compile(r"\\(?:[dt]?frac|[dt]?binom|sqrt|pi|cdot|times|div|pm|infty|log|ln|sin|cos|tan)(?![a-zA-Z])")
# Numbers and operations: no variables, and no comma that could begin another answer. \text{} may hold a unit.
_ARITHMETIC = re.compile(
    rf"(?:[\d\s.+\-*/^!|()\[\]{{}}_=$%\u00d7\u00f7\u00b7\u2212]|,(?=\d{{3}}(?!\d))|{_OPERATION.pattern}"
    r"|\\(?:left|right|circ)(?![a-zA-Z])|\\(?:text|mathrm)\s*\{[^{}]*\}|\\[()\[\]$%,;:! ])*"
)
_CLOSING = re.compile(r"(?:(?<!\\)\$+|\\[)\]])$")  # of a formula
_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class Span:
    """An answer inside a text.

    Attributes:
        start, end: Where it stands.
        marked: The text says that this is the answer; otherwise it is only its last number.
    """

    start: int
    end: int
    marked: bool


def find_answer(text: str) -> Span | None:
    r"""Where `text` states its final answer.

    Looked for in this order, the last occurrence of each: after `####`, in `\boxed{}`, after "the answer is", the last
    number. None if there is none of these.
    """
    for pattern in (_MARKED, None, _STATED):
        span = _last_boxed(text) if pattern is None else _last_group(pattern, text)
        if span is not None:
            return span
    numbers = list(_NUMBER.finditer(text))
    return Span(*numbers[-1].span(), marked=False) if numbers else None


def extract_answer(text: str, *, complete: bool = True) -> str | None:
    """The final answer that `text` states, as `find_answer` looks for it.

    Args:
        text: A solution.
        complete: False if the text was cut off. Its last number is no answer then; what it marks as one is.
    """
    span = find_answer(text)
    return text[span.start : span.end] if span is not None and (complete or span.marked) else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of an answer that is a number, None if it is none.

    Units, a currency sign, thousands separators and a percent sign are ignored ("$1,234.50 per day" is 1234.5), of an
    equation the right side counts ("3 + 4 = 7 apples" is 7), and a/b is a fraction, as is \\frac{a}{b}. With another
    operation of LaTeX the text is no number.
    """
    text = _LATEX_FRACTION.sub(r"\1/\2", _plain(text.rpartition("=")[2]))
    match = _NUMBER.search(text)
    if match is None or _OPERATION.search(text):
        return None
    value = Fraction(re.sub(r"[,$\s]", "", match.group()))
    if (fraction := _FRACTION.match(text, match.end())) is not None:
        return value / int(fraction[1]) if int(fraction[1]) else None
    return value


def answers_equal(answer: str, gold: str, kind: AnswerKind) -> bool:
    """Whether two final answers are equal.

    Args:
        answer: What a solution states.
        gold: The reference. The order matters to `math-verify`.
        kind: "number" compares exact values; "math" asks `math-verify` whether two expressions are equivalent. Of an
            equation of arithmetic ("3 + 4 = 7"), the right side is the reference in both.

    Raises:
        MissingDependencyError: `kind` is "math" and `math-verify` is not installed.
    """
    if kind == "number":
        value = parse_number(answer)
        return value is not None and value == parse_number(gold)
    return _equivalent(answer, gold)


@dataclass(frozen=True)
class GoldAnswer:
    """The final answer of a reference.

    Attributes:
        text: As written.
        kind: How answers are compared with it.
    """

    text: str
    kind: AnswerKind

    @classmethod
    def parse(cls, reference: str) -> GoldAnswer:
        r"""The gold answer of a problem's `answer` field: what follows `####`, or `\boxed{}`, or the whole field.

        Kind "number" if it is a number with nothing but a currency, a percent sign or units around it, or arithmetic
        with such a number behind its last equals sign, and not boxed; else "math".

        Raises:
            ArgumentError: There is no answer in it.
        """
        marked, boxed = _last_group(_MARKED, reference), _last_boxed(reference)
        span = marked or boxed or Span(0, len(reference), marked=False)
        text = reference[span.start : span.end].strip()
        if not text:
            raise ArgumentError(
                "answer", r"a final answer after ####, in \boxed{} or as the whole field", repr(reference)
            )
        return cls(text, "number" if span is not boxed and _is_number(_result(text)) else "math")

    @property
    def is_readable(self) -> bool:
        """Answers can be compared with its value, not only with its letters.

        Raises:
            MissingDependencyError: It is no number and `math-verify` is not installed.
        """
        if self.kind == "number":
            return parse_number(self.text) is not None
        _import_math_verify()
        return any(not isinstance(parsed, str) for parsed in _parse(_result(self.text)))

    def is_right(self, solution: str, *, complete: bool = True) -> bool:
        """Whether the final answer of `solution` is this one; see `extract_answer` and `answers_equal`."""
        answer = extract_answer(solution, complete=complete)
        return answer is not None and answers_equal(answer, self.text, self.kind)


def _plain(text: str) -> str:
    """Minus, dollar and percent signs as keyboards have them."""
    return text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$").replace("\\%", "%")


def _is_number(text: str) -> bool:
    """The text is one number, or a fraction a/b, with units around it: "x^2 + 3" only contains some."""
    text = _plain(text)
    match = _NUMBER.search(text)
    if match is None or parse_number(text) is None:
        return False
    end = (_FRACTION.match(text, match.end()) or match).end()
    return all(_UNITS.fullmatch(text, *part) for part in ((0, match.start()), (end, len(text))))


def _result(gold: str) -> str:
    """The right side, if the gold answer is an equation of arithmetic: "7" of "3 + 4 = 7".

    Others stay whole: `math-verify` knows that "x = 5" says 5, but takes nothing but an equation for "3 + 4 = 7".
    """
    left, _, right = gold.strip().rpartition("=")
    right = _CLOSING.sub("", right).strip()
    if not _is_arithmetic(left) or left.endswith("!"):  # != is no equals sign
        return gold
    return right if _is_number(right) or _is_arithmetic(right) else gold


def _is_arithmetic(text: str) -> bool:
    return re.search(r"\d", text) is not None and _ARITHMETIC.fullmatch(text) is not None


def _last_group(pattern: re.Pattern[str], text: str) -> Span | None:
    """Group 1 of the last match."""
    matches = list(pattern.finditer(text))
    return Span(*matches[-1].span(1), marked=True) if matches else None


def _last_boxed(text: str) -> Span | None:
    """What stands between the braces of the last box that is closed."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return Span(match.end(), end, marked=True)
    return None


def _equivalent(answer: str, gold: str) -> bool:
    math_verify = _import_math_verify()
    return math_verify.verify(_parse(_result(gold)), _parse(answer), timeout_seconds=_time_limit())


@functools.lru_cache(maxsize=4096)
def _parse(expression: str) -> list[Any]:
    """What `math-verify` makes of it: the value, if it can be read, and the text."""
    return _import_math_verify().parse(f"\\boxed{{{expression}}}", parsing_timeout=_time_limit())


def _import_math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError as error:
        raise MissingDependencyError("reading mathematical expressions needs: pip install 'llm2-fast[eval]'") from error
    return math_verify


def _time_limit() -> int | None:
    """In seconds. It works by an alarm signal, which only the main thread may set."""
    return _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
