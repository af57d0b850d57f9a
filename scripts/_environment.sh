# Sourced by the other scripts: creates .venv from constraints.txt, if it is missing or old, and puts it on the PATH.
#   CLLM_PYTHON  the interpreter to create it with (default python3; 3.11 or newer)
#   CLLM_VENV    the environment's folder (default .venv in the project's root)
# Usage: . scripts/_environment.sh [EXTRA]     an extra of pyproject.toml, such as dev

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${CLLM_PYTHON:-python3}
venv=${CLLM_VENV:-$root/.venv}
extra=${1:-}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is $("$python" --version 2>&1); cllm needs Python 3.11 or newer (set CLLM_PYTHON)" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# The stamp has the checksum of both files; if it differs, or is missing for this extra, packages are installed.
stamp="$venv/.cllm-installed-${extra:-base}"
want=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    echo "installing into $venv (minutes, once)" >&2
    # torch first and alone: pip then takes the pinned build, not the newest one that another package allows.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
    echo "$want" >"$stamp"
fi
export PATH="$venv/bin:$PATH"
