"""The paper's setting in small: does a verifier from a target domain improve a generalist that is middling there?

A small Llama (System 1) learns a mixture of generated word problems from scratch, of which the target kind is a part. On the
target's training split, tokens that lead astray are explored and verifiers of all kinds trained. Beside them stands a
control, System 1 fine-tuned on the same problems. beta is chosen on a validation split; nothing is chosen on the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

import llm2_fast
from llm2_fast.datacheck import DataCheck
from llm2_fast.evaluation.markdown import to_markdown
from llm2_fast.evaluation.report import EvaluationReport
from llm2_fast.problems import load_problems
from recipes.stages import Stages
from recipes.system1 import make_model, train_on_solutions
from recipes.tokenizer import make_tokenizer
from recipes.word_problems import KINDS, TARGET, generate

BETAS = (0.25, 0.5, 1.0, 2.0)
PAPER_BETA = 0.25
MAX_NEW_TOKENS = 48
SPLITS = ("mixture", "train", "validation", "test")


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        mixture: Problems System 1 learns from, each once.
        target_share: Of the target kind among them.
        hidden_size, num_layers: Of System 1.
        train, validation, test: Problems of the target kind.
        sampled: Of the test problems, those that are sampled 20 times.
        rollouts: Continuations per candidate.
        epochs: Over the supervision, for head, and for lora, full and the control.
    """

    mixture: int
    target_share: float
    hidden_size: int
    num_layers: int
    train: int
    validation: int
    test: int
    sampled: int
    rollouts: int
    epochs: tuple[int, int]


FULL = Scale(100_000, 0.15, 96, 3, 2000, 500, 2000, 300, 10, (30, 8))
QUICK = Scale(2000, 0.5, 64, 2, 40, 20, 40, 8, 2, (2, 2))
VERIFIERS: dict[str, dict[str, Any]] = {
    "head": {"mlp_size": 256, "learning_rate": 2e-3},
    "lora": {"learning_rate": 3e-3, "batch_size": 32, "per_device_batch_size": 32},
    "full": {"learning_rate": 1e-3, "batch_size": 32, "per_device_batch_size": 32},
}


class Recipe:
    """The stages, in the order in which they run.

    Args:
        output: Directory of everything that is made.
        scale: How much of it.
        seed: Of everything.
    """

    def __init__(self, output: Path, scale: Scale, seed: int) -> None:
        self.output, self.scale, self.seed = output, scale, seed
        self.stages = Stages(output, {"recipe": "arithmetic", "seed": seed, **dataclasses.asdict(scale)})

    def run(self) -> None:
        """Everything, then the report."""
        self.stages.run("data", self.make_data)
        self.stages.run("System 1", self.train_system1)
        self.stages.run("explore", self.explore)
        accuracies = {kind: self.stages.run(f"train {kind}", lambda kind=kind: self.train(kind)) for kind in VERIFIERS}
        self.stages.run("fine-tune", self.fine_tune)
        betas = {
            kind: self.stages.run(f"choose beta, {kind}", lambda kind=kind: self.choose_beta(kind))
            for kind in VERIFIERS
        }
        greedy = {
            kind: self.stages.run(f"greedy, {kind}", lambda kind=kind: self.test(kind, betas[kind]))
            for kind in VERIFIERS
        }
        greedy["fine-tuned"] = self.stages.run("greedy, fine-tuned", self.test_fine_tuned)
        greedy["full on fine-tuned"] = self.stages.run(
            "greedy, full on fine-tuned", lambda: self.test_on_fine_tuned(betas["full"])
        )
        sampled = {
            kind: self.stages.run(f"maj@20, {kind}", lambda kind=kind: self.sample(kind, betas[kind]))
            for kind in VERIFIERS
        }
        text = self.report(accuracies, betas, greedy, sampled)
        (self.output / "report.md").write_text(text, encoding="utf-8")
        print(text)

    def problems(self, split: str) -> Path:
        """The file of a split."""
        return self.output / f"{split}.jsonl"

    def make_data(self) -> dict[str, int]:
        """Write the splits. What `llm2-fast data check` finds shared with validation or test is dropped before."""
        counts = {split: getattr(self.scale, split) for split in SPLITS}
        share = {kind: (1 - self.scale.target_share) / (len(KINDS) - 1) for kind in KINDS}
        share[TARGET] = self.scale.target_share
        mixture = [
            p
            for kind in KINDS
            for p in islice(generate(kind, f"{self.seed} mixture"), int(counts["mixture"] * share[kind]))
        ]
        random.Random(self.seed).shuffle(mixture)
        _write(self.problems("mixture"), mixture)
        for split in SPLITS[1:]:
            _write(self.problems(split), list(islice(generate(TARGET, f"{self.seed} {split}"), counts[split])))
        for split, later in (
            ("validation", ["test"]),
            ("train", ["validation", "test"]),
            ("mixture", ["validation", "test"]),
        ):
            _drop_contaminated(self.problems(split), [self.problems(other) for other in later])
        return {split: len(load_problems(self.problems(split))) for split in SPLITS}

    def train_system1(self) -> None:
        """The generalist."""
        problems = load_problems(self.problems("mixture"))
        tokenizer = make_tokenizer(text for problem in problems for text in (problem.question, problem.solution))
        model = make_model(tokenizer, self.scale.hidden_size, self.scale.num_layers, self.seed)
        options = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 48, "seed": self.seed}
        train_on_solutions(model, tokenizer, problems, self.output / "system1", **options)

    def explore(self) -> dict[str, float]:
        """Supervision out of the target's training split."""
        report = llm2_fast.explore(
            self.output / "system1",
            self.problems("train"),
            self.output / "supervision",
            n=self.scale.rollouts,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=self.seed,
            max_batch_size=128,
        )
        names = (
            "problems",
            "positions",
            "explored_positions",
            "candidates",
            "pairs",
            "rollouts",
            "spared_rollouts",
            "generated_tokens",
        )
        return {name: getattr(report, name) for name in names}

    def train(self, kind: str) -> dict[str, Any]:
        """A verifier; its pairwise accuracy on the held-out tenth of the supervision."""
        options = VERIFIERS[kind]
        if kind == "head":
            options = {**options, "layers": (*range(self.scale.num_layers - 1), -1)}
        result = llm2_fast.train_verifier(
            self.output / "system1",
            self.output / "supervision",
            kind,
            output_dir=self.output / kind,
            resume=True,
            epochs=self.scale.epochs[kind != "head"],
            seed=self.seed,
            **options,
        )
        return {"pairs": result.num_pairs, **dataclasses.asdict(result.heldout_plausible)}

    def fine_tune(self) -> None:
        """The control: System 1 learns the solutions that the verifiers' supervision stands on, as many epochs."""
        loaded = llm2_fast.load(self.output / "system1")
        problems = load_problems(self.problems("train"))
        options = {"epochs": self.scale.epochs[1], "learning_rate": 1e-3, "batch_size": 32, "seed": self.seed}
        train_on_solutions(loaded.model.model, loaded.tokenizer, problems, self.output / "fine-tuned", **options)

    def choose_beta(self, kind: str) -> float:
        """The best on the validation split, the smaller of equals."""
        report = self._evaluate("system1", kind, "validation", f"validation-{kind}", sweep={"beta": BETAS})
        steered = [arm for arm in report.arms if arm.settings]
        return max(steered, key=lambda arm: (arm.metrics["pass@1"].mean, -arm.settings["beta"])).settings["beta"]

    def test(self, kind: str, beta: float) -> dict[str, Any]:
        """Greedy decoding of the test split with the chosen beta and with the paper's."""
        report = self._evaluate("system1", kind, "test", f"greedy-{kind}", beta=beta, sweep={"beta": [PAPER_BETA]})
        return _summary(report)

    def test_fine_tuned(self) -> dict[str, Any]:
        """Greedy decoding of the control."""
        return _summary(self._evaluate("fine-tuned", None, "test", "greedy-fine-tuned"))

    def test_on_fine_tuned(self, beta: float) -> dict[str, Any]:
        """The full verifier, which is bound to a tokenizer only, on the control."""
        return _summary(self._evaluate("fine-tuned", "full", "test", "greedy-full-on-fine-tuned", beta=beta))

    def sample(self, kind: str, beta: float) -> dict[str, Any]:
        """20 samples per problem."""
        options = {"beta": beta, "temperature": 1.0, "n": 20 if self.scale.sampled >= 100 else 4}
        report = self._evaluate("system1", kind, "test", f"sampled-{kind}", limit=self.scale.sampled, **options)
        return _summary(report)

    def _evaluate(
        self, model: str, verifier: str | None, split: str, name: str, limit: int | None = None, **options: Any
    ) -> EvaluationReport:
        steering = None if verifier is None else self.output / verifier
        engine = llm2_fast.load(self.output / model, steering, max_batch_size=128)
        problems = load_problems(self.problems(split))[:limit]
        return llm2_fast.evaluate(
            engine, problems, self.output / name, max_new_tokens=MAX_NEW_TOKENS, seed=self.seed, **options
        )

    def report(
        self, accuracies: dict[str, Any], betas: dict[str, float], greedy: dict[str, Any], sampled: dict[str, Any]
    ) -> str:
        """All figures as Markdown."""
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}"
        parts = [f"{machine}. Data: {self.stages.run('data', dict)}. Exploration: {self.stages.run('explore', dict)}."]
        for kind, beta in betas.items():
            pairwise = accuracies[kind]
            parts.append(
                f"## {kind}, beta {beta}\n\nPairwise accuracy on {pairwise['num_pairs']} held-out pairs: "
                f"{pairwise['verifier']:.3f}; System 1 {pairwise['system1']:.3f}; both {pairwise['combined']:.3f}.\n\n"
                f"{greedy[kind]['markdown']}\n{sampled[kind]['markdown']}"
            )
        parts += [f"## {name}\n\n{greedy[name]['markdown']}" for name in ("fine-tuned", "full on fine-tuned")]
        times = "\n".join(f"| {name} | {seconds:.0f} |" for name, seconds in self.stages.seconds.items())
        return "\n\n".join([*parts, f"| stage | seconds |\n|---|---|\n{times}"]) + "\n"


def _summary(report: EvaluationReport) -> dict[str, Any]:
    return {"markdown": to_markdown(report), "report": report.to_json()}


def _write(path: Path, problems: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(problem)}\n" for problem in problems), encoding="utf-8")


def _drop_contaminated(path: Path, test_paths: list[Path]) -> None:
    """Drop the lines of a file that share a question, or 13 words in a row, with one of the test files."""
    check = DataCheck()
    check.check([path], test_paths)
    bad = {int(f.where.rpartition(":")[2]) for f in check.findings if f.kind == "contamination"}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for number, line in enumerate(lines, 1) if number not in bad), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.arithmetic", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="taken up where an earlier run stopped")
    parser.add_argument("--quick", action="store_true", help="so small that its figures say nothing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else FULL
    output = options.output or Path("build/recipes") / f"arithmetic{'-quick' if options.quick else ''}"
    start = time.perf_counter()
    Recipe(output, scale, options.seed).run()
    print(f"{time.perf_counter() - start:.0f} seconds; report: {output / 'report.md'}")


if __name__ == "__main__":
    main()
