# What the sbatch files here share. They run where they are submitted, with the environment that holds the package active, and have
# found the `repository`; ranks per node: one per GPU, or RANKS_PER_NODE.
set -euo pipefail
me=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

refuse() {
    echo "error: $*" >&2
    exit 2
}

# value_of KEY ARGUMENTS: the path that the argument KEY=... says, without the quotes that Hydra wants around other characters than
# a plain path's. Call it in an assignment of its own, so that its error ends the job.
value_of() {
    local argument found="" key=$1
    for argument in "${@:2}"; do
        case $argument in "$key"=*) found=${argument#*=} ;; esac
    done
    case $found in
        "") refuse "$key=... is needed" ;;
        \'*\') found=${found:1:-1} found=${found//\\\'/\'} ;;
        \"*\") found=${found:1:-1} found=${found//\\\"/\"} ;;
        *[]\'\"[,={}\(\)~]*) refuse "$key=$found: Hydra needs quotes around such a path, inside those of the shell: \"$key='...'\"" ;;
    esac
    case $found in *[\$:\\]*) refuse "$key=$found: a path without \$, colon and backslash is needed here" ;; esac
    printf %s "$found"
}

# hydra_quoted TEXT: as Hydra reads any text.
hydra_quoted() { printf "'%s'" "${1//\'/\\\'}"; }

same() { diff -rq -x __pycache__ "$repository/$1" "$2/$1" >/dev/null; }

# snapshot FOLDER: a copy of the code and configuration, made at the first start, from which everything below then runs.
snapshot() {
    local folder
    mkdir -p "$1/logs"
    folder=$(realpath "$1")
    if [ ! -d "$folder/code" ]; then
        local new
        new=$(mktemp -d -p "$folder/logs" .code.XXXX)
        (cd "$repository" && cp -r --preserve=timestamps --parents jobs stun conf slurm pyproject.toml "$new/")
        chmod 755 "$new"
        mv -T "$new" "$folder/code" 2>/dev/null || rm -rf "$new"
    elif ! same jobs "$folder/code" || ! same stun "$folder/code"; then
        echo "note: runs the code in $folder/code, which is not that in $repository any more"
    fi
    export PYTHONSAFEPATH=1 PYTHONPATH=$folder/code
}

# Queue again, once the step is over: before the time limit (USR1), or when preempted (TERM, to the step alone or to this shell
# too). A job that is cancelled or over its limit gets TERM too, but no longer counts as running.
again=""
# Not through a pipe: grep ends at the first match, and scontrol would fail if it had not written its last byte by then.
is() {
    local about
    about=$(scontrol -o show job "$me") && grep -q "$1" <<<"$about"
}
stop() {
    if [ "$1" = USR1 ] || is "JobState=RUNNING"; then again=yes; fi
    kill -TERM "$step" 2>/dev/null || true
}
queue_again() {
    local attempt
    for attempt in 1 2 3 4 5; do
        if scontrol requeue "$me"; then exit 0; fi
        sleep "$attempt"
    done
    exit 1
}

# run_ranks LOGS MODULE ARGUMENTS: `python -m MODULE ARGUMENTS` on all ranks of all nodes, the output of each in the folder LOGS.
# Where it is interrupted, the job is queued again and ends.
run_ranks() {
    local status=0 here port=$((20000 + SLURM_JOB_ID % 12000)) ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    here=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # srun does not take the job's CPUs by itself; USR1 would kill torchrun's agents.
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c '
        trap "" USR1
        exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$1" --node-rank="$SLURM_NODEID" \
            --master-addr="$2" --master-port="$3" --log-dir="$4" --tee=3 -m "${@:5}"
    ' step "$ranks" "$here" "$port" "$@" &
    step=$!
    trap "stop USR1" USR1
    trap "stop TERM" TERM
    wait "$step" || status=$?
    if [ "$status" != 0 ] && is "JobState=RUNNING.* PreemptTime=[0-9]"; then again=yes; fi
    if [ -n "$again" ]; then
        wait "$step" || true
        queue_again
    fi
    trap - USR1 TERM
    return "$status"
}
