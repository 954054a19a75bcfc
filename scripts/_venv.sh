# Make .venv in the repository and install imgcurate with the given extras into it, once per change.
# Sourced by scripts/demo and scripts/test; sets $repository and $python.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=$1
base=${PYTHON:-python3}
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "imgcurate needs Python 3.11 or newer; name one with PYTHON=/path/to/python3" >&2
    exit 1
fi
[ -x "$repository/.venv/bin/python" ] || "$base" -m venv "$repository/.venv"
python=$repository/.venv/bin/python
stamp=$repository/.venv/.installed-$extras
wanted=$(sha256sum "$repository/pyproject.toml" | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing imgcurate[$extras] into .venv (several GB the first time)" >&2
    "$python" -m pip install --quiet --upgrade pip
    "$python" -m pip install --quiet --editable "$repository[$extras]"
    echo "$wanted" >"$stamp"
fi
