#!/usr/bin/env bash
# Install what tests/test_openrlhf.py and tests/test_verl.py run, into a directory: integrations.sh DIRECTORY.
# The variables that tell the tests where it is are printed: eval "$(.ci/integrations.sh DIRECTORY)".
# Neither package goes into the environment of the tests. OpenRLHF requires flash-attn and CUDA, and runs here without
# them. verl requires older versions of some packages; its own environment has those alone, and torch and the rest from
# the one that `python` is of.
set -euo pipefail
directory=$(mkdir -p "$1" && cd "$1" && pwd)

pip_install() { python -m pip --disable-pip-version-check "$@" >&2; }
pip_install install -q --no-deps --no-compile --target "$directory/openrlhf" \
    --python-version 3.11 --only-binary=:all: openrlhf==0.11.2
echo "export RLHF_FAST_OPENRLHF_PATH='$directory/openrlhf'"

python -m venv --without-pip "$directory/verl"
verl="$directory/verl/bin/python"
outer=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
inner=$("$verl" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$outer')" >"$inner/outer.pth"
# Without their dependencies: the tests need neither Ray's dashboard nor wandb. verl patches the value head of a trl that
# it finds, which the outer one, of later versions, does not have any more.
pip_install --python "$verl" install -q --no-compile transformers==5.10.4
pip_install --python "$verl" install -q --no-deps --no-compile \
    verl==0.9.1 trl==1.12.0 ray==2.60.0 tensordict==0.10.0 torchdata==0.11.0 hydra-core==1.3.8 omegaconf==2.4.0 \
    antlr4-python3-runtime==4.9.3 codetiming==1.4.0 pylatexenc==2.11 pyvers==0.2.3 orjson==3.13.0 msgpack==1.2.4 \
    jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 protobuf==7.36.2
echo "export RLHF_FAST_VERL_PYTHON='$verl'"
