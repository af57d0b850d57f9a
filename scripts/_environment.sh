# Sourced by the other scripts: makes .venv once, from constraints.txt, and puts it on the PATH.
#   CLLM_PYTHON  the interpreter to make it with (default python3; 3.11 or newer)
#   CLLM_VENV    where it goes (default .venv in the project's root)
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
# The stamp holds what was installed: a change of either file, or another extra, installs again.
stamp="$venv/.cllm-installed-${extra:-base}"
want=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    echo "installing into $venv (minutes, once)" >&2
    # torch by itself first: pip then takes the pinned build and not the newest that another package would admit.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
    echo "$want" >"$stamp"
fi
export PATH="$venv/bin:$PATH"
