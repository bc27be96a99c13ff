# Shared by scripts/quickstart and scripts/test: `. scripts/venv.sh` with $root set, then
# `make_venv` or `make_venv dev`. Leaves $venv with this checkout installed in it.
# POSIX sh.
# shellcheck shell=sh

venv=$root/.venv

say() { printf '%s\n' "$@" >&2; }

die() {
    say "$@"
    exit 1
}

# Finds a Python that is new enough, newest name last tried first.
find_python() {
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$python"
            return 0
        fi
    done
    return 1
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# Installs Debian packages, as root.
apt_install() {
    say "installing: $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
}

# Installs Debian packages whose daemons must not start: invoke-rc.d and systemd's helper ask this
# program first (Debian policy 9.3.3.1). One that is there already is the machine owner's word.
apt_install_stopped() {
    if [ -e /usr/sbin/policy-rc.d ]; then
        apt_install "$@"
        return
    fi
    (
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        apt_install "$@"
    )
}

# Makes the empty virtual environment, unless one that works is there.
make_empty_venv() {
    "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    if ! python=$(find_python) && can_apt; then
        apt_install python3 python3-venv
    fi
    python=$(find_python) || die "Python 3.11 or newer is needed, and none was found." \
        "On Debian 12 or newer: sudo apt-get install python3 python3-venv"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        if can_apt; then
            apt_install python3-venv
        else
            die "$python cannot make virtual environments. On Debian: sudo apt-get install python3-venv"
        fi
    fi
    say "making $venv"
    "$python" -m venv --clear "$venv"
}

# Installs this checkout, editable, with the extra "$1" if given; quick if nothing changed.
make_venv() {
    extra=${1:+[$1]}
    make_empty_venv
    # What is installed depends on these two; the code itself is used where it is.
    now=$(cksum <"$root/pyproject.toml")\ $root
    for done in "$venv/.installed$extra" "$venv/.installed[dev]"; do
        if [ "$(cat "$done" 2>/dev/null)" = "$now" ] && [ -x "$venv/bin/kohakud" ]; then
            return
        fi
    done
    say "installing into $venv"
    # What pip warns of is of interest only where it fails.
    if ! told=$("$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$root$extra" 2>&1); then
        die "$told" "" "The packages that pyproject.toml names could not be installed: see above."
    fi
    printf '%s\n' "$now" >"$venv/.installed$extra"
}
