"""rlhf-fast: fused kernels for RLHF, and a thin trainer of InstructGPT's three stages on top of them."""

from pathlib import Path

# In a wheel kernels/ and bench/ are inside this package; in a source checkout they stand beside it. They have no
# __init__.py of their own: Hugging Face's package is called `kernels` too, and a checkout must not hide it.
_checkout = Path(__file__).parent.parent
if (_checkout / "kernels" / "_op.py").is_file() and (_checkout / "csrc").is_dir():
    __path__.append(str(_checkout))

__version__ = "0.1.0"
