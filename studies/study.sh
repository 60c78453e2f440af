# What the studies share: sourced by small.sh and gpu.sh, which set NAME and define `questions`.
#
# The jobs of a study are Hydra multiruns into outputs/sweeps/study-NAME. WORKERS processes go through the same list; a
# job that another one works on is passed over, and whatever was stopped is continued by the same command.

set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
WORKERS=${WORKERS:-1}
SWEEP=outputs/sweeps/study-$NAME
OVERRIDES=$*

sweep() {
    # Overrides have no blanks.
    # shellcheck disable=SC2086
    "$PYTHON" run.py -m "name=study-$NAME" "$@" $OVERRIDES || failed=1
}

# The name of a job's directory.
run_name() {
    # shellcheck disable=SC2086
    "$PYTHON" -c 'import sys; from mixadv.config import run_name; print(run_name(sys.argv[1:]))' "$@" $OVERRIDES
}

# Optimal weights over models that were trained apart from each other, found with quick attacks on validation images and
# measured like the others: the name of its directory, then the runs.
solve() {
    name=$1
    shift
    members=
    for run in "$@"; do members=$members${members:+,}\'$SWEEP/$run\'; done
    "$PYTHON" run.py task=solve "name=study-$NAME-$name" "members=[$members]" lambda_solver=lp data.num_test=100 \
        protocol.attacks.pgd-20.restarts=1 || failed=1
    "$PYTHON" run.py task=evaluate "mixture=outputs/solve/study-$NAME-$name" protocol=study \
        "hydra.run.dir=$SWEEP/$name" || failed=1
}

work() {
    failed=0
    questions
    return $failed
}

# What a table and its figures need goes to results/NAME: no weights, no checkpoints.
publish() {
    mkdir -p "results/$NAME"
    (cd "$SWEEP" && find . -path '*/.jobs-*' -prune -o \( -name results.json -o -name metrics.csv -o -name records.npz \
        -o -name DONE -o -name FAILED \) -print | tar cf - -T -) | (cd "results/$NAME" && tar xf -)
    "$PYTHON" run.py task=report "runs=results/$NAME"
}

main() {
    cores=$(getconf _NPROCESSORS_ONLN)
    if [ "$WORKERS" -gt 1 ]; then
        export OMP_NUM_THREADS=$((cores / WORKERS > 0 ? cores / WORKERS : 1))
    fi
    pids=
    for _ in $(seq "$WORKERS"); do
        work &
        pids="$pids $!"
        # So that they do not read the same data and compile the same graphs at the same moment.
        sleep 5
    done
    status=0
    for pid in $pids; do wait "$pid" || status=1; done
    publish
    return $status
}
