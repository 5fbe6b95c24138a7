#!/usr/bin/env bash
# Sets everything up, starts ComfyUI with two CPU slots and runs six jobs, two at a time. No GPU needed.
#
# usage: bash tests/quick_start.sh

set -euo pipefail

TESTS_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

set_up() {
    # shellcheck source=tests/setup.sh
    source "$TESTS_DIR/setup.sh"
}

set_up
exec python "$TESTS_DIR/quick_start.py"
