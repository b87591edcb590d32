"""Final answers: finding, reading and comparing them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2_fast import ArgumentError
from llm2_fast.answers import GoldAnswer, answers_equal, extract_answer, parse_number
from llm2_fast.problems import Problem, load_problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\nno, that was wrong\n#### 4  \n", "4"),
        (r"so $x = \boxed{\frac{1}{2}}$ and not \boxed{3", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \fbox{2}.", "2"),
        (r"The answer is 5, I mean \boxed{6}.", "6"),
        ("So the answer is 72.", "72"),
        ("The answer is **72.** Good bye 7", "72"),
        ("The answer is: **2*3**", "2*3"),
        ("The answer is: 3.5. There are 12 months.", "3.5"),
        ("The answer is:\n42", "42"),
        ("The answer is:\n\n$42$", "$42$"),
        ("The answer is\n\n**42**\n\nThere are 12 months.", "42"),
        ("The answer is:\n$$\n\\frac{1}{2}\n$$", r"\frac{1}{2}"),
        (r"The answer is: \[ 2x + 1 \].", "2x + 1"),
        (r"The final answer is \(42\).", "42"),
        ("The answer is: .5", ".5"),
        ("12 months, but the answer is:", "12"),
        ("12 months, but nobody knows what the answer is.", "12"),
        ("The answer is: **", None),
        ("the answer is $1,234.50 per day.\nGood bye 7", "$1,234.50 per day"),
        ("She has 3 apples and 12 pears", "12"),
        ("20 - 5 = 15", "15"),
        ("It costs -$3", "-$3"),
        ("from 5-3", "3"),  # a difference, not a negative number
        ("- 5 apples", "5"),
        ("the sum x2 of w5", None),
        ("12,345,678 people", "12,345,678"),
        ("1,2,3", "3"),
        ("half is .5", ".5"),
        ("well...5", "5"),
        ("nothing here", None),
        ("", None),
    ],
)
def test_extraction(text, expected):
    assert extract_answer(text) == expected


def test_the_last_number_of_a_text_that_was_cut_is_no_answer():
    assert extract_answer("48 / 2 = 24 and 48 +", complete=False) is None
    assert extract_answer("The answer is 72. By the way, 5", complete=False) == "72"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72), ("72.0", 72), ("-3", -3), ("\N{MINUS SIGN}3", -3), ("50%", 50),
        ("$1,234.50 per day", Fraction("1234.5")),
        ("3/4", Fraction(3, 4)), ("-3 / 4 cups", Fraction(-3, 4)), ("3 + 4 = 7 apples", 7), (r"\$18", 18),
        ("1/0", None), ("none", None), ("", None), ("=", None), (".5", Fraction(1, 2)),
        (r"\frac{3}{56}", Fraction(3, 56)), (r"-\dfrac{1}{2}", Fraction(-1, 2)), (r"\frac{1}{0}", None),
        (r"2\frac{1}{2}", None), (r"2\sqrt{3}", None), (r"3\pi", None),
        (r"72 \text{ clips}", 72), (r"$3 \times 4 = 12$", 12),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert parse_number(text) == value


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${}", "{} apples", "x = {}", "{}.", "{}.00"]))
def test_numbers_survive_formatting(value, form):
    if value < 0 and form == "${}":
        form = "-${}"
        text = form.format(f"{-value:,}")
    else:
        text = form.format(f"{value:,}")
    assert parse_number(text) == value
    assert answers_equal(text, str(value), "number")


@pytest.mark.parametrize(
    ("reference", "gold"),
    [
        ("She has 3 + 4 = <<3+4=7>>7.\n#### 7", GoldAnswer("7", "number")),
        ("#### 1,000", GoldAnswer("1,000", "number")),
        ("43", GoldAnswer("43", "number")),
        (" 0.5 ", GoldAnswer("0.5", "number")),
        (r"Therefore, $r = \boxed{3}.$The answer is: 3", GoldAnswer("3", "math")),
        (r"\boxed{(-\infty, 2)}", GoldAnswer(r"(-\infty, 2)", "math")),
        ("Evelyn", GoldAnswer("Evelyn", "math")),
        (r"#### \frac{1}{2}", GoldAnswer(r"\frac{1}{2}", "math")),
    ],
)
def test_gold_answers(reference, gold):
    assert GoldAnswer.parse(reference) == Problem("q", reference).gold == gold


@pytest.mark.parametrize(
    "text",
    [
        "7", "-7", "\N{MINUS SIGN}7", "1,234", "$5", "-$5", r"\$18", "$1,234.50 per day", ".5",
        "\u20ac5", "5 \u20ac", "USD 5",
        "12 apples", "12 apples.", "50%", r"50\%", "3/4", "-3 / 4 cups",
        "60 km/h", "20 \u00b0C", "$42$",
    ],
)  # fmt: skip
def test_a_number_with_units_is_one(text):
    assert GoldAnswer.parse(text).kind == GoldAnswer.parse(f"#### {text}").kind == "number"


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"\frac{3}{56}", r"\frac{3}{56}", "3"),
        (r"\frac{3}{56}", "3/56", "56"),
        ("x^2 + 3", "3 + x^2", "2"),
        ("6 - 5i", "-5i + 6", "6"),
        (r"2\sqrt{3}", r"\sqrt{12}", "2"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", "3"),
        (r"11\sqrt2", r"11\sqrt{2}", "11"),
        ("2 x", "2x", "2"),
        ("5!", "120", "5"),
        ("3 1/2", "3 1/2", "3"),
        ("10,15", "15,10", "10"),
        (r"90^\circ", "90", "9"),
        (r"x \in [-2,7]", "[-2,7]", "7"),
        ("x = 5", "5", "6"),
        (r"\text{(C)}", "(C)", "(D)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "2"),
    ],
)
def test_a_text_with_numbers_is_an_expression(gold, right, wrong):
    parsed = GoldAnswer.parse(gold)
    assert parsed == GoldAnswer(gold, "math")
    pytest.importorskip("math_verify")
    assert parsed.is_right(f"The answer is {right}.")
    assert parsed.is_right(f"So we have $\\boxed{{{right}}}$.")
    assert not parsed.is_right(f"The answer is {wrong}.")
    assert not parsed.is_right(f"So we have $\\boxed{{{wrong}}}$.")


EQUATIONS = [  # gold answer, what it says alone, right, wrong
    ("3 + 4 = 7", "7", ["7", "$7", "7.0", "3 + 4 = 7", "2 + 5 = 7", "x = 7"], ["8", "3", "3 + 4 = 8"]),
    ("3 + 4 = 7 apples", "7 apples", ["7", "7 apples"], ["4"]),
    ("1 + 2 + 3 = 3 + 3 = 6", "6", ["6"], ["3"]),
    ("1,000 + 1 = 1,001", "1,001", ["1001"], ["1000"]),
    (r"$3 \cdot \$4 = \$12$", r"\$12", ["12", "$12"], ["3"]),
    ("3 \N{MINUS SIGN} 4 = \N{MINUS SIGN}1", "-1", ["-1"], ["1"]),
    ("5! = 120", "120", ["120"], ["5"]),
    (r"\boxed{3 + 4 = 7}", r"\boxed{7}", ["7", "14/2", "3 + 4 = 7", "7 = 3 + 4"], ["8", "3 + 4 = 8"]),
    (r"\(\frac{1}{2} + \frac{1}{4} = \frac{3}{4}\)", r"\frac{3}{4}", ["3/4", "0.75", r"\frac{3}{4}"], ["1/2"]),
    (r"$2 \cdot \sqrt{3} = \sqrt{12}$", r"\sqrt{12}", [r"\sqrt{12}", r"2\sqrt{3}"], ["12"]),
    (r"3 \cdot 4 = 12 \text{ cm}", r"12 \text{ cm}", ["12"], ["3"]),
    (r"30^\circ + 60^\circ = 90^\circ", r"90^\circ", ["90", r"90^\circ"], ["30"]),
    ("7 = 3 + 4", "3 + 4", ["7", "3 + 4"], ["8"]),
]


@pytest.mark.parametrize(("gold", "alone", "right", "wrong"), EQUATIONS)
def test_an_equation_of_arithmetic_says_what_its_right_side_says(gold, alone, right, wrong):
    parsed = GoldAnswer.parse(gold)
    assert parsed.kind == GoldAnswer.parse(alone).kind
    if parsed.kind == "math":
        pytest.importorskip("math_verify")
    assert parsed.is_readable
    for answer in [*right, *wrong]:
        for judge in (parsed, GoldAnswer.parse(alone)):
            assert judge.is_right(f"The answer is {answer}.") is (answer in right), (judge, answer)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("x = 5", ["5", "x = 5", "5 = x"], ["6", "y = 5", "2 + 3 = 5"]),
        ("5 = x", ["x = 5"], ["5", "x"]),
        ("y = 2x + 1", ["2x+1", "y = 2x + 1", "1 + 2x"], ["2x", "1"]),
        ("2x + 1 = y", ["y = 2x + 1"], ["2x + 1", "y"]),
        ("x = 3 + 4 = 7", ["7", "x = 7"], ["3"]),
        ("x + 1 = 6", ["x + 1 = 6"], ["6"]),
        ("5 = 2x + 1", ["5 = 2x + 1"], ["5", "2x + 1"]),
        ("3 + 4 = x", ["x = 7"], ["x", "3"]),
        ("x^2 + y^2 = 25", ["x^2 + y^2 = 25"], ["25"]),
        ("f(2) = 7", ["f(2) = 7"], ["7"]),
        ("2 + 3 = 5, 1 + 1 = 2", [], ["2"]),
        ("5 != 4", ["5 != 4"], ["4"]),
        ("3 + 4 <= 7", [], ["7"]),
    ],
)
def test_other_equations_are_left_to_math_verify(gold, right, wrong):
    math_verify = pytest.importorskip("math_verify")
    assert GoldAnswer.parse(gold) == GoldAnswer(gold, "math")
    for answer in [*right, *wrong]:
        expected = math_verify.verify(*(math_verify.parse(f"\\boxed{{{text}}}") for text in (gold, answer)))
        assert answers_equal(answer, gold, "math") is expected is (answer in right), answer


@pytest.mark.parametrize("text", ["3pi", "3 pi", "2xy", "minus 5", "5 - 3", "3:30", "5 m", "log 5", "- 5"])
def test_what_is_perhaps_no_number_is_an_expression(text):
    assert GoldAnswer.parse(text).kind == "math"


@pytest.mark.parametrize(
    ("entry", "answer", "gold"),
    [
        ({"solution": r"So \boxed{\frac{1}{2}}."}, r"So \boxed{\frac{1}{2}}.", GoldAnswer(r"\frac{1}{2}", "math")),
        ({"solution": r"So \boxed{3}.", "answer": "3"}, r"So \boxed{3}.", GoldAnswer("3", "math")),
        ({"solution": "Two and\none.", "answer": " 3 "}, "Two and\none.\n#### 3", GoldAnswer("3", "number")),
        ({"answer": r"\frac{1}{2}"}, r"\frac{1}{2}", GoldAnswer(r"\frac{1}{2}", "math")),
        ({"question": "q", "answer": "3", "solution": r"\boxed{4}"}, "3", GoldAnswer("3", "number")),
    ],
)
def test_the_keys_of_math(entry, answer, gold):
    (problem,) = load_problems([{"problem": "q", "level": "Level 5", **entry}])
    assert problem == Problem("q", answer)
    assert problem.gold == gold


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"problem": " ", "solution": "s"}, r"problems\[0\].problem: expected non-empty text"),
        ({"problem": "p"}, r"problems\[0\].answer: expected non-empty text"),
        ({"problem": "p", "solution": 3}, r"problems\[0\].solution: expected non-empty text"),
        ({"problem": "p", "solution": "no box", "answer": 3}, r"problems\[0\].answer: expected non-empty text"),
    ],
)
def test_unusable_keys_of_math(entry, message):
    with pytest.raises(ArgumentError, match=message):
        load_problems([entry])


@pytest.mark.parametrize("reference", ["", "  ", r"\boxed{}", r"\boxed{ }"])
def test_a_reference_without_an_answer_is_refused(reference):
    with pytest.raises(ArgumentError, match="answer: expected a final answer"):
        GoldAnswer.parse(reference)


def test_right_answers():
    gold = GoldAnswer.parse("3 * 6 = 18\n#### 18")
    assert gold.is_right("The answer is $18.00.")
    assert gold.is_right("3 * 6 makes 18")
    assert not gold.is_right("3 * 6 makes 18", complete=False)
    assert not gold.is_right("The answer is 18.5.")
    assert not gold.is_right("The answer is unknown.")
    assert not gold.is_right("")
    assert not gold.is_right(r"\boxed{\frac{18}{56}}")
    assert not gold.is_right(r"The answer is 18\sqrt{3}.")


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{6}{2}", "3", True),
        ("2x + 1", "1 + 2x", True),
        (r"(1, 2)", r"\left( 1, 2 \right)", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("3", "4", False),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        ("}{", "3", False),
    ],
)
def test_mathematical_equality(answer, gold, equal):
    pytest.importorskip("math_verify")
    assert answers_equal(answer, gold, "math") is equal
