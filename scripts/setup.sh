#!/usr/bin/env bash
# Make .venv from the lock, for `make run`; with `dev`, add what tests and linters need. `make` calls this as needed.
# It runs with bash 3.2 and the tools of macOS, too.
set -euo pipefail
cd "$(dirname "$0")/.."

how_to_get_python() {
  echo "setup: as root:"
  echo "setup:   macOS             brew install python@3.11"
  echo "setup:   Fedora, RHEL      sudo dnf install python3.11"
  echo "setup:   Debian 12         sudo apt-get install python3.11 python3.11-venv"
  echo "setup:   Ubuntu 22.04      sudo apt-get install python3.10 python3.10-venv"
  echo "setup: without root, with uv (https://docs.astral.sh/uv):"
  echo "setup:   uv python install 3.11"
  echo "setup:   PYTHON=\$(uv python find --system 3.11) make run"
}

supported='import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] < (3, 12))'
python='' seen=''
own=$PWD/.venv/bin: # .venv is made anew, so its own Python cannot make it
PATH=${PATH//"$own"/}
for candidate in ${PYTHON:-python3 python3.11 python3.10}; do
  case $candidate in "$PWD"/.venv/*) seen+=" $candidate (in .venv, which is made anew);" && continue ;; esac
  if "$candidate" -c "$supported" 2>/dev/null; then python=$candidate && break; fi
  seen+=" $candidate ($("$candidate" --version 2>/dev/null || echo 'not there'));"
done
if [ -z "$python" ]; then
  {
    echo "setup: Python 3.10 or 3.11 is needed, Prefect 1.4.1 runs on no other. Seen:$seen"
    echo "setup: install one of them, or name it: PYTHON=/path/to/python3.11 make …"
    how_to_get_python
  } >&2
  exit 1
fi

if command -v flock >/dev/null; then exec 9<scripts/setup.sh && flock 9; fi # another `make` may be at it
export VIRTUAL_ENV=$PWD/.venv
made() { [ ".venv/$1" -nt "requirements${2-}.txt" ] && [ ".venv/$1" -nt scripts/setup.sh ]; }

# pip's own setting, as in pip.conf or PIP_INDEX_URL, if there is one: of the environment, of install, of all commands
pip_setting() {
  local place value
  for place in :env: install global; do
    value=$(printf '%s\n' "$pip_settings" | sed -nE "s/^$place\.$1=(['\"])(.*)\1\$/\2/p")
    if [ -n "$value" ]; then
      printf '%s\n' "$value" | sed 's/\\n/ /g' # several of them
      return
    fi
  done
}

# uv does not read pip's settings: hand them on, unless uv has its own
as_pip() { # UV_VARIABLE SETTING
  local value
  value=$(pip_setting "$2")
  if [ -z "${!1-}" ] && [ -n "$value" ]; then export "$1=${value/#\~/$HOME}"; fi # pip expands it, too
}
configure_uv() {
  local bundle
  pip_settings=$(.venv/bin/pip --disable-pip-version-check config list)
  as_pip UV_DEFAULT_INDEX index-url
  as_pip UV_INDEX extra-index-url
  as_pip UV_FIND_LINKS find-links
  as_pip UV_INSECURE_HOST trusted-host
  as_pip HTTPS_PROXY proxy
  as_pip SSL_CERT_FILE cert
  if [ -z "${SSL_CERT_FILE-}" ]; then # these are for pip's requests
    bundle=${REQUESTS_CA_BUNDLE:-${CURL_CA_BUNDLE-}}
    if [ -f "$bundle" ]; then export SSL_CERT_FILE=$bundle; fi
  fi
  # as pip, trust what this machine trusts
  for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
    if [ -f "$bundle" ]; then export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS-1}; fi
  done
}

packages_failed() {
  echo "setup: the packages could not be fetched. For an index of your own, a proxy or a CA see" \
    "docs/without-docker-hub.md, On your own machine" >&2
  exit 1
}

if ! made ready || ! made ready -build; then
  echo "setup: .venv with $("$python" --version) and the locked packages (about 10 s)"
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      echo "setup: installing python3-venv with apt-get"
      scripts/apt-install.sh python3-venv
    else
      {
        echo "setup: $python cannot make a virtual environment: its package for venv is not installed"
        how_to_get_python
      } >&2
      exit 1
    fi
  fi
  rm -rf .venv
  "$python" -m venv .venv
  # pip brings uv alone, and uv the rest: 3 s in place of 33 s
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
    --requirement <(sed -n '/^uv==/,/^[^ ]/{/^uv==/p;/^ /p;}' requirements-dev.txt) || packages_failed
  configure_uv
  .venv/bin/uv pip install --quiet --no-deps --require-hashes \
    --build-constraints requirements-build.txt --requirement requirements.txt || packages_failed
  # for `prefect register -m`
  pwd >"$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"
  touch .venv/ready
fi
if [ "${1-}" = dev ] && ! made dev -dev; then
  echo "setup: the packages of tests and linters (about 15 s)"
  configure_uv
  # compiled, because the tests start many processes, and where Python may not write bytecode each compiles Prefect again
  .venv/bin/uv pip sync --compile-bytecode --quiet --require-hashes \
    --build-constraints requirements-build.txt requirements-dev.txt || packages_failed
  touch .venv/dev
fi
