#!/bin/sh
# Runs tests/browser/ with the Python given as $1; installs what it needs.
# `make test-browser` calls it. FWDLIB_SCREENSHOT=/some/where/lab.png keeps the pictures; FWDLIB_DATA is passed on to the
# notebook. The accessibility check, axe-core, is fetched from the npm registry once and kept in fwdlib's cache.
set -eu
python=${1:?usage: tests/browser.sh PYTHON}
case $python in */*) python=$(realpath -s "$python") ;; esac # a link to a venv's Python stays a link
cd "$(dirname "$0")/.."

if ! { command -v chromium && command -v chromedriver; } >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "tests/browser.sh: chromium and chromedriver are not on the PATH. Install them, on Debian with" >&2
        echo "    sudo apt-get install chromium chromium-driver" >&2
        exit 1
    fi
    echo "installing chromium and chromium-driver"
    log=$(mktemp)
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        chromium chromium-driver; } >"$log" 2>&1; then
        tail -20 "$log" >&2
        exit 1
    fi
    rm "$log"
fi
"$python" -c 'import selenium' 2>/dev/null ||
    "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore selenium
FWDLIB_BROWSER=1 exec "$python" -m pytest tests/browser -m browser -q -rs
