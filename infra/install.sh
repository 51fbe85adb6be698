#!/usr/bin/env bash
# What `make install` does: .venv with the pinned packages, the Kafka broker's jars, and redis-server.
# What is there is kept. System packages come through apt where we are root or may use sudo; elsewhere
# one sentence names what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

apt_updated=
# need PROGRAM PACKAGE: the program, if need be through apt
need() {
    command -v "$1" >/dev/null && return
    if ! command -v apt-get >/dev/null; then
        echo "$1 is missing: install it (Debian's package is $2), or run everything with: docker compose up" >&2
        exit 1
    fi
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! sudo -n true 2>/dev/null; then
            echo "$1 is missing: run \`sudo apt-get install $2\`, or everything with: docker compose up" >&2
            exit 1
        fi
        as_root=(sudo -n)
    fi
    echo "installing $2"
    [ -n "$apt_updated" ] || "${as_root[@]}" apt-get update -qq
    apt_updated=yes
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >/dev/null
}

# The first interpreter of a version the package allows.
python_of() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
            command -v "$candidate"
            return
        fi
    done
    echo "no Python 3.11, 3.12 or 3.13 found: install one, or name it: make install PYTHON=/path/to/python3" >&2
    return 1
}

need java openjdk-17-jre-headless
need mvn maven
need redis-server redis-server

# A real Triton server, for its tests, runs on the system's Python. Without it those tests say so.
(
    system=/usr/bin/python3
    need "$system" python3
    "$system" -c 'import ensurepip' 2>/dev/null || need "ensurepip for $system" python3-venv
    version=$("$system" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    library="libpython$version"
    "$system" -c "import ctypes; ctypes.CDLL('$library.so.1.0')" 2>/dev/null || need "$library.so" "$library"
) || true

# What the browser bundle is tested in, and npm, which brings the runtime it holds. Without them those tests say so.
(
    need chromium chromium
    need chromedriver chromium-driver
    need npm npm
) || true

if [ ! -x .venv/bin/pip ]; then
    python=$(python_of)
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        # Debian keeps venv's own pip in a package of its own; no program tells whether it is there.
        need "ensurepip for $python" python3-venv
    fi
    "$python" -m venv .venv
fi
echo "installing Python packages (with torch a few minutes the first time)"
# Compiled once, by all processors, which pip does with one: where PYTHONDONTWRITEBYTECODE is set, as in many containers,
# every process would compile what it imports anew, torch alone for over a second. Some packages carry templates
# that are no Python; they are passed over.
.venv/bin/pip install -q --no-compile -c constraints.txt -e '.[train,onnx,openvino,serve,dev]'
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
.venv/bin/python -c 'from infra.local.kafka import ensure_jars; print("kafka jars in", ensure_jars())'
