"""What README.md and docs/ say can be run: their Python on a tiny model, their commands as far as they parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm2_fast
import tiny
import tiny_tokenizer
from llm2_fast.cli import parse
from llm2_fast.models import smollm2
from verifiers import head_verifier

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/embedding.md",
    "docs/evaluation.md",
    "docs/supervision.md",
    "docs/training.md",
    "docs/verifiers.md",
)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], None]:
    """Puts a tiny model and a verifier where the pages look for those of the demo. The working directory is empty."""

    def save(model: PreTrainedModel) -> None:
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.tokenizer().save_pretrained(tmp_path / "model")
        head_verifier(model).save_pretrained(tmp_path / "verifier")

    monkeypatch.setattr(smollm2, "model_file", lambda: tmp_path / "model")
    monkeypatch.setattr(smollm2, "default_verifier", lambda: tmp_path / "verifier")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return save


def run(page: str) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other, and return the names they leave."""
    names: dict[str, Any] = {}
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture
def trainable() -> PreTrainedModel:
    """A tiny model that can be trained on the examples: their words are unknown, token 0, and as good as any other."""
    model = tiny.causal_lm("llama")
    with torch.no_grad():
        favourite = model(torch.zeros(1, 8, dtype=torch.long)).logits[0, -1].argmax()
        model.lm_head.weight[0] = model.lm_head.weight[favourite]
    return model


def test_readme(
    stand_in: Callable[[PreTrainedModel], None], trainable: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(trainable)
    names = run("README.md")
    assert names["generation"].text in capsys.readouterr().out
    assert len(names["samples"]) == 4
    assert llm2_fast.Verifier.from_pretrained("my-verifier").kind == "head"


def test_embedding_gives_the_tokens_of_the_engine(stand_in: Callable[[PreTrainedModel], None]) -> None:
    stand_in(tiny.causal_lm("llama"))
    names = run("docs/embedding.md")
    engine = llm2_fast.load(smollm2.model_file(), smollm2.default_verifier())
    (expected,) = engine.generate("The capital of Australia is", max_new_tokens=names["MAX_NEW_TOKENS"])
    tokens = expected.prompt_token_ids + expected.samples[0].token_ids
    assert expected.stats.interventions > 0
    assert names["token_ids"] == tokens
    assert names["output"][0].tolist() == tokens


def test_supervision(stand_in: Callable[[PreTrainedModel], None], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(tiny.causal_lm("llama"))
    names = run("docs/supervision.md")
    assert names["report"].pairs == len(names["example"].samples) > 0
    assert f"{names['report'].rollouts} continuations" in capsys.readouterr().out


def test_training(stand_in: Callable[[PreTrainedModel], None], trainable: PreTrainedModel) -> None:
    stand_in(trainable)
    names = run("docs/training.md")
    assert names["result"].num_pairs > 0
    assert names["engine"].verifier.kind == "lora"


def test_evaluation(stand_in: Callable[[PreTrainedModel], None], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(tiny.causal_lm("llama"))
    names = run("docs/evaluation.md")
    assert [arm.name for arm in names["report"].arms] == ["plain", "truncated", "verified", "verified, beta 0.5"]
    assert "verified maj@4 against plain" in capsys.readouterr().out


def test_commands_parse() -> None:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {command[0] for command in commands} == {"cmake", "llm2-fast", "make", "pip"}
    for program, *arguments in commands:
        if program == "llm2-fast":
            assert callable(parse(arguments).run)
        elif program == "make":
            assert set(arguments) <= set(targets)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / page).parent / link).is_file()] == []
