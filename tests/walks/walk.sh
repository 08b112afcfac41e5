# What the four walks share. `try` shows a command, which must succeed, `fails` one that must not; `say` tells what comes.
set -u
say() {
    printf '\n# %s\n' "$*"
}
try() {
    echo "$ $*"
    "$@" || { echo "exit $?: this should have worked" && exit 1; }
}
fails() {
    echo "$ $*"
    ! "$@" || { echo "this should have failed" && exit 1; }
}
