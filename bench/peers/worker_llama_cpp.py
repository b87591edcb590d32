"""llama.cpp through its C API: greedy decoding with no more of Python between the steps than needed."""

from __future__ import annotations

from typing import Any

import llama_cpp
import worker


def start(options: dict[str, Any]) -> tuple[worker.Decode, dict[str, Any]]:
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(options["gguf"].encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = options["max_length"] * options["max_batch_size"]
    params.n_batch = params.n_ubatch = max(512, options["max_batch_size"])
    params.n_seq_max = options["max_batch_size"]
    params.n_threads = params.n_threads_batch = options["num_threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    sampler = llama_cpp.llama_sampler_init_greedy()
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(rows: list[tuple[int, int, int, bool]]) -> None:
        """One pass over rows (token, position, sequence, logits wanted)."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def decode(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = []
        for sequence, prompt in enumerate(prompts):
            run([(token, i, sequence, i + 1 == len(prompt)) for i, token in enumerate(prompt)])
            tokens.append(llama_cpp.llama_sampler_sample(sampler, context, -1))
        count = len(prompts)
        for step in range(1, new_tokens):
            run([(tokens[s], len(prompts[s]) + step - 1, s, True) for s in range(count)])
            tokens = [llama_cpp.llama_sampler_sample(sampler, context, s) for s in range(count)]
        return {"tokens": new_tokens * count}

    return decode, {"engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"}


if __name__ == "__main__":
    worker.serve(start)
