# Makes .venv and installs arpo_trl into it. Sourced by quickstart.sh and test.sh: `. scripts/install.sh [EXTRAS]`
# A second run is quick: nothing is installed until pyproject.toml, constraints.txt or the extras change.

extras=${1:+[$1]}
constraints=${CONSTRAINTS:-constraints.txt}  # /dev/null: the newest of everything

if [ ! -d .venv ]; then
    python=
    for found in python3 python3.13 python3.12 python3.11 python; do
        # 3.11: what trl 1.16 asks for
        if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$found
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "no Python of 3.11 or later is on the PATH (trl 1.16 needs it): install one and run this again" >&2
        exit 2
    fi
    "$python" -m venv .venv || { rm -rf .venv; exit 2; }
fi

# bin on Linux and macOS, Scripts on Windows
export PATH="$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH"

stamp=.venv/installed-${1:-plain}
wanted="$PWD $(cat pyproject.toml "$constraints" | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing arpo_trl$extras into .venv (the first time this downloads torch and takes minutes)"
    # -qq shows errors only. torch goes first, so that its wheel is decided by its pin and the machine's index alone.
    python -m pip install -qq --disable-pip-version-check -c "$constraints" torch
    python -m pip install -qq --disable-pip-version-check -c "$constraints" -e ".$extras"
    echo "$wanted" > "$stamp"
fi
