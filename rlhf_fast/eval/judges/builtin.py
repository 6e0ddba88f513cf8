"""The judges that ship with the package, by their roles."""

from __future__ import annotations

from rlhf_fast.eval.judges.protocol import Judge
from rlhf_fast.eval.judges.references import InformativeJudge, TruthJudge
from rlhf_fast.eval.judges.refusal import RefusalJudge
from rlhf_fast.eval.judges.toxicity import ToxicityJudge


def load_builtin(role: str, mode: str = "") -> Judge:
    """Return the built-in judge of a role.

    mode: for refusals "strict", the default, or "any", which counts partial ones too.
    """
    if role == "refusal":
        return RefusalJudge.load("any" if mode == "any" else "strict")
    if role == "toxicity":
        return ToxicityJudge.load()
    return TruthJudge.load() if role == "truth" else InformativeJudge.load()
