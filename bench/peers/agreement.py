"""How often a reduced precision chooses the token that float32 chooses, teacher-forced.

float32 continues every prompt greedily; each contender is then asked for its most probable token in place of every one
of those tokens, given the same tokens before it.

    python bench/peers/agreement.py --peers-python .venv-peers/bin/python --problems problems.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import compare
import files as files_module
import torch
from client import Client

import llm2_fast

SHARED = {"num_threads": 2, "max_batch_size": 8, "max_length": 2048}


def teach(model: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations in float32."""
    torch.set_num_threads(SHARED["num_threads"])
    engine = llm2_fast.load(model, dtype="float32", backend="cpu", max_batch_size=SHARED["max_batch_size"])
    results = engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
    return [result.samples[0].token_ids for result in results]


def contenders(files: files_module.Files, peers_python: str | None) -> dict[str, tuple]:
    """Arguments of `Client` by name."""
    ours = {"model": str(files.model), "dtype": "bfloat16", **SHARED}
    found = {
        "llm2_fast bfloat16": ("worker_llm2_fast", ours),
        "transformers bfloat16": ("worker_transformers", ours),
        "llm2_fast int8-channel": ("worker_llm2_fast", {**ours, "quantization": "int8-channel"}),
        "llm2_fast int8": ("worker_llm2_fast", {**ours, "quantization": "int8"}),
    }
    for name, path in files.gguf(peers_python).items() if peers_python else ():
        found[f"llama.cpp {name}"] = ("worker_llama_cpp", {"gguf": str(path), **SHARED}, peers_python)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--problems", type=Path, help='JSON lines with "question"; generated ones by default')
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("build/peers"), help="folder for the models")
    arguments = parser.parse_args()
    questions = compare.QUESTIONS
    if arguments.problems is not None:
        questions = [json.loads(line)["question"] for line in arguments.problems.open()]
    files = files_module.prepare(arguments.output)
    prompts = [files.tokenize(question) for question in questions[: arguments.prompts]]
    taught = teach(files.model, prompts, arguments.new_tokens)
    total = sum(map(len, taught))
    print(f"{len(prompts)} prompts, {total} tokens\n\n| engine | agreement with float32 |\n|---|---|")
    for name, start in contenders(files, arguments.peers_python).items():
        client = Client(*start)
        same = 0
        for prompt, continuation in zip(prompts, taught, strict=True):
            found = client.ask(prompt=prompt, continuation=continuation)["argmax"]
            same += sum(a == b for a, b in zip(found, continuation, strict=True))
        client.close()
        print(f"| {name} | {100 * same / total:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
