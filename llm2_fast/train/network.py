"""Training of `full` and `lora` verifiers: a sequence classifier under transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from llm2_fast.errors import ArgumentError
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.train.attention import choose_attention
from llm2_fast.train.classifier import make_classifier
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Example, Solution, System1View, plausible_pairs, read_solution
from llm2_fast.train.packing import pack, packed_loss
from llm2_fast.train.run import Run
from llm2_fast.train.task import Task, Trained, require_pairs
from llm2_fast.verifier import LoraVerifier, Verifier
from llm2_fast.verifier.verifier import read_json, read_tensors

_WARM_UP = 0.1
_LOGGER = logging.getLogger(__name__)


def training_arguments(
    config: TrainingConfig, directory: Path, device: torch.device, progress: bool, options: Mapping[str, Any] | None
) -> TrainingArguments:
    """What Trainer is told. Joins the group of processes if there are several, each with its device.

    Raises:
        ArgumentError: `options` names something that is decided elsewhere, unknown or without effect here, or the batch
            does not divide.
    """
    ours: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": _WARM_UP,
        "per_device_train_batch_size": config.per_device_batch_size,
        "per_device_eval_batch_size": config.per_device_batch_size,
        "bf16": device.type == "cuda" and torch.cuda.is_bf16_supported() if config.bf16 is None else config.bf16,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "save_strategy": "epoch" if config.save_steps is None else "steps",
        "save_steps": config.save_steps or 1,
        "save_total_limit": 2,  # the last may be incomplete
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if config.gradient_checkpointing:  # transformers gave it another name
        names = TrainingArguments.__dataclass_fields__
        name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
        ours |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    defaults = {"report_to": "none", "logging_steps": 10}
    options = dict(options or {})
    if taken := sorted((ours.keys() | {"gradient_accumulation_steps"}) & options.keys()):
        raise ArgumentError("trainer_options", "options that train_verifier has no argument for", taken[0])
    try:
        arguments = TrainingArguments(**ours, **{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise ArgumentError("trainer_options", "options of transformers.TrainingArguments", str(error)) from error
    if arguments.fsdp and PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        # accelerate would train without it and not say so.
        raise ArgumentError("trainer_options", "fsdp only in processes that were launched together, on GPUs", "fsdp")
    per_pass = config.per_device_batch_size * arguments.world_size
    if config.batch_size % per_pass != 0:
        expected = f"a multiple of {per_pass}, which {arguments.world_size} process(es) compute in one pass"
        raise ArgumentError("batch_size", expected, config.batch_size)
    arguments.gradient_accumulation_steps = config.batch_size // per_pass
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for several processes, not for DataParallel
    PartialState().wait_for_everyone()  # all have looked into the directory before one of them begins the run in it
    return arguments


def train_network(task: Task, run: Run, arguments: TrainingArguments) -> Trained:
    """Train a `FullVerifier` or a `LoraVerifier`, in as many processes as were started.

    Args:
        task: Of kind "full" or "lora".
        run: Where checkpoints go, and where to go on from.
        arguments: As `training_arguments` makes them.

    Raises:
        ArgumentError: There is nothing to train or to measure on, or the scores did not stay finite.
    """
    config = task.config
    torch.manual_seed(config.seed)
    network = (task.init or task.base).model.base_model
    attention = choose_attention(network, arguments.device.type)
    classifier = make_classifier(network, config, lora=task.kind == "lora", flex_attention=attention.flex)
    judged = config.plausible_only or any(solution.pairs is None for solution in task.train)
    train = _read(task, task.train) if judged else [Example.from_pairs(s.input_ids, s.pairs) for s in task.train]
    if config.plausible_only:
        train = plausible_pairs(train)
    heldout = _read(task, task.heldout)
    require_pairs(train, heldout)

    if config.epochs * -(-len(train) // config.batch_size) < 2:  # the learning rate of the first is zero
        raise ArgumentError("batch_size", f"at least two steps with {len(train)} solutions", config.batch_size)
    if arguments.process_index == 0:
        run.begin()  # before Trainer makes the directory of checkpoints
        expected = attention.flex or arguments.device.type != "cuda"
        _LOGGER.log(logging.INFO if expected else logging.WARNING, "packed passes attend with %s", attention)
    trainer = _make_trainer(classifier, arguments, train)
    checkpoint = run.last_checkpoint()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    log = trainer.state.log_history
    scores = torch.from_numpy(trainer.predict(heldout).predictions)
    if not scores.isfinite().all():
        raise ArgumentError("learning_rate", "a rate at which the loss stays finite", config.learning_rate)
    margins = [
        line[example.positive_rows][example.positive] - line[example.negative_rows]
        for line, example in zip(scores, heldout, strict=True)
    ]
    system1 = System1View.concatenate([example.system1 for example in heldout])
    return Trained(_load_verifier(task, run), sum(map(len, train)), torch.cat(margins), system1, log, str(attention))


def _read(task: Task, solutions: list[Solution]) -> list[Example]:
    """Examples of the solutions that have pairs, with System 1's view; every process reads its share."""
    state = PartialState()
    hidden = not (task.progress and state.is_main_process)
    with state.split_between_processes(solutions) as share:
        readings = (
            read_solution(task.lm, solution, task.config.alpha, task.config.max_candidates)
            for solution in tqdm(share, desc="System 1", disable=hidden, unit="solution")
        )
        examples = [reading.example for reading in readings if reading is not None]
    return gather_object(examples)


def _make_trainer(classifier: PreTrainedModel, arguments: TrainingArguments, examples: Sequence[Example]) -> Trainer:
    # Lines without pairs fill the last pass. accelerate would repeat examples there, and their pairs would count twice.
    per_pass = arguments.per_device_train_batch_size * arguments.world_size
    trainer = Trainer(
        model=classifier,
        args=arguments,
        train_dataset=[*examples, *[None] * (-len(examples) % per_pass)],
        data_collator=pack,
        compute_loss_func=packed_loss,
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")  # checkpoints are read as verifiers, so they are written whole
        if arguments.bf16:  # autocast as without FSDP, whose own policy would round scores and gradients as well
            plugin.mixed_precision_policy = None
            trainer.autocast_smart_context_manager = partial(
                torch.autocast, arguments.device.type, torch.bfloat16, cache_enabled=False
            )
    return trainer


def _load_verifier(task: Task, run: Run) -> Verifier:
    """The verifier that the last checkpoint, in the layout of transformers or PEFT, holds."""
    PartialState().wait_for_everyone()  # one process writes it
    directory = run.last_checkpoint()
    if task.kind == "lora":
        config = read_json(directory / "adapter_config.json") | {"base_model_name_or_path": task.base_name}
        tensors = read_tensors(directory / "adapter_model.safetensors")
        identity = {"base_name": task.base_name, "base_fingerprint": fingerprint(task.base.model)}
        return LoraVerifier(config, tensors, **identity)
    verifier = Verifier.from_pretrained(directory, device=task.base.model.device)
    verifier.tokenizer = task.base.tokenizer
    verifier.network.config.use_cache = True  # Trainer turned it off
    return verifier
