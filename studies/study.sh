# What the studies share: sourced by small.sh and gpu.sh, which set STUDY and define `questions` and `afterwards`.
#
# The jobs are Hydra multiruns into outputs/sweeps/study-STUDY. WORKERS processes go through the same list of them; a job
# that another one works on is passed over, one that failed does not stop the others, and the same command continues
# whatever was stopped.

set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
WORKERS=${WORKERS:-1}
SWEEP=outputs/sweeps/study-$STUDY
OVERRIDES=$*

case $WORKERS in
    '' | 0 | *[!0-9]*)
        echo "WORKERS=$WORKERS must be a whole number of at least 1" >&2
        exit 2
        ;;
esac

# One command. What a signal ended ends the worker too.
mixadv() {
    "$PYTHON" run.py "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    [ "$code" -lt 128 ] || exit "$code"
    [ "$code" -eq 0 ] || failed=1
}

# Overrides have no blanks.
# shellcheck disable=SC2086
sweep() { mixadv -m "name=study-$STUDY" "$@" $OVERRIDES; }

# The name of a job's directory.
# shellcheck disable=SC2086
run_name() {
    "$PYTHON" -c 'import sys; from pathlib import Path; from mixadv.runs.sweep import job_names
print(*job_names(sys.argv[2:], Path(sys.argv[1])))' "$SWEEP" "$@" $OVERRIDES
}

# Optimal weights over models that were trained apart from each other, found with quick attacks on validation images and
# measured like the others: the name of its directory, then the runs.
# shellcheck disable=SC2086
solve() {
    name=$1
    shift
    members=
    for run in "$@"; do members=$members${members:+,}\'$SWEEP/$run\'; done
    how=
    for override in $OVERRIDES; do
        # Data, model and loss are those that the members record.
        case $override in trainer=* | trainer.* | logger=* | logger.* | compile=* | protocol=* | protocol.*) how="$how $override" ;; esac
    done
    mixadv task=solve "name=study-$STUDY-$name" "members=[$members]" lambda_solver=lp \
        ++protocol.attacks.pgd-20.restarts=1 $how
    mixadv task=evaluate "mixture=outputs/solve/study-$STUDY-$name" protocol=study "hydra.run.dir=$SWEEP/$name" $how
}

# A function of the study in a process of its own, which hands a signal on to its command and waits for that.
work() {
    child=
    failed=0
    trap '[ -z "$child" ] || { kill -TERM "$child" || :; wait "$child" || :; }; exit 143' TERM
    "$1"
    exit "$failed"
}

# What tables and figures need goes to results/STUDY: no weights, no checkpoints.
publish() {
    [ -d "$SWEEP" ] || return 0
    mkdir -p "results/$STUDY"
    find "results/$STUDY" -mindepth 1 -maxdepth 1 -exec rm -r {} +
    (cd "$SWEEP" && find . -path '*/.*/*' -prune -o \( -name results.json -o -name metrics.csv -o -name records.npz \
        -o -name config.yaml -o -name DONE -o -name FAILED \) -print | tar cf - -T -) | (cd "results/$STUDY" && tar xf -)
    "$PYTHON" run.py task=report "runs=results/$STUDY"
    "$PYTHON" studies/figures.py "results/$STUDY"
}

main() {
    cores=$(getconf _NPROCESSORS_ONLN)
    if [ "$WORKERS" -gt 1 ]; then
        export OMP_NUM_THREADS=$((cores / WORKERS > 0 ? cores / WORKERS : 1))
    fi
    pids=
    trap 'trap "" INT TERM HUP; kill -TERM $pids 2>/dev/null || :; wait; exit 130' INT TERM HUP
    status=0
    for _ in $(seq "$WORKERS"); do
        work questions &
        pids="$pids $!"
        # So that they do not read the same data and compile the same graphs at the same moment.
        [ "$WORKERS" -eq 1 ] || sleep 5
    done
    for pid in $pids; do wait "$pid" || status=$?; done
    [ "$status" -lt 128 ] || exit "$status"
    work afterwards &
    pids=$!
    wait "$pids" || status=$?
    [ "$status" -lt 128 ] || exit "$status"
    publish
    exit "$status"
}
