# Create .venv and install arpo_trl into it. Sourced by quickstart.sh and test.sh: `. scripts/install.sh [EXTRAS]`
# The next runs are quick: packages are only installed again if pyproject.toml, constraints.txt or the extras change.

extras=${1:+[$1]}
constraints=${CONSTRAINTS:-constraints.txt}  # /dev/null: the newest releases

# bin on Linux and macOS, Scripts on Windows
has_pip() {
    .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/Scripts/python -m pip --version > /dev/null 2>&1
}

if ! has_pip; then
    python=
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        # 3.11: trl 1.16 requires it
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Python 3.11 or later is not on the PATH (trl 1.16 requires it). Install it and run this script again." >&2
        exit 2
    fi
    if [ -d .venv ]; then
        # An interrupted installation leaves .venv without pip; a Python that was removed leaves a dead link.
        echo "repairing .venv: it has no working pip"
        rm -f .venv/installed-*
        "$python" -m venv .venv > /dev/null 2>&1 || true
        has_pip || "$python" -m venv --clear .venv || { rm -rf .venv; exit 2; }
    else
        "$python" -m venv .venv || { rm -rf .venv; exit 2; }
    fi
fi
export PATH="$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH"

stamp=.venv/installed-${1:-plain}
expected="$PWD $(cat pyproject.toml "$constraints" | cksum)"
if [ "$(cat "$stamp" 2> /dev/null)" != "$expected" ]; then
    echo "installing arpo_trl$extras into .venv (the first time, this downloads torch and takes minutes)"
    # -qq prints errors only. Install torch first: its pin and the package index alone then select the build.
    python -m pip install -qq --disable-pip-version-check -c "$constraints" torch
    python -m pip install -qq --disable-pip-version-check -c "$constraints" -e ".$extras"
    echo "$expected" > "$stamp"
fi
