#!/usr/bin/env bash
# An environment with DeepSpeed, from nothing, for the tests that need it:
#
#     bash plugins/rllava-deepspeed/environment.sh DIR
#     DIR/bin/python -m pytest plugins/rllava-deepspeed
#
# DeepSpeed is built where it is installed, and looks for torch there, so that `--no-build-isolation` is needed.
set -euo pipefail
target=${1:?usage: bash environment.sh DIR}
root=$(cd "$(dirname "$0")/../.." && pwd)

uv venv --quiet --allow-existing --python "${PYTHON:-3.11}" "$target"
python=$target/bin/python
plugins=(grpo ppo qwen2vl vqa deepspeed)
uv pip install --python "$python" -e "$root" "${plugins[@]/#/-e$root/plugins/rllava-}" 'pytest>=8.3' setuptools wheel
DS_BUILD_OPS=0 uv pip install --python "$python" --no-build-isolation 'deepspeed==0.19.8'
"$python" -c 'import deepspeed, rllava_core, rllava_deepspeed; print("DeepSpeed", deepspeed.__version__, "with rllava")'
