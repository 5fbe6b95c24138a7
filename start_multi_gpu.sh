#!/usr/bin/env bash
# Starts ComfyUI with comfy_parallel on: one process, every GPU, one job per slot at a time.
set -euo pipefail
unset CDPATH

usage() {
    cat <<'END'
Usage: start_multi_gpu.sh [OPTION]... [--] [COMFYUI ARGUMENT]...

Starts ComfyUI with the scheduler on. Arguments that are not listed here go to ComfyUI's main.py
(for example --port 8190 --listen 0.0.0.0), and so does everything after --.

  --devices LIST    one slot per entry: cuda:0,cuda:1 or, without GPUs, cpu,cpu (COMFY_PARALLEL_DEVICES)
  --num-gpus N      use the first N GPUs (COMFY_NUM_GPUS); without either option: all visible GPUs
  --comfyui DIR     the ComfyUI folder; default: COMFYUI_PATH, else the one this folder is linked into
  --log-file FILE   also write all output here; default: logs/comfyui_DATE.log in ComfyUI's user folder
  --no-log-file     write to the terminal only
  --dry-run         print the environment and the command, start nothing
  -h, --help        print this; for ComfyUI's own options: start_multi_gpu.sh -- --help

Environment, besides the variables of comfy_parallel itself:
  COMFYUI_PATH      the ComfyUI folder
  COMFYUI_PYTHON    the Python to use; default: venv/ or .venv/ in the ComfyUI folder, else python3
  COMFY_MULTI_GPU_SCHED=0         start ComfyUI as it is, scheduler off
  OMP_NUM_THREADS, MKL_NUM_THREADS, OPENBLAS_NUM_THREADS
                    kept if set; default: 4, or fewer when the slots outnumber a quarter of the cores

ComfyUI runs in its own folder: relative paths among its arguments start there.
The exit status is ComfyUI's; 2 means that it was not started.
END
}

# Usage: die PROBLEM FIX...
die() {
    printf 'start_multi_gpu.sh: %s\n' "$1" >&2
    printf '  %s\n' "${@:2}" >&2
    exit 2
}

is_comfyui() {
    [[ -f $1/main.py && -d $1/comfy ]]
}

absolute() {
    if [[ $1 == /* ]]; then printf '%s\n' "$1"; else printf '%s\n' "$PWD/$1"; fi
}

# The ComfyUI around this script, whichever of the symlinks to it was used.
enclosing_comfyui() {
    local script=$1 dir real candidate
    while true; do
        dir=$(cd -- "$(dirname -- "$script")" && pwd -L)
        real=$(cd -- "$dir" && pwd -P)
        for candidate in "$dir" "$real"; do
            if [[ $candidate == */custom_nodes/* ]] && is_comfyui "${candidate%/custom_nodes/*}"; then
                printf '%s\n' "${candidate%/custom_nodes/*}"
                return
            fi
        done
        [[ -L $script ]] || return 0
        script=$(readlink -- "$script")
        [[ $script == /* ]] || script=$dir/$script
    done
}

find_comfyui() {
    local found=${comfyui_option:-${COMFYUI_PATH:-}}
    if [[ -z $found ]]; then
        found=$(enclosing_comfyui "${BASH_SOURCE[0]}")
        [[ -n $found ]] || die "cannot find ComfyUI" \
            "name its folder with --comfyui DIR or COMFYUI_PATH=DIR"
    fi
    is_comfyui "$found" || die "$found is not a ComfyUI folder: it has no main.py with a comfy/ folder beside it" \
        "name the folder that holds ComfyUI's main.py with --comfyui DIR or COMFYUI_PATH=DIR"
    cd -- "$found" && pwd -L
}

find_python() {
    local candidate
    if [[ -n ${COMFYUI_PYTHON:-} ]]; then
        command -v -- "$COMFYUI_PYTHON" >/dev/null || die "COMFYUI_PYTHON=$COMFYUI_PYTHON cannot be run" \
            "set it to the Python that ComfyUI's requirements are installed in, or unset it"
        if [[ $COMFYUI_PYTHON == */* ]]; then absolute "$COMFYUI_PYTHON"; else command -v -- "$COMFYUI_PYTHON"; fi
        return
    fi
    for candidate in "$comfyui/venv/bin/python" "$comfyui/.venv/bin/python"; do
        if [[ -x $candidate ]]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    if ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
        die "ComfyUI has no venv/ or .venv/, and python3 is missing or has no torch" \
            "set COMFYUI_PYTHON to the Python that ComfyUI's requirements are installed in"
    fi
    command -v python3
}

# The value that main.py will see for one of its options; nothing if the option is not given.
host_option() {
    local name=$1 previous='' arg value=''
    for arg in "${host_args[@]}"; do
        [[ $previous != "$name" ]] || value=$arg
        [[ $arg != "$name"=* ]] || value=${arg#*=}
        previous=$arg
    done
    printf '%s\n' "$value"
}

# ComfyUI's base folder, which holds custom_nodes and user.
base_directory() {
    local base
    base=$(host_option --base-directory)
    [[ -z $base || $base == /* ]] || base=$comfyui/$base
    printf '%s\n' "${base:-$comfyui}"
}

check_installed() {
    local base=$1 script fix
    for script in "$base"/custom_nodes/*/prestartup_script.py; do
        [[ $script != *.disabled/* && -f $script ]] || continue
        if grep -q comfy_parallel -- "$script"; then return; fi
    done
    if grep -q comfy_parallel -- "$comfyui/main.py"; then return; fi # a fork with patches/main.diff
    fix="comfy-parallel link $(printf %q "$comfyui")"
    [[ $base == "$comfyui" ]] || fix="ln -s $(printf '%q %q' "$repo" "$base/custom_nodes/comfy_parallel")"
    die "comfy_parallel is not among the custom nodes in $base/custom_nodes" "link it there: $fix"
}

count_of() {
    local list=$1 commas
    commas=${list//[^,]/}
    printf '%s\n' $((${#commas} + 1))
}

# How many slots there will be, for sharing out the CPU cores; ComfyUI checks the values themselves.
count_slots() {
    local gpus=1 per_gpu=${COMFY_PARALLEL_SLOTS_PER_GPU:-1}
    if [[ -n ${COMFY_PARALLEL_DEVICES:-} ]]; then
        gpus=$(count_of "$COMFY_PARALLEL_DEVICES")
    elif [[ -n ${COMFY_NUM_GPUS:-} ]]; then
        gpus=$COMFY_NUM_GPUS
    elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        gpus=$(count_of "$CUDA_VISIBLE_DEVICES")
    elif command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    [[ $gpus =~ ^[1-9][0-9]{0,2}$ ]] || gpus=1
    [[ $per_gpu =~ ^[1-9][0-9]{0,2}$ ]] || per_gpu=1
    printf '%s\n' $((gpus * per_gpu))
}

default_threads() {
    local cores threads
    cores=$(nproc 2>/dev/null || echo 4)
    threads=$((cores / $(count_slots)))
    ((threads <= 4)) || threads=4
    ((threads >= 1)) || threads=1
    printf '%s\n' "$threads"
}

set_environment() {
    local threads
    export COMFY_MULTI_GPU_SCHED=${COMFY_MULTI_GPU_SCHED:-1}
    if [[ -n $devices_option ]]; then
        export COMFY_PARALLEL_DEVICES=$devices_option
    elif [[ -n $num_gpus_option ]]; then
        export COMFY_NUM_GPUS=$num_gpus_option
        unset COMFY_PARALLEL_DEVICES
    fi
    threads=${OMP_NUM_THREADS:-$(default_threads)}
    export OMP_NUM_THREADS=$threads
    export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$threads}
    export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$threads}
}

# Slots on the CPU need ComfyUI's --cpu: without it, ComfyUI looks for a GPU and fails.
add_cpu_argument() {
    [[ ${COMFY_PARALLEL_DEVICES:-} =~ ^[[:space:]]*cpu[[:space:]]*(,[[:space:]]*cpu[[:space:]]*)*$ ]] || return 0
    [[ " ${host_args[*]} " == *" --cpu "* ]] || host_args+=(--cpu)
}

default_log_file() {
    local user
    user=$(host_option --user-directory)
    user=${user:-$(base_directory)/user}
    [[ $user == /* ]] || user=$comfyui/$user
    [[ -w $user || (! -e $user && -w $(dirname -- "$user")) ]] || user=$PWD
    printf '%s\n' "$user/logs/comfyui_$(date +%Y%m%d_%H%M%S).log"
}

print_plan() {
    local name
    for name in COMFY_MULTI_GPU_SCHED COMFY_NUM_GPUS "${!COMFY_PARALLEL_@}" CUDA_VISIBLE_DEVICES \
        OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS; do
        [[ -z ${!name+set} ]] || printf '%s=%q\n' "$name" "${!name}"
    done
    [[ -z $log_file ]] || printf 'log: %s\n' "$log_file"
    printf 'cd %q\n' "$comfyui"
    printf '%q ' "${command[@]}" | sed 's/ $//'
    printf '\n'
}

# From here on, everything printed also goes to the log. The copying process ignores the signals
# that end ComfyUI, so that ComfyUI's last words still reach it; it ends with ComfyUI.
copy_output_to() {
    if ! { mkdir -p -- "$(dirname -- "$1")" && : >>"$1"; } 2>/dev/null; then
        die "cannot write the log file $1" "choose another with --log-file FILE, or none with --no-log-file"
    fi
    exec > >(trap '' HUP INT TERM && exec tee -a -- "$1") 2>&1
}

devices_option='' num_gpus_option='' comfyui_option='' log_option='' is_logging=1 is_dry_run=0
host_args=()
while (($#)); do
    case $1 in
        --devices | --num-gpus | --comfyui | --log-file)
            [[ $# -gt 1 && -n $2 ]] || die "$1 needs a value" "see start_multi_gpu.sh --help"
            set -- "$1=$2" "${@:3}"
            continue
            ;;
        --devices=*) devices_option=${1#*=} ;;
        --num-gpus=*) num_gpus_option=${1#*=} ;;
        --comfyui=*) comfyui_option=${1#*=} ;;
        --log-file=*) log_option=${1#*=} ;;
        --no-log-file) is_logging=0 ;;
        --dry-run) is_dry_run=1 ;;
        -h | --help)
            usage
            exit
            ;;
        --)
            host_args+=("${@:2}")
            break
            ;;
        *) host_args+=("$1") ;;
    esac
    shift
done

[[ -z $devices_option || -z $num_gpus_option ]] || die "--devices and --num-gpus contradict each other" \
    "give one of them; a device list already says how many"
[[ -z $num_gpus_option || $num_gpus_option =~ ^[1-9][0-9]{0,2}$ ]] || die "--num-gpus $num_gpus_option: not a number of GPUs" \
    "write a whole number from 1 on, or leave the option out to use all"

repo=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
comfyui=$(find_comfyui)
python=$(find_python)
check_installed "$(base_directory)"
set_environment
add_cpu_argument
command=("$python" main.py "${host_args[@]}")
log_file=''
if ((is_logging)); then
    if [[ -n $log_option ]]; then log_file=$(absolute "$log_option"); else log_file=$(default_log_file); fi
fi

if ((is_dry_run)); then
    print_plan
    exit
fi
if [[ -n $log_file ]]; then
    copy_output_to "$log_file"
    echo "start_multi_gpu.sh: log file $log_file"
fi
cd -- "$comfyui"
exec "${command[@]}"
