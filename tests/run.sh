#!/usr/bin/env bash
# Sets everything up and runs every test: this project's own, and beside them ComfyUI's own execution suite,
# unmodified, with the scheduler off and with 1, 2 and 4 CPU slots, one after the other: it mostly waits.
#
# usage: bash tests/run.sh [PYTEST_OPTION...]          everything
#        bash tests/run.sh --fast [PYTEST_OPTION...]   only tests/unit
#        bash tests/run.sh --upstream [NAME...]        only ComfyUI's own suite; NAME is off or a number of slots,
#                                                      2p for two slots in processes of their own
#        bash tests/run.sh --process-slots [PYTEST_OPTION...]
#                                                      what jobs and clients see, again with each slot in a process of
#                                                      its own, and ComfyUI's own suite with two of them
#
# PYTEST_OPTION goes to the run of this project's own tests.

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UPSTREAM_MIN_PASSED=200 # fewer means that most of the suite was not collected
SUMMARY='^=*.* in [0-9.]+s'

say() { printf 'run: %s\n' "$*"; }

# usage: set_up [SETUP_OPTION...]
set_up() {
    # shellcheck source=tests/setup.sh
    source "$REPO/tests/setup.sh" "$@"
    export COMFY_PARALLEL_REQUIRE_HOST=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

own_tests() {
    say "tests of this project: $1"
    # Two files at a time, each on one process: tests of a file share hosts. tests/order.py has the longest start first.
    # ComfyUI's suite beside them comes first: it gives a host 20 s to start, and mostly waits.
    (cd "$REPO" && nice -n 10 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@")
}

device_list() {
    local devices kind=cpu
    [[ $1 != *p ]] || kind=cpu=process
    devices=$(yes "$kind" | head -n "${1%p}" | tr '\n' ,)
    printf '%s' "${devices%,}"
}

# Each run has its own copy of the host: the suite writes into it and into its output directory.
copy_host() {
    rm -rf "$1" &&
        cp -a "$COMFYUI_PATH" "$1" && # with its times, by which Python knows what it has compiled
        rm -rf "$1/custom_nodes/comfy_parallel" &&
        ln -s "$REPO" "$1/custom_nodes/comfy_parallel"
}

# usage: upstream_suite off|SLOTS LOG: run it; the log ends with pytest's summary.
upstream_suite() {
    local name=$1 log=$2 home=$WORK/host-$1
    copy_host "$home" && cd "$home" || return
    unset COMFY_MULTI_GPU_SCHED COMFY_PARALLEL_DEVICES
    # The suite kills its servers and expects each new one to have an empty history; ours would find the jobs again.
    [[ $name == off ]] || export COMFY_MULTI_GPU_SCHED=1 COMFY_PARALLEL_STRICT=1 COMFY_PARALLEL_STATE=off COMFY_PARALLEL_DEVICES
    [[ $name == off ]] || COMFY_PARALLEL_DEVICES=$(device_list "$name")
    # The suite gives a host 20 s to start; a first start from a cold disk takes longer.
    python main.py --cpu --quick-test-for-ci >"$log" 2>&1 || return
    python -m pytest tests/execution --skip-timing-checks --port "$(python "$REPO/tests/ports.py")" --output_dir "$home/suite-output" \
        -p no:cacheprovider >>"$log" 2>&1
}

# usage: judge NAME STATUS LOG: one line; fails if the suite failed or hardly ran.
judge() {
    local name=$1 status=$2 log=$3 summary passed
    summary=$(grep -E "$SUMMARY" "$log" | tail -n 1 || true)
    passed=$(grep -oE '[0-9]+ passed' <<<"$summary" | cut -d ' ' -f 1 || true)
    say "ComfyUI's suite, $name: ${summary:-no summary} (log: $log)"
    ran_as_asked "$name" "$log" || return 1
    ((status == 0 && ${passed:-0} >= UPSTREAM_MIN_PASSED)) && return 0
    say "ComfyUI's suite, $name: FAILED (pytest ended with $status; at least $UPSTREAM_MIN_PASSED must pass)"
    grep -m 20 -E '^(FAILED|ERROR) ' "$log" || tail -n 40 "$log"
    return 1
}

# usage: ran_as_asked NAME LOG: ComfyUI goes on without a custom node that fails, and would pass its own suite.
ran_as_asked() {
    local expected=$1 slots
    slots=$(sed -n 's/^comfy_parallel: \([0-9]*\) slots\{0,1\}: .*/\1/p' "$2" | sort -u)
    [[ ${slots:-off} == "${expected%p}" ]] && return 0
    say "ComfyUI's suite, $expected: FAILED (its hosts ran with ${slots:-no} slots)"
    return 1
}

# The suite gives a host five tries in 20 s to start; a busy machine can need longer.
started_too_slowly() { grep -qE '\(5/5\) Retrying|^E +ConnectionRefusedError' "$WORK/$1.log"; }

# usage: run_suite NAME: once more where a host was too slow, which says nothing about the tests.
run_suite() {
    local status=0
    (upstream_suite "$1" "$WORK/$1.log") || status=$?
    if ((status)) && started_too_slowly "$1"; then
        say "ComfyUI's suite, $1: a host took more than 20 s to start; running it again"
        status=0
        (upstream_suite "$1" "$WORK/$1.log") || status=$?
    fi
    judge "$1" "$status" "$WORK/$1.log"
}

# usage: upstream NAME...: returns non-zero if any fails, after running all.
upstream() {
    local name failed=0
    mkdir -p "$COMFY_PARALLEL_CACHE/upstream"
    WORK=$(mktemp -d "$COMFY_PARALLEL_CACHE/upstream/XXXXXX")
    say "ComfyUI's own suite, about 3 minutes each: $*"
    for name in "$@"; do
        run_suite "$name" || failed=1
    done
    rm -rf "$WORK"/host-*
    return "$failed"
}

everything() {
    local failed=0 beside
    set_up --deploy --browser
    set -m # The suite gets a process group of its own, and ends with this script.
    upstream off 1 2 4 </dev/null &
    beside=$!
    set +m
    # shellcheck disable=SC2064 # the group is known now
    trap "kill -- -$beside 2>/dev/null || true" EXIT
    own_tests "$REPO/tests" "$@" || failed=1
    wait "$beside" || failed=1
    trap - EXIT
    ((failed == 0)) && say "all passed" && return 0
    say "FAILED"
    return 1
}

process_slots() {
    local failed=0 name files=()
    for name in http_contract websockets interrupts isolation saves parity process_slots; do
        files+=("$REPO/tests/host/test_$name.py")
    done
    (export COMFY_PARALLEL_TEST_SLOTS=process && own_tests "${files[@]}" "$@") || failed=1
    upstream 2p || failed=1
    return "$failed"
}

case ${1:-} in
--process-slots)
    shift
    set_up
    process_slots "$@"
    ;;
--fast)
    shift
    set_up
    own_tests "$REPO/tests/unit" "$@"
    ;;
--upstream)
    shift
    (($#)) || set -- off 1 2 4
    set_up
    upstream "$@"
    ;;
*) everything "$@" ;;
esac
