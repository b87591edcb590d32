"""`train_verifier`: a verifier of any kind, from supervision or from reference solutions."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2_fast.config import check_number
from llm2_fast.errors import ArgumentError, MissingDependencyError
from llm2_fast.models.decoder import Decoder, LanguageModel
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import LoadedModel, load_model, resolve_device, tokenizer_hash
from llm2_fast.prompts import chat_template_hash
from llm2_fast.supervision import Manifest, Supervision
from llm2_fast.train.accuracy import PairwiseAccuracy
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Data, Source, load_source, tokenize_source
from llm2_fast.train.head import train_head
from llm2_fast.train.run import Run
from llm2_fast.train.task import Task, Trained
from llm2_fast.verifier import FullVerifier, Verifier


@dataclass(frozen=True)
class TrainingResult:
    """A trained verifier and what was measured on examples it has not seen.

    Attributes:
        verifier: Ready to use and to `save_pretrained`.
        num_pairs: Pairs trained on.
        heldout: On all held-out pairs.
        heldout_plausible: On those whose positive was plausible: the ones that decoding meets.
    """

    verifier: Verifier
    num_pairs: int
    heldout: PairwiseAccuracy
    heldout_plausible: PairwiseAccuracy


def train_verifier(
    model: str | os.PathLike[str] | PreTrainedModel,
    supervision: Source,
    kind: str = "head",
    *,
    heldout: Source | float = 0.1,
    init: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    trainer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> TrainingResult:
    """Train a verifier for `model`.

    The loss is -log sigmoid(s+ - s-), averaged over pairs of a positive and a negative token at one position of a
    solution (LLM2, equation 4). Supervision names the pairs. Of a problem with a reference solution, every plausible
    token other than the solution's own is a negative.

    A `head` is trained in this process, on hidden states that are computed once. `lora` and `full` verifiers are
    trained by transformers' Trainer, in as many processes as were launched.

    Args:
        model: As for `llm2_fast.load`. It stays as it is.
        supervision: The path of supervision in the official layout or of problems with `question` and `answer`, either
            as JSON lines or as the directory that exploration wrote; or such entries in memory.
        kind: "head", "lora" or "full".
        heldout: What to measure on, in any form that `supervision` has; or the share of `supervision` (the last
            examples) to hold out, in (0, 1).
        init: The network that a `full` verifier starts from, with the tokenizer of `model`; by default the network of
            `model`, as in the paper.
        tokenizer: Instead of the one beside the weights.
        output_dir: Where the verifier, a record of how it was made and measured (`training.json`) and checkpoints go.
            `lora` and `full` need one, which all processes share.
        resume: Continue the run in `output_dir` from its last checkpoint. Starts one if there is none; refuses one that
            was begun with other options, models or examples.
        progress: Show progress bars.
        trainer_options: Further fields of `transformers.TrainingArguments` for `lora` and `full`, such as `fsdp`.
        options: Those of `TrainingConfig`, by name.

    Returns:
        `TrainingResult`. `full` verifiers are float32, as they were trained.

    Raises:
        ArgumentError: An argument or an example is unusable, before training starts; or the weights did not stay
            finite.
        CheckpointError: `model` or `init` cannot be read.
        IncompatibleVerifierError: `init` has another tokenizer.
        MissingDependencyError: A library is missing; the message says what to install.

    Warns:
        UserWarning: The verifier does not beat chance on held-out pairs.
    """
    config = TrainingConfig.for_kind(kind, **options)
    _check_arguments(kind, init, output_dir, resume, trainer_options)
    run = None if output_dir is None else Run(output_dir, resume)
    train_data, heldout_data = _split(load_source(supervision, "supervision"), heldout)
    if config.plausible_only is None:
        config = dataclasses.replace(config, plausible_only=not isinstance(train_data, Supervision))

    train = train_head
    if kind != "head":
        from llm2_fast.train import network  # brings accelerate, which a head does not need

        # Before models are loaded, since every process gets its device here.
        device = model.device if isinstance(model, PreTrainedModel) else resolve_device("auto")
        arguments = network.training_arguments(config, run.checkpoints, device, progress, trainer_options)
        train = partial(network.train_network, run=run, arguments=arguments)
    task = _make_task(kind, config, model, tokenizer, init, train_data, heldout_data, progress)
    is_main = int(os.environ.get("RANK", "0")) == 0
    if run is not None:
        surroundings = {"num_processes": _num_processes(), "trainer_options": dict(trainer_options or {})}
        run.describe({**task.describe(), **surroundings})

    device = task.base.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # torch's, which are seeded here
        trained = train(task)
        if run is not None and is_main:
            run.begin()
            trained.verifier.save_pretrained(run.directory)
    result = _measure(trained)
    if run is not None and is_main:
        accuracies = {name: dataclasses.asdict(getattr(result, name)) for name in ("heldout", "heldout_plausible")}
        run.finish({"num_pairs": result.num_pairs, **accuracies, "attention": trained.attention, "log": trained.log})
    decisive = result.heldout_plausible if result.heldout_plausible.num_pairs else result.heldout
    if not decisive.beats_chance:
        message = f"right in {decisive.verifier:.1%} of {decisive.num_pairs} held-out pairs: no better than chance"
        warnings.warn(f"llm2_fast: this verifier is {message}", stacklevel=2)
    return result


def _check_arguments(
    kind: str, init: object, output_dir: object, resume: bool, trainer_options: Mapping[str, Any] | None
) -> None:
    """Raise for combinations that mean nothing, and for libraries that would be missed."""
    if kind == "head" and trainer_options:
        raise ArgumentError("trainer_options", "none for a head, which Trainer does not train", repr(trainer_options))
    if kind == "head" and _num_processes() > 1:
        raise ArgumentError("kind", "'lora' or 'full' in several processes", repr(kind))
    if kind != "full" and init is not None:
        raise ArgumentError("init", f"None for kind {kind!r}, which stands on the LLM itself", repr(init))
    if kind != "head" and output_dir is None:
        raise ArgumentError("output_dir", f"a directory for the checkpoints of a {kind!r} verifier", None)
    if resume and output_dir is None:
        raise ArgumentError("output_dir", "the directory of the run to resume", None)
    for library in {"head": (), "lora": ("accelerate", "peft"), "full": ("accelerate",)}[kind]:
        if importlib.util.find_spec(library) is None:
            raise MissingDependencyError(f"{kind} verifiers are trained with {library}: pip install 'llm2-fast[train]'")


def _split(supervision: Data, heldout: Source | float) -> tuple[Data, Data]:
    """What to train and what to measure on."""
    if isinstance(heldout, (bool, int)) or heldout is None:
        raise ArgumentError("heldout", "examples, or a share of the supervision in (0, 1)", repr(heldout))
    if not isinstance(heldout, float):
        return supervision, load_source(heldout, "heldout")
    check_number("heldout", heldout, minimum=0, maximum=1, exclusive_minimum=True)
    entries = supervision.examples if isinstance(supervision, Supervision) else supervision
    count = max(1, round(len(entries) * heldout))
    if count >= len(entries):
        raise ArgumentError("supervision", "more examples than are held out", f"{len(entries)}, {count} held out")
    parts = entries[:-count], entries[-count:]
    if isinstance(supervision, Supervision):
        return tuple(Supervision(part, supervision.manifest) for part in parts)
    return parts


def _make_task(
    kind: str,
    config: TrainingConfig,
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    init: str | os.PathLike[str] | PreTrainedModel | None,
    train_data: Data,
    heldout_data: Data,
    progress: bool,
) -> Task:
    """Load the models, tokenize the data, and check that everything fits together."""
    base = load_model(model, tokenizer=tokenizer)
    if base.tokenizer is None:
        raise ArgumentError("tokenizer", "a tokenizer, since the model came without one", None)
    lm = LanguageModel(base.model)
    lm.check_layers(config.layers)
    limits = [config.max_length, lm.max_position_embeddings]
    if init is not None:
        init = load_model(init)
        network = init.model.base_model
        head = torch.zeros(1, network.config.get_text_config().hidden_size)
        FullVerifier(network, head, tokenizer=init.tokenizer).check_compatible(base)
        limits.append(Decoder(network).max_position_embeddings)
    max_length = min(limit for limit in limits if limit is not None)
    solutions = []
    for name, data in (("supervision", train_data), ("heldout", heldout_data)):
        if isinstance(data, Supervision) and data.manifest is not None:
            _check_manifest(data.manifest, base, name)
        solutions.append(tokenize_source(data, base.tokenizer, lm.vocab_size, max_length, name))
        if not solutions[-1]:
            raise ArgumentError(name, f"an example with pairs within {max_length} tokens", "none")
    # A local path means nothing elsewhere, its last part may.
    base_name = Path(base.name).name if os.path.exists(base.name) else base.name
    return Task(kind, config, base, lm, base_name, *solutions, init, progress)


def _check_manifest(manifest: Manifest, base: LoadedModel, name: str) -> None:
    """Raise if positions of supervision would mean other tokens here; warn if another model's candidates are in it."""
    ours = {
        "tokenizer_hash": tokenizer_hash(base.tokenizer),
        "chat_template_hash": chat_template_hash(base.tokenizer),
    }
    for field, value in ours.items():
        if getattr(manifest, field) != value:
            raise ArgumentError(f"{name}.{field}", f"{value}, that of {base.name}", getattr(manifest, field))
    if manifest.model_fingerprint != fingerprint(base.model):
        message = f"{name} was made with {manifest.model}, not with {base.name}, which may propose other tokens"
        warnings.warn(f"llm2_fast: {message}", stacklevel=4)


def _measure(trained: Trained) -> TrainingResult:
    every = torch.ones_like(trained.system1.plausible)
    accuracies = (
        PairwiseAccuracy.measure(trained.margin, trained.system1, mask) for mask in (every, trained.system1.plausible)
    )
    return TrainingResult(trained.verifier, trained.num_pairs, *accuracies)


def _num_processes() -> int:
    """As `accelerate launch` and `torchrun` say."""
    return int(os.environ.get("WORLD_SIZE", "1"))
