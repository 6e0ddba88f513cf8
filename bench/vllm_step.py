"""Run by test_bench_rollout.py in an interpreter that has vLLM: seconds of one decoding step, as JSON on the last line.

python vllm_step.py MODEL DTYPE BATCH PROMPT_TOKENS NEW_TOKENS THREADS
"""

import json
import os
import sys
import time


def main(model: str, dtype: str, batch: int, prompt: int, new: int, threads: int) -> None:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    import random

    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=batch)
    tokens = [{"prompt_token_ids": random.choices(range(1, 49152), k=prompt)} for _ in range(batch)]

    def seconds(count: int) -> float:
        settings = SamplingParams(max_tokens=count, min_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
        start = time.perf_counter()
        llm.generate(tokens, settings, use_tqdm=False)
        return time.perf_counter() - start

    seconds(4)
    whole = sorted(seconds(new) - seconds(1) for _ in range(3))[1]
    print(json.dumps({"step": whole / (new - 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
