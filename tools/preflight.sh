#!/bin/sh
# Name what is missing before the install fails on it, with the command that installs it. Usage: preflight.sh PYTHON CC
python=$1
compiler=$2
failed=0

missing() {
    printf 'missing: %s\n  install it with: %s\n' "$1" "$2" >&2
    failed=1
}

if command -v apt-get >/dev/null; then install="sudo apt-get install"
elif command -v dnf >/dev/null; then install="sudo dnf install"
elif command -v apk >/dev/null; then install="sudo apk add"
else install="your package manager:"; fi

if ! command -v "$python" >/dev/null; then
    missing "Python 3.11 or newer ($python)" "$install python3"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    missing "Python 3.11 or newer ($python is $("$python" -V 2>&1)); name another with make PYTHON=python3.12" "$install python3.11"
else
    "$python" -c 'import venv, ensurepip' 2>/dev/null || missing "Python's venv module" "$install python3-venv"
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -f "$header" ] || missing "Python's C headers ($header)" "$install python3-dev (Fedora: python3-devel)"
fi
if ! command -v "$compiler" >/dev/null; then
    missing "a C compiler ($compiler)" "$install gcc libc6-dev (Fedora: gcc)"
elif ! printf '#include <stdint.h>\n#include <stdlib.h>\nint main(void) { return 0; }\n' | "$compiler" -x c -o /dev/null - 2>/dev/null; then
    missing "the C library's headers" "$install libc6-dev (Fedora: glibc-devel)"
fi
exit $failed
