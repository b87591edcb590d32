"""`Experiment`: explore, train and compare, which every recipe does with a System 1 and its splits of problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llm2_fast
from llm2_fast.datacheck import DataCheck
from llm2_fast.evaluation.report import ACCURACY, EvaluationReport
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.models.loading import load_model
from llm2_fast.problems import load_problems
from recipes.solutions import train_on_solutions
from recipes.stages import Stages

BETAS = (0.125, 0.25, 0.5, 1.0, 2.0)
PAPER_BETA = 0.25
CONTROL = "fine-tuned"


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        sampled: Test problems that are sampled.
        samples: Of each.
        max_new_tokens: Of an answer and of a continuation.
        max_batch_size: Sequences decoded together.
        exploration: Options of `llm2_fast.explore`.
        verifiers: Options of `llm2_fast.train_verifier` by kind.
        control: Epochs, learning rate and batch size of the control; none is made if None.
    """

    sampled: int
    samples: int
    max_new_tokens: int
    max_batch_size: int
    exploration: Mapping[str, Any]
    verifiers: Mapping[str, Mapping[str, Any]]
    control: Mapping[str, Any] | None


class Experiment:
    """One System 1, verifiers of every kind for it, and a control; every result is a stage.

    Args:
        stages: In whose directory everything lies: `train.jsonl`, `validation.jsonl` and `test.jsonl`.
        system1: A model directory, or what else `llm2_fast.load` takes.
        settings: How much of everything.
        seed: Of everything.
    """

    def __init__(self, stages: Stages, system1: str | Path, settings: Settings, seed: int) -> None:
        self.stages, self.system1, self.settings, self.seed = stages, system1, settings, seed
        self.directory = stages.directory

    def run(self) -> None:
        """Everything; `recipes.report` makes tables of the results."""
        run, kinds = self.stages.run, self.settings.verifiers
        run("explore", self.explore)
        for kind in kinds:
            run(f"train {kind}", lambda kind=kind: self.train(kind))
        if self.settings.control is not None:
            run("control", lambda: self.fine_tune(self.system1, "train", CONTROL, **self.settings.control))
        for kind in kinds:
            run(f"betas, {kind}", lambda kind=kind: self.compare_betas(kind))
        betas = {kind: self.chosen_beta(kind) for kind in kinds}
        for kind, beta in betas.items():
            arguments = (self.system1, kind, beta, self.plain_of_first("greedy", kind))
            run(f"greedy, {kind}", lambda arguments=arguments: self.greedy(*arguments))
        if self.settings.control is not None:
            run("greedy, control", lambda: self.greedy(self.directory / CONTROL, None))
        if self.settings.control is not None and "full" in kinds:
            plain = self.directory / f"greedy-{CONTROL}"
            run("greedy, full on control", lambda: self.greedy(self.directory / CONTROL, "full", betas["full"], plain))
        for kind, beta in betas.items():
            run(f"sampled, {kind}", lambda kind=kind, beta=beta: self.sample(kind, beta))

    def problems(self, split: str) -> Path:
        """The file of a split."""
        return self.directory / f"{split}.jsonl"

    def explore(self, name: str = "supervision", split: str = "train", **options: Any) -> dict[str, float]:
        """Supervision out of a split, and what it cost."""
        llm2_fast.explore(
            self.system1,
            self.problems(split),
            self.directory / name,
            max_new_tokens=self.settings.max_new_tokens,
            max_batch_size=self.settings.max_batch_size,
            seed=self.seed,
            **{**self.settings.exploration, **options},
        )
        report = ExplorationReport.read(self.directory / name)  # of interrupted runs, too
        return {**report.to_json(), "tokens_per_second": report.tokens_per_second}

    def train(self, kind: str, name: str | None = None, supervision: str = "supervision") -> dict[str, Any]:
        """A verifier; its pairwise accuracy on the held-out tenth of the supervision."""
        result = llm2_fast.train_verifier(
            self.system1,
            self.directory / supervision,
            kind,
            output_dir=self.directory / (name or kind),
            resume=True,
            seed=self.seed,
            **self.settings.verifiers[kind],
        )
        return {"training_pairs": result.num_pairs, **dataclasses.asdict(result.heldout_plausible)}

    def fine_tune(self, model: str | Path, split: str, name: str, **options: Any) -> None:
        """Teach a model the very solutions of a split; `options` are those of `train_on_solutions`."""
        loaded = load_model(model, dtype="float32")
        problems = load_problems(self.problems(split))
        train_on_solutions(loaded.model, loaded.tokenizer, problems, self.directory / name, seed=self.seed, **options)

    def compare_betas(self, verifier: str) -> dict[str, Any]:
        """Greedy decoding of the validation split."""
        options = {"sweep": {"beta": BETAS}, "beta": PAPER_BETA, "plain": self.plain_of_first("validation", verifier)}
        return self.evaluate(self.system1, verifier, "validation", f"validation-{verifier}", **options)

    def chosen_beta(self, verifier: str) -> float:
        """The best on the validation split, where betas have been compared."""
        return choose_beta(EvaluationReport.from_json(self.stages.result(f"betas, {verifier}")))

    def greedy(
        self, model: str | Path, verifier: str | None, beta: float = PAPER_BETA, plain: Path | None = None
    ) -> dict[str, Any]:
        """Greedy decoding of the test split, plainly, with a beta and with the paper's; see `evaluate` for `plain`."""
        name = "-".join(["greedy", *([CONTROL] if model != self.system1 else []), *([verifier] if verifier else [])])
        sweep = {"sweep": {"beta": [PAPER_BETA]}, "beta": beta} if verifier else {}
        return self.evaluate(model, verifier, "test", name, plain=plain, **sweep)

    def sample(self, verifier: str, beta: float) -> dict[str, Any]:
        """Several samples of each of the first test problems."""
        options = {"limit": self.settings.sampled, "n": self.settings.samples, "temperature": 1.0, "beta": beta}
        options["plain"] = self.plain_of_first("sampled", verifier)
        return self.evaluate(self.system1, verifier, "test", f"sampled-{verifier}", **options)

    def plain_of_first(self, decoding: str, verifier: str) -> Path | None:
        """Where the first kind's evaluation has decoded plainly, for the other kinds."""
        first = next(iter(self.settings.verifiers))
        return None if verifier == first else self.directory / f"{decoding}-{first}"

    def evaluate(
        self,
        model: str | Path,
        verifier: str | None,
        split: str,
        name: str,
        limit: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """`EvaluationReport.to_json` of a model with a verifier of this experiment, or of its plain decoding.

        `options` are those of `llm2_fast.evaluate`: `plain` is the directory of an evaluation with another verifier,
        whose plain decoding is taken over.
        """
        engine = llm2_fast.load(
            model, None if verifier is None else self.directory / verifier, max_batch_size=self.settings.max_batch_size
        )
        problems = load_problems(self.problems(split))[:limit]
        options = {"max_new_tokens": self.settings.max_new_tokens, "seed": self.seed, **options}
        return llm2_fast.evaluate(engine, problems, self.directory / name, **options).to_json()


def choose_beta(report: EvaluationReport) -> float:
    """The one with the best answers, the smaller of equals."""
    arms = [arm for arm in report.arms if arm.settings]
    return max(arms, key=lambda arm: (arm.metrics[ACCURACY].mean, -arm.settings["beta"])).settings["beta"]


def separate(validation: Path, test: Path, others: Sequence[Path]) -> None:
    """Drop what validation shares with test, and what other splits share with either."""
    drop_contaminated(validation, [test])
    for path in others:
        drop_contaminated(path, [validation, test])


def read_lines(path: Path) -> list[str]:
    """Lines that hold something. Only "\\n" ends one: JSON strings may hold what else Unicode calls a line's end."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """One after the other, each with its end."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def drop_contaminated(path: Path, test_paths: Sequence[Path]) -> None:
    """Drop the lines of a file that share a question, or 13 words in a row, with one of the other files."""
    check = DataCheck()
    check.check([path], test_paths)
    bad = {int(f.where.rpartition(":")[2]) for f in check.findings if f.kind == "contamination"}
    write_lines(path, (line for number, line in enumerate(read_lines(path), 1) if number not in bad))
