"""The recipe for real problems: any Hugging Face instruct model, grade-school problems as files.

The model may be fine-tuned for a while on part of the training problems first, if its own answers are too bad for a
verifier to learn from. Then as in `recipes.arithmetic`: exploration, verifiers, the control, beta on held-out problems,
the comparison on others.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from llm2_fast.errors import ArgumentError
from llm2_fast.models import smollm2
from llm2_fast.problems import load_problems
from recipes.experiment import Experiment, Settings, read_lines, separate, write_lines
from recipes.report import write_report
from recipes.stages import Stages

KINDS = ("head", "lora", "full")


def make_settings(options: argparse.Namespace) -> Settings:
    """The paper's hyper-parameters, as far as the command line says nothing else."""
    network = {"epochs": options.epochs, "batch_size": 32, "per_device_batch_size": 4}
    verifiers: dict[str, dict[str, Any]] = {"head": {"mlp_size": 512}, "lora": network, "full": network}
    return Settings(
        sampled=options.sampled,
        samples=20,
        max_new_tokens=options.max_new_tokens,
        max_batch_size=64,
        exploration={"bypass": True} if options.bypass else {"n": options.rollouts, "max_positions": options.positions},
        verifiers={kind: verifiers[kind] for kind in options.kinds},
        control={"epochs": options.epochs, "learning_rate": 2e-5, "batch_size": 4} if options.control else None,
    )


class GradeSchool:
    """The splits and System 1, as stages.

    Args:
        stages: In whose directory they lie.
        options: Of the command line.
    """

    def __init__(self, stages: Stages, options: argparse.Namespace) -> None:
        self.stages, self.options = stages, options
        system1 = stages.directory / "system1" if options.fine_tune else options.model
        self.experiment = Experiment(stages, system1, make_settings(options), options.seed)

    def run(self) -> None:
        """Everything up to the results of the experiment."""
        self.stages.run("data", self.split)
        if self.options.fine_tune:
            options = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 8}
            tune = self.experiment.fine_tune
            self.stages.run("System 1", lambda: tune(self.options.model, "system1", "system1", **options))
        self.experiment.run()

    def split(self) -> dict[str, int]:
        """Draw validation and test from `--train` unless there is `--test`; the first rest is for fine-tuning."""
        options, path = self.options, self.experiment.problems
        lines = read_lines(options.train)
        random.Random(options.seed).shuffle(lines)
        test = lines if options.test is None else read_lines(options.test)
        counts = {"test": options.num_test, "validation": options.num_validation, "system1": options.fine_tune}
        for name, count in {**counts, "train": options.num_train}.items():
            source = test if name == "test" else lines
            if len(source) < count:
                argument = "train" if source is lines else "test"
                left = f"{len(source)} left for {name} of {vars(options)[argument]}"
                raise ArgumentError(argument, f"a file with {count} more problems", left)
            write_lines(path(name), source[:count])
            del source[:count]
        separate(path("validation"), path("test"), [path("train"), path("system1")])
        return {name: len(load_problems(path(name))) for name in (*counts, "train") if path(name).stat().st_size}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.gsm8k", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", type=Path, required=True, help="JSON lines with question and answer")
    add("--test", type=Path, help="other problems to test on; by default part of --train, held out")
    add("--model", default=str(smollm2.model_file()), help="path or hub id; by default the demo's")
    add("--output", type=Path, default=Path("build/recipes/gsm8k"), help="taken up where an earlier run stopped")
    add("--fine-tune", type=int, default=0, metavar="N", help="teach System 1 the solutions of N problems first")
    add("--num-train", type=int, default=1000, help="problems that verifiers learn from")
    add("--num-validation", type=int, default=200)
    add("--num-test", type=int, default=500)
    add("--sampled", type=int, default=100, help="test problems that are sampled 20 times")
    add("--rollouts", type=int, default=20, help="continuations per candidate")
    add("--positions", type=int, default=20, help="explored positions per solution")
    add("--bypass", action="store_true", help="no continuations: every plausible other token is a negative")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--control", action="store_true", help="fine-tune System 1 on the verifiers' problems, too, and compare")
    add("--epochs", type=int, default=2, help="of lora, full and the control")
    add("--max-new-tokens", type=int, default=256)
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    stages = Stages(
        options.output, {"recipe": "gsm8k", **{k: str(v) for k, v in vars(options).items() if k != "output"}}
    )
    recipe = GradeSchool(stages, options)
    recipe.run()
    print(write_report(stages, recipe.experiment.settings.verifiers))


if __name__ == "__main__":
    main()
