"""The model and the verifiers of the comparison, as files that every engine can read."""

from __future__ import annotations

import copy
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.models.smollm2 import default_verifier, model_file

WEIGHT_BYTES = 269_030_016  # of SmolLM2-135M in bfloat16; the embedding table is also the lm_head
LORA_RANK = 16
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Names of llama.cpp's file types.
GGUF_TYPES = {"bf16": "LLAMA_FTYPE_MOSTLY_BF16", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
QUANTIZE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = getattr(llama_cpp, sys.argv[3]), True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


@dataclass(frozen=True)
class Files:
    """Paths.

    Attributes:
        model: Hugging Face directory, bfloat16.
        verifiers: Verifier directory by kind.
    """

    folder: Path
    model: Path
    verifiers: dict[str, Path]
    tokenizer: PreTrainedTokenizerBase

    def tokenize(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def gguf(self, python: str) -> dict[str, Path]:
        """GGUF files by type, written by llama.cpp from the file that the model comes in."""
        files = {}
        for name, file_type in GGUF_TYPES.items():
            path = files[name] = self.folder / f"model-{name}.gguf"
            if not path.exists():
                subprocess.run([python, "-c", QUANTIZE, model_file(), path, file_type], check=True, capture_output=True)
        return files


def prepare(folder: Path) -> Files:
    """Write what is missing in `folder`."""
    loaded = load_model(model_file(), dtype="bfloat16")
    model, lora, full = folder / "model", folder / "lora", folder / "full"
    if not (model / "config.json").exists():
        loaded.model.save_pretrained(model)
        loaded.tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    if not (lora / "adapter_config.json").exists():
        save_random_lora(loaded, lora)
    if not (full / "config.json").exists():
        random_classifier(loaded).to(torch.bfloat16).save_pretrained(full)
    verifiers = {"head": Path(default_verifier()), "lora": lora, "full": full}
    return Files(folder, model, verifiers, loaded.tokenizer)


def random_classifier(loaded: LoadedModel) -> AutoModelForSequenceClassification:
    config = copy.deepcopy(loaded.model.config)
    config.num_labels, config.pad_token_id = 1, loaded.tokenizer.eos_token_id
    return AutoModelForSequenceClassification.from_config(config)


def save_random_lora(loaded: LoadedModel, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_TARGETS, init_lora_weights=False
    )
    get_peft_model(random_classifier(loaded), config).save_pretrained(folder)
