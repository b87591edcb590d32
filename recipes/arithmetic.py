"""The paper's setting in small: does a verifier from a target domain improve a generalist that is middling there?

A small Llama (System 1) learns a mixture of generated word problems from scratch, of which the target kind is a small
part. On the target's training split, tokens that lead astray are explored and verifiers of all kinds trained. Beside
them stands a control, System 1 fine-tuned on the same problems. beta is chosen on a validation split; nothing is chosen
on the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

from llm2_fast.problems import load_problems
from recipes.experiment import Experiment, Settings, separate, write_lines
from recipes.report import write_report
from recipes.solutions import train_on_solutions
from recipes.stages import Stages
from recipes.tokenizer import make_tokenizer
from recipes.word_problems import KINDS, TARGET, generate

SPLITS = ("mixture", "train", "validation", "test")


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        mixture: Problems that System 1 learns from, each once.
        target_share: Of the target kind among them.
        hidden_size, num_layers: Of System 1.
        train, validation, test: Problems of the target kind.
        settings: Of the experiment.
        vocab_size: Tokens, rare words in pieces; None for a token per word.
    """

    mixture: int
    target_share: float
    hidden_size: int
    num_layers: int
    train: int
    validation: int
    test: int
    settings: Settings
    vocab_size: int | None = None


def _settings(sampled: int, samples: int, exploration: dict[str, Any], num_layers: int, epochs: int) -> Settings:
    network = {"epochs": epochs, "batch_size": 32, "per_device_batch_size": 32}
    return Settings(
        sampled=sampled,
        samples=samples,
        max_new_tokens=64,
        max_batch_size=128,
        exploration=exploration,
        verifiers={
            "head": {
                "epochs": 20,
                "learning_rate": 2e-3,
                "mlp_size": 256,
                "layers": (*range(num_layers - 1), -1),
            },
            "lora": {**network, "learning_rate": 3e-3},
            "full": {**network, "learning_rate": 1e-3},
        },
        control={"epochs": epochs, "learning_rate": 1e-3, "batch_size": 32},
    )


FULL = Scale(80_000, 0.02, 96, 3, 2000, 500, 2000, _settings(300, 20, {"n": 10, "thresholds": (0.25, 0.75)}, 3, 8))
QUICK = Scale(
    1500, 0.5, 32, 2, 80, 12, 24, _settings(6, 3, {"n": 2, "max_positions": 5, "thresholds": (0.25, 0.75)}, 2, 1)
)


class Arithmetic:
    """The data and System 1, as stages.

    Args:
        stages: In whose directory they lie.
        scale: How much.
        seed: Of everything.
    """

    def __init__(self, stages: Stages, scale: Scale, seed: int) -> None:
        self.stages, self.scale, self.seed = stages, scale, seed
        self.experiment = Experiment(stages, stages.directory / "system1", scale.settings, seed)

    def run(self) -> None:
        """Everything up to the results of the experiment."""
        self.prepare()
        self.experiment.run()

    def prepare(self) -> None:
        """The data and System 1."""
        self.stages.run("data", self.make_data)
        self.stages.run("System 1", self.train_system1)

    def make_data(self) -> dict[str, int]:
        """Write the splits. What `llm2-fast data check` finds shared with validation or test is dropped before."""
        scale, path = self.scale, self.experiment.problems
        shares = dict.fromkeys(KINDS, (1 - scale.target_share) / (len(KINDS) - 1)) | {TARGET: scale.target_share}
        mixture = [p for kind in KINDS for p in self._draw(kind, "mixture", int(scale.mixture * shares[kind]))]
        random.Random(self.seed).shuffle(mixture)
        write_problems(path("mixture"), mixture)
        for split in SPLITS[1:]:
            write_problems(path(split), self._draw(TARGET, split, getattr(scale, split)))
        separate(path("validation"), path("test"), [path("train"), path("mixture")])
        return {split: len(load_problems(path(split))) for split in SPLITS}

    def _draw(self, kind: str, split: str, count: int) -> Iterable[dict[str, str]]:
        return islice(generate(kind, f"{self.seed} {split}"), count)

    def train_system1(self) -> None:
        """The generalist."""
        problems = load_problems(self.experiment.problems("mixture"))
        texts = (text for problem in problems for text in (problem.question, problem.solution))
        tokenizer = make_tokenizer(texts, self.scale.vocab_size)
        model = make_model(tokenizer, self.scale.hidden_size, self.scale.num_layers, self.seed)
        options = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "seed": self.seed, "question_weight": 0.3}
        train_on_solutions(model, tokenizer, problems, self.experiment.system1, **options)


def make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 16,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def write_problems(path: Path, problems: Iterable[dict[str, str]]) -> None:
    """As JSON lines."""
    write_lines(path, map(json.dumps, problems))


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> Arithmetic:
    """The run that a command line asks for."""
    parser.add_argument("--output", type=Path, help="taken up where an earlier run stopped")
    parser.add_argument("--quick", action="store_true", help="so small that its figures say nothing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else FULL
    output = options.output or Path("build/recipes") / f"arithmetic{'-quick' if options.quick else ''}"
    stages = Stages(output, {"recipe": "arithmetic", "seed": options.seed, **dataclasses.asdict(scale)})
    return Arithmetic(stages, scale, options.seed)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.arithmetic", description=__doc__.splitlines()[0])
    recipe = parse_arguments(parser, arguments)
    recipe.run()
    print(write_report(recipe.stages, recipe.scale.settings.verifiers))


if __name__ == "__main__":
    main()
