"""Run by test_bench_rollout.py in an interpreter that has vLLM: seconds of one decoding step, as JSON on the last line.

python vllm_step.py MODEL DTYPE BATCH PROMPT_TOKENS NEW_TOKENS THREADS
"""

import json
import os
import sys
import time


def main(model: str, dtype: str, batches: list[int], prompt: int, new: int, threads: int) -> None:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    import random

    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=max(batches))

    def seconds(batch: int, count: int) -> float:
        tokens = [{"prompt_token_ids": random.choices(range(1, 49152), k=prompt)} for _ in range(batch)]
        settings = SamplingParams(max_tokens=count, min_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
        start = time.perf_counter()
        llm.generate(tokens, settings, use_tqdm=False)
        return time.perf_counter() - start

    steps = {}
    for batch in batches:
        seconds(batch, 4)
        steps[batch] = sorted(seconds(batch, new) - seconds(batch, 1) for _ in range(3))[1] / (new - 1)
    print(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:3], [int(batch) for batch in sys.argv[3].split(",")], *map(int, sys.argv[4:]))
