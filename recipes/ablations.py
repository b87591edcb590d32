"""What the arithmetic recipe leaves open: variants of its supervision, of alpha and beta, and of the problems.

Starts where `recipes.arithmetic` ended, in the same directory. Each variant is a stage, so the command can be stopped
and given again. Verifiers are of kind `full`, trained as in the recipe and compared on the same test problems.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import AutoTokenizer

from llm2_fast.evaluation.arms import PLAIN
from llm2_fast.evaluation.markdown import percent
from llm2_fast.evaluation.report import ACCURACY, EvaluationReport
from llm2_fast.supervision import SHARD_PATTERN, read_supervision
from recipes.arithmetic import Arithmetic, parse_arguments, write_problems
from recipes.experiment import PAPER_BETA, Experiment, drop_contaminated, read_lines, write_lines
from recipes.negatives import describe_negatives
from recipes.report import evaluation, steered_arms, table
from recipes.stages import Stages
from recipes.word_problems import generate_workshop

KIND = "full"
THRESHOLDS = (0.25, 0.75)  # besides 0.5, the recipe's
ALPHAS = (0.05, 0.1, 0.2, 0.4)
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)
OPERATIONS = (2, 3, 4)
VOCABULARIES = (128,)  # besides the recipe's, a token per word
COST = ("positions", "candidates", "rollouts", "new tokens")  # of exploration, per problem
LIKELIHOOD = {"quality": "likelihood", "threshold": math.log(0.5), "thresholds": ()}


class Ablations:
    """The variants, as stages.

    Args:
        arithmetic: Whose run they start from; what is missing of it is made first.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic, self.base, self.scale = arithmetic, arithmetic.experiment, arithmetic.scale
        self.stages = Stages(self.base.directory / "ablations", arithmetic.stages.options)
        self.experiment = Experiment(self.stages, self.base.system1, self.base.settings, self.base.seed)
        self.beta = PAPER_BETA

    def run(self) -> str:
        """Everything, then the report."""
        self.arithmetic.run()
        self.beta = self.base.chosen_beta(KIND)
        self.copy_problems()
        variants = [*self.thresholds(), *self.explorations()]
        operations = [(count, *self.operations(count)) for count in OPERATIONS]
        vocabularies = [self.words(), *(self.pieces(size) for size in VOCABULARIES)]
        self.stages.run("alpha and beta", self.grid)
        grid = evaluation(self.stages, "alpha and beta")
        text = "\n\n".join(
            [
                f"Supervision that a `{KIND}` verifier is trained on; greedy decoding of the test problems.",
                table(("supervision", "pairs", "rollouts", "plain", "beta", "right", "gain", "McNemar p"), variants),
                "Problems with more operations; System 1 and verifier as above, whose training problems have 3.",
                table(("operations", *COST, "plain", "beta", "right", "gain"), operations),
                "The recipe with half of the training problems: words as tokens, and words in pieces.",
                table(("tokens", *COST, "plain", "beta", "right", "gain"), vocabularies),
                "alpha and beta; in brackets the share of ambiguous steps.",
                table(("alpha", *(f"beta {beta:g}" for beta in BETAS)), grid_rows(grid)),
                "Negatives, and a sample of them.",
                describe_negatives(self.base.directory),
            ]
        )
        (self.stages.directory / "report.md").write_text(text, encoding="utf-8")
        return text

    def copy_problems(self) -> None:
        """The test split, and the half of the training split that costly variants share."""
        self.experiment.problems("test").write_bytes(self.base.problems("test").read_bytes())
        lines = read_lines(self.base.problems("train"))
        write_lines(self.experiment.problems("half"), lines[: len(lines) // 2])

    def thresholds(self) -> Iterator[tuple[Any, ...]]:
        """Negatives by another threshold, from the qualities that the recipe's exploration measured."""
        results = (self.base.stages.result(f"train {KIND}"), evaluation(self.base.stages, f"greedy, {KIND}"))
        yield from _rows("Q < 0.5, the recipe", "as the recipe", *results)
        explored = read_supervision(self.base.directory / "supervision")
        for threshold in THRESHOLDS:
            name = f"threshold-{threshold}"
            directory = self.stages.directory / name
            directory.mkdir(exist_ok=True)
            lines = (example.with_threshold(threshold).to_json() for example in explored.examples)
            write_lines(directory / SHARD_PATTERN.replace("*", "00000"), lines)
            yield from self._variant(f"Q < {threshold}", name, "as the recipe")

    def explorations(self) -> Iterator[tuple[Any, ...]]:
        """Other ways to tell negatives, with half of the training problems each, since continuations take time."""
        for name, label, options in (
            ("answers", "half of the problems: Q < 0.5", {}),
            ("bypass", "half: every candidate (bypass)", {"bypass": True}),
            ("likelihood", "half: the answer's likelihood per token < 0.5", LIKELIHOOD),
        ):
            stage = f"explore, {name}"
            report = self.stages.run(
                stage, lambda name=name, options=options: self.experiment.explore(name, "half", **options)
            )
            yield from self._variant(label, name, f"{report['rollouts']:,}")

    def _variant(self, label: str, supervision: str, rollouts: str) -> Iterator[tuple[Any, ...]]:
        """Train a verifier on supervision and try it."""
        name = f"{KIND}-{supervision}"
        trained = self.stages.run(f"train, {supervision}", lambda: self.experiment.train(KIND, name, supervision))
        plain = self.base.directory / f"greedy-{KIND}"
        self.stages.run(
            f"greedy, {supervision}", lambda: self.experiment.greedy(self.base.system1, name, self.beta, plain)
        )
        yield from _rows(label, rollouts, trained, evaluation(self.stages, f"greedy, {supervision}"))

    def operations(self, count: int) -> tuple[Any, ...]:
        """What exploring costs with more operations, and what the recipe's verifier gains."""
        split = f"{count}-operations"
        self.stages.run(f"data, {split}", lambda: self.make_problems(split, count))
        cost = self.stages.run(f"explore, {split}", lambda: self.experiment.explore(f"{split}-supervision", split))
        self.stages.run(
            f"greedy, {split}",
            lambda: self.base.evaluate(
                self.base.system1, KIND, f"ablations/{split}", f"ablations/greedy-{split}", beta=self.beta
            ),
        )
        return *_cost(cost), *self._right_at_beta(evaluation(self.stages, f"greedy, {split}"))

    def make_problems(self, split: str, operations: int) -> None:
        """Problems with so many operations that neither System 1 nor the verifier has learnt."""
        number, path = max(10, self.scale.test // 4), self.experiment.problems(split)
        write_problems(path, islice(generate_workshop(f"{self.base.seed} {split}", operations), number))
        drop_contaminated(path, [self.base.problems("train"), self.base.problems("mixture")])

    def words(self) -> tuple[Any, ...]:
        """What exploring half of the problems costs in the recipe, and what it brings."""
        tokenizer = AutoTokenizer.from_pretrained(self.base.system1)
        right = self._right_at_beta(evaluation(self.stages, "greedy, answers"))
        return len(tokenizer), *_cost(self.stages.result("explore, answers")), *right

    def pieces(self, vocab_size: int) -> tuple[Any, ...]:
        """The same with another tokenizer, so with another System 1. Texts take up to twice as many tokens."""
        settings = dataclasses.replace(self.scale.settings, max_new_tokens=2 * self.scale.settings.max_new_tokens)
        scale = dataclasses.replace(self.scale, train=self.scale.train // 2, settings=settings, vocab_size=vocab_size)
        stages = Stages(self.stages.directory / f"vocabulary-{vocab_size}", dataclasses.asdict(scale))
        recipe = Arithmetic(stages, scale, self.base.seed)
        recipe.prepare()
        experiment = recipe.experiment
        cost = stages.run("explore", experiment.explore)
        stages.run("train", lambda: experiment.train(KIND))
        stages.run("greedy", lambda: experiment.greedy(experiment.system1, KIND, self.beta))
        return vocab_size, *_cost(cost), *self._right_at_beta(evaluation(stages, "greedy"))

    def _right_at_beta(self, report: EvaluationReport) -> tuple[str, ...]:
        """`_right` with the recipe's beta, without its last column."""
        return next(row[:-1] for row in _right(report) if row[1] == f"{self.beta:g}")

    def grid(self) -> dict[str, Any]:
        """Every alpha with every beta on the validation split."""
        options = {"sweep": {"alpha": ALPHAS, "beta": BETAS}, "plain": self.base.directory / f"validation-{KIND}"}
        return self.base.evaluate(self.base.system1, KIND, "validation", "ablations/grid", **options)


def _cost(report: dict[str, Any]) -> Iterator[str]:
    """The columns `COST`."""
    for name in ("explored_positions", "candidates", "rollouts", "generated_tokens"):
        yield f"{report[name] / report['problems']:.1f}"


def _rows(label: str, rollouts: str, trained: dict[str, Any], report: EvaluationReport) -> Iterator[tuple[str, ...]]:
    """What a verifier learnt from, and by beta what came of it."""
    for right in _right(report):
        yield label, f"{trained['training_pairs']:,}", rollouts, *right


def _right(report: EvaluationReport) -> Iterator[tuple[str, ...]]:
    """By beta: right plainly, beta, right with it, the gain and how likely it is by chance."""
    plain = percent(report.arm(PLAIN).metrics[ACCURACY])
    for arm in steered_arms(report):
        comparison = report.comparison(arm.name, PLAIN)
        right, gain = percent(arm.metrics[ACCURACY]), percent(comparison.difference, "+")
        yield plain, f"{arm.settings['beta']:g}", right, gain, f"{comparison.p_value:.1g}"


def grid_rows(report: EvaluationReport) -> Iterable[tuple[str, ...]]:
    """A row per alpha, a column per beta."""
    arms = {(arm.settings["alpha"], arm.settings["beta"]): arm for arm in steered_arms(report)}
    for alpha in ALPHAS:
        row = (arms[alpha, beta] for beta in BETAS)
        cells = (f"{100 * arm.metrics[ACCURACY].mean:.1f} ({100 * arm.ambiguous_share:.1f} %)" for arm in row)
        yield f"{alpha:g}", *cells


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.ablations", description=__doc__.splitlines()[0])
    print(Ablations(parse_arguments(parser, arguments)).run())


if __name__ == "__main__":
    main()
