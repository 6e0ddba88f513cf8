"""OpenRLHF's own functions with `integrations.openrlhf.fused` and without; support/openrlhf_cases.py has the cases."""

import os
from pathlib import Path

import pytest
from other_environment import run_cases

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import hooks, openrlhf

WHERE = os.environ.get("RLHF_FAST_OPENRLHF_PATH", "")


@pytest.mark.slow
@pytest.mark.skipif(not WHERE, reason="RLHF_FAST_OPENRLHF_PATH is not set; .ci/integrations.sh installs OpenRLHF")
def test_openrlhf(tmp_path):
    assert (Path(WHERE) / "openrlhf").is_dir(), f"RLHF_FAST_OPENRLHF_PATH={WHERE} has no openrlhf"
    run_cases("openrlhf_cases.py", tmp_path, path=[WHERE], min_passed=100)


@pytest.mark.skipif(hooks.library_version("openrlhf") is not None, reason="OpenRLHF is installed")
def test_without_openrlhf():
    with pytest.raises(UserError, match=r"^openrlhf is not installed: pip install openrlhf==0\.11\.2$"):
        openrlhf.fused(object())
