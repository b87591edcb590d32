"""vLLM on the CPU, in this process."""

from __future__ import annotations

import os
from typing import Any

from worker import Worker


class VllmWorker(Worker):
    def __init__(self, options: dict[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(options["num_threads"])
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm  # reads the environment

        self.name = f"vLLM {vllm.__version__}"
        self._vllm = vllm
        self._llm = vllm.LLM(
            options["model"],
            dtype=options["dtype"],
            max_model_len=options["max_length"],
            max_num_seqs=options["max_batch_size"],
            enable_prefix_caching=True,
            disable_log_stats=True,
        )

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        if not self._llm.reset_prefix_cache():  # nothing is kept from one turn to the next
            raise RuntimeError("vLLM did not reset its prefix cache")
        sampling = self._vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return {"tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


if __name__ == "__main__":
    VllmWorker.serve()
