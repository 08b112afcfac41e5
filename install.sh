#!/bin/sh
# sh install.sh [-n] VENV [test]    install the project into VENV, with `test` also what its tests need
#
# -n only says what would be done. The first Python from 3.11 to 3.14 is taken, or one is fetched with uv. Its
# version picks the exact packages in constraints/, the hardware the extra: tpu, cuda (13), cuda12 or none.
#   PYTHON=...       another interpreter, or several to try
#   EXTRA=...        another extra; empty for none
#   DEVICE_ROOT=...  stands before /dev, /proc and /sys
# The invariant: VENV/core and VENV/test are there only while all that they stand for is installed, and no
# directory is cleared that is not an environment.
# POSIX sh and no GNU options, so that it runs on macOS.
set -u
caller=$PWD
cd "$(dirname "$0")" || exit 1

main() {
    dry=
    if [ "${1:-}" = -n ]; then dry=yes && shift; fi
    venv=${1:?usage: sh install.sh [-n] VENV [test]}
    [ "$caller" = "$PWD" ] || case $venv in /*) ;; *) venv=$caller/$venv ;; esac
    extras=${EXTRA-$(find_extra)}
    [ "${2:-}" != test ] || extras=test${extras:+,$extras}
    target=.${extras:+[$extras]}

    # An environment without core was interrupted, and is made anew.
    python=$venv/bin/python
    [ -e "$venv/core" ] && fits "$python" || { check_venv && python=$(find_python); } || exit 1
    echo "installing $target into $venv with $python, which takes a few minutes the first time"
    [ -z "$dry" ] || exit 0

    [ "$python" = "$venv/bin/python" ] || make_venv
    rm -f "$venv/core" "$venv/test"
    pins=$("$venv/bin/python" -c 'import sys; print("constraints/py3%d.txt" % min(sys.version_info[1], 12))')
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$pins" -e "$target" ||
        fail "pip could not install $target; what it said stands above"
    touch "$venv/core"
    [ "${2:-}" != test ] || touch "$venv/test"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

# To make an environment is to clear its directory.
check_venv() {
    [ -z "$(ls -A "$venv" 2>/dev/null)" ] || [ -e "$venv/pyvenv.cfg" ] ||
        fail "$venv is not empty and no Python environment; name a directory that is not there yet, as .venv"
}

# A candidate is tried by running it: a pyenv shim may exist and not run, and Debian's Python may lack venv.
fits() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

# Prints the Python to use, or uv where that must fetch one.
find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
        fits "$candidate" && echo "$candidate" && return
    done
    [ -z "${PYTHON:-}" ] || fail "none of these is a Python from 3.11 to 3.14 that has venv: $PYTHON"
    echo uv
}

make_venv() {
    if [ "$python" != uv ]; then
        "$python" -m venv --clear "$venv" || fail "$python -m venv failed"
    elif uv=$(find_uv); then
        UV_VENV_CLEAR=1 $uv venv --quiet --seed --python 3.12 "$venv" ||
            fail "uv could not fetch Python 3.12; install a Python from 3.11 to 3.14"
    else
        fail "there is neither a Python from 3.11 to 3.14 that has venv, nor a uv to fetch one; install either" \
            "(Debian, Ubuntu: apt install python3-venv; macOS: brew install python@3.12)"
    fi
}

# Prints the command that runs uv: what PATH has, else installed beside the environment, else for the user.
find_uv() {
    command -v uv && return
    if python3 -m venv "$venv-uv" && "$venv-uv/bin/python" -m pip install uv; then
        uv=$venv-uv/bin/uv
    elif python3 -m pip install --user uv; then
        uv="python3 -m uv"
    else
        return 1
    fi >/dev/null 2>&1
    echo "$uv"
}

# Prints the extra for the hardware. CUDA 13 needs driver 580 and compute capability 7.5 (Turing), CUDA 12 driver
# 525. A network card of Google's has the vendor of its TPUs, so the vendor alone does not tell.
find_extra() {
    root=${DEVICE_ROOT:-}
    gpus=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null)
    any "$root"/dev/nvidia[0-9]* && gpus="$gpus $(cat "$root/proc/driver/nvidia/version" 2>/dev/null)"
    driver=$(echo "$gpus" | grep -oE '[0-9]{3}\.[0-9]+' | head -n 1)
    capability=$(echo "$gpus" | sed -n 's/.*, *\([0-9]*\)\.\([0-9]\).*/\1\2/p' | sort -n | head -n 1)
    major=${driver%.*}
    if [ "${major:-0}" -ge 580 ] && [ "${capability:-75}" -ge 75 ]; then
        echo cuda
    elif [ "${major:-0}" -ge 525 ]; then
        echo cuda12
    elif [ -n "$driver" ]; then
        echo "NVIDIA driver $driver is too old for jax, which needs 525: installing for the CPU;" \
            "set JAX_PLATFORMS=cpu to run there" >&2
    elif any "$root"/dev/accel[0-9]*; then
        echo tpu
    elif any "$root"/dev/vfio/[0-9]* && grep -q 0x1ae0 "$root"/sys/bus/pci/devices/*/vendor 2>/dev/null; then
        echo tpu
    fi
}

any() {
    [ -e "$1" ]
}

main "$@"
