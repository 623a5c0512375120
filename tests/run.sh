#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; --all adds the slow ones and the benchmarks.
# --oldest, before the rest, takes the oldest versions and .venv-oldest.
# Anything else goes to pytest: tests/run.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed')"
venv=.venv requirements=requirements.txt
if [ "${1:-}" = --oldest ]; then
    shift
    venv=.venv-oldest requirements=tests/requirements-oldest.txt
fi
[ -x $venv/bin/python ] || python3 -m venv $venv
$venv/bin/python -m pip install --quiet --requirement $requirements --requirement tests/requirements.txt
$venv/bin/ruff check .
$venv/bin/ruff format --check --quiet .
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    shift
    selection=()
fi
OMP_NUM_THREADS=1 $venv/bin/python -m pytest --numprocesses logical --dist worksteal ${selection[@]+"${selection[@]}"} --durations=10 "$@"
if [ ${#selection[@]} -eq 0 ]; then
    for benchmark in tests/benchmarks/*.py; do
        $venv/bin/python "$benchmark"
    done
fi
