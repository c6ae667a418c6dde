#!/usr/bin/env bash
# Make .venv from the lock, for `make run`; with `dev`, add what tests and linters need. `make` calls this as needed.
set -euo pipefail
cd "$(dirname "$0")/.."

supported='import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] < (3, 12))'
python='' seen=''
for candidate in ${PYTHON:-python3 python3.11 python3.10}; do
  if "$candidate" -c "$supported" 2>/dev/null; then python=$candidate && break; fi
  seen+=" $candidate ($("$candidate" --version 2>/dev/null || echo 'not there'));"
done
if [ -z "$python" ]; then
  echo "setup: Python 3.10 or 3.11 is needed, Prefect 1.4.1 runs on no other. Seen:$seen" >&2
  echo "setup: install one of them, or name it: PYTHON=/path/to/python3.11 make …" >&2
  exit 1
fi

if command -v flock >/dev/null; then exec 9<scripts/setup.sh && flock 9; fi # another `make` may be at it
export VIRTUAL_ENV=$PWD/.venv
made() { [ ".venv/$1" -nt "requirements${2-}.txt" ] && [ ".venv/$1" -nt scripts/setup.sh ]; }

if ! made ready; then
  echo "setup: .venv with $("$python" --version) and the locked packages (about 10 s)"
  if ! "$python" -c 'import ensurepip' 2>/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing python3-venv with apt-get"
    scripts/apt-install.sh python3-venv
  fi
  rm -rf .venv
  "$python" -m venv .venv
  # pip brings uv alone, and uv the rest: 3 s in place of 33 s
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
    --requirement <(sed -n '/^uv==/,/^[^ ]/{/^uv==/p;/^ /p;}' requirements-dev.txt)
  .venv/bin/uv pip install --quiet --no-deps --require-hashes --requirement requirements.txt
  # for `prefect register -m`
  pwd >"$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"
  touch .venv/ready
fi
if [ "${1-}" = dev ] && ! made dev -dev; then
  echo "setup: the packages of tests and linters (about 15 s)"
  # compiled, because the tests start many processes, and where Python may not write bytecode each compiles Prefect again
  .venv/bin/uv pip sync --compile-bytecode --quiet requirements-dev.txt
  touch .venv/dev
fi
