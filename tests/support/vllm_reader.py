"""Read folders with vLLM, in a Python of its own that has no rlhf-fast: `PYTHON vllm_reader.py JOBS.json OUT.json`.

JOBS: [{"folder", "prompts": [[token, ...], ...], "texts": [str, ...], "chats": [[turn, ...], ...], "new"}, ...]
OUT:  {"version", "jobs": [{"responses": [{"tokens", "logprobs", "likeliest", "finish"}, ...], "texts", "chats"}, ...]}
In OUT texts and chats are the tokens that vLLM makes of them. Responses are greedy, in float32.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "KMP_BLOCKTIME": "0",  # threads that wait leave the cores to other programs
}


def read(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    engine = LLM(job["folder"], enforce_eager=True, dtype="float32", max_model_len=256, max_num_seqs=8)
    greedy = SamplingParams(temperature=0.0, max_tokens=job["new"], logprobs=1)
    found = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], greedy, use_tqdm=False)
    responses = []
    for each in found:
        (out,) = each.outputs
        at = list(zip(out.token_ids, out.logprobs, strict=True))
        responses.append(
            {
                "tokens": list(out.token_ids),
                "logprobs": [given[token].logprob for token, given in at],
                "likeliest": [max(x.logprob for x in given.values()) for _, given in at],
                "finish": out.finish_reason,
            }
        )
    one = SamplingParams(temperature=0.0, max_tokens=1)
    texts = engine.generate(job["texts"], one, use_tqdm=False) if job["texts"] else []
    chats = engine.chat(job["chats"], one, use_tqdm=False) if job["chats"] else []
    return {
        "responses": responses,
        "texts": [list(each.prompt_token_ids) for each in texts],
        "chats": [list(each.prompt_token_ids) for each in chats],
    }


def main() -> None:
    import vllm

    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {"version": vllm.__version__, "jobs": [read(job) for job in jobs]}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
