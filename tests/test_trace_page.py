"""The page of a trace: whole, self-contained, and nothing in it is taken for markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

import tiny
import tiny_tokenizer
from llm2_fast import GenerationConfig
from llm2_fast.cli import main
from llm2_fast.cli.trace_page import margin, trace_page
from llm2_fast.results import Generation, GenerationStats, Sample, TraceStep
from verifiers import head_verifier

_VOID = {"meta"}
CONFIG = GenerationConfig(beta=0.5, trace=True)


class Page(HTMLParser):
    """Checks that tags are balanced and collects what is in them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def classes(self):
        return [value for name, value in self.attributes if name == "class" and value.startswith("token")]


class StubTokenizer:
    """Tokens are the texts of a list."""

    all_special_ids = (0,)

    def __init__(self, *texts):
        self._texts = ["<|end|>", *texts]

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(self._texts[i] for i in token_ids if not (skip_special_tokens and i == 0))


def step(token, *, ids=None, scores=None, adjusted=(0.0,), system1=None):
    ids = (token,) if ids is None else ids
    return TraceStep(ids, (-0.5,) * len(ids), scores, adjusted, token if system1 is None else system1, token)


def generation(*steps, prompt=(1,), error=None):
    sample = Sample([s.token_id for s in steps], None, "error" if error else "eos", error, trace=list(steps))
    return Generation(list(prompt), [sample], GenerationStats(steps=len(steps), ambiguous_steps=1, interventions=1))


def test_text_is_not_markup():
    evil = ["<script>alert(1)</script>", "</div>&amp;", '" onclick="x', "'><img src=x>"]
    steps = [step(i, ids=(i, i % 4 + 1), scores=(0.1, 0.2), adjusted=(1.0, 0.0)) for i in range(1, 5)]
    text = trace_page(generation(*steps, prompt=[1, 2, 3, 4], error=evil[0]), StubTokenizer(*evil), CONFIG, evil[0])
    page = Page(text)
    assert {"script", "img", "link", "a", "iframe"}.isdisjoint(page.tags)
    assert all(
        name in {"class", "tabindex", "lang", "charset", "name", "content", "http-equiv"} for name, _ in page.attributes
    )
    for token in evil:
        assert page.text.count(token) >= 2
    assert evil[0] in page.text.partition("finish reason: error: ")[2]


def test_nothing_is_fetched():
    text = trace_page(generation(step(1)), StubTokenizer("word"), CONFIG, "title")
    assert "default-src 'none'" in text
    assert re.findall(r"(?:src|href)\s*=|url\(|@import|https?:", text) == []


def test_tokens_are_coloured_by_intervention_and_margin():
    tokenizer = StubTokenizer("one", "two")

    def decided_by(difference):
        return step(1, ids=(1, 2), scores=(0.0, 0.0), adjusted=(difference, 0.0))

    steps = [decided_by(difference) for difference in (0.0, 0.3, 0.7, 1.5, 2.0, -0.1)]
    steps += [step(2, ids=(1, 2), scores=(0.0, 4.0), adjusted=(0.0, 1.0), system1=1), step(1)]
    assert [margin(s) for s in steps] == [0.0, 0.3, 0.7, 1.5, 2.0, -0.1, 1.0, None]
    page = Page(trace_page(generation(*steps), tokenizer, CONFIG, "title"))
    kinds = ["close0", "close1", "close2", "close3", "clear", "below", "changed", "clear"]
    assert page.classes() == [f"token {kind}" for kind in kinds]
    assert 'step 7: System 1 "one" (1), System 2 "two" (2), margin +1.000' in page.text


def test_candidates_have_logits_scores_and_adjusted_logits():
    scored = step(1, ids=(1, 2), scores=(2.0, -1.0), adjusted=(3.0, 1.5))
    text = trace_page(generation(scored, step(2)), StubTokenizer("one", "two"), CONFIG, "title")
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr[ >].*?</tr>", text)]
    assert [row for row in rows if row] == [
        ["&quot;one&quot; (1)", "60.7%", "2.000", "+2.000", "3.000"],  # z = z* - beta * s
        ["&quot;two&quot; (2)", "60.7%", "2.000", "-1.000", "1.500"],
        ["&quot;two&quot; (2)", "60.7%", "0.000", "not needed", "0.000"],
    ]
    assert text.count('class="chosen"') == 2


def test_special_tokens_parts_of_characters_and_line_ends_can_be_pointed_at():
    steps = [step(2), step(1), step(0)]
    page = Page(trace_page(generation(*steps), StubTokenizer("a\nb", "\N{REPLACEMENT CHARACTER}"), CONFIG, "title"))
    assert len(page.classes()) == 3
    for shown in ("\N{WHITE VERTICAL RECTANGLE}", "↵", "<|end|>"):
        assert shown in page.text


def test_ids_without_a_tokenizer():
    page = Page(trace_page(generation(step(17), prompt=[3, 4]), None, CONFIG, "title"))
    assert "[3, 4]" in page.text
    assert "17 step 1" in page.text


# --- The command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("checkpoints"), tiny.causal_lm("llama")
    model.save_pretrained(root / "model")
    tiny_tokenizer.tokenizer().save_pretrained(root / "model")
    head_verifier(model).save_pretrained(root / "verifier")
    return root


def test_trace(saved, tmp_path):
    flags = [
        f"--verifier={saved / 'verifier'}",
        "--max-new-tokens=12",
        "--beta=3",
        "--n=2",
        "--temperature=1",
        "--chat",
    ]
    assert main(["trace", str(saved / "model"), "w7 w8", *flags, f"--html={tmp_path / 'page.html'}"]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "model with a head verifier" in page.text
    assert "user w7 w8 assistant" in page.text
    assert "Sample 1" in page.text
    assert "token changed" in page.classes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--html=x"], "prompt: expected one prompt, got 2 prompts"),
        (["a", "--html=no/such/place/x"], "--html: expected a file in a directory that is there"),
        (["a"], "required: --html"),
    ],
)
def test_unusable_flags(arguments, message, capsys):
    assert main(["trace", "no/model", "--verifier=v", *arguments]) == 2
    assert message in capsys.readouterr().err
