#!/usr/bin/env bash
# Used by both job scripts, inside a SLURM allocation: train, stop before the time limit, and resume in the next job.
#   CLLM_PYTHON  the interpreter (default: .venv/bin/python in the project's root, or python)
# Five minutes before the job's time limit SLURM sends USR1 to this script (--signal=B:USR1@300), which passes it on to
# train.py. train.py saves after the current step (with several processes: at the next log step) and ends with status 3.
# The job is requeued and resumes from that checkpoint. The status of this script is 3 as well, 0 for a finished run, and
# another one for a failed run.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this through sbatch}"
python=${CLLM_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
nodes=${SLURM_JOB_NUM_NODES:?run this through sbatch}
devices=${SLURM_NTASKS_PER_NODE:?set --ntasks-per-node to the GPUs of a node}

time_is_up=
step=
# shellcheck disable=SC2329  # the trap below calls it
on_usr1() {
    time_is_up=1
    # srun passes USR1 on to every process; on TERM it would kill them.
    if [ -n "$step" ]; then kill -USR1 "$step" || true; fi
}
trap on_usr1 USR1

# srun ends all tasks as soon as one has a status that is not 0. A stopped task therefore writes a file instead of its
# status, so that the others can end by themselves.
stopped=$PWD/.slurm-${SLURM_JOB_ID:?}.stopped
rm -f "$stopped"
# shellcheck disable=SC2016  # each task expands it
task='trap : USR1 TERM  # these are for train.py
status=0
"$@" || status=$?
if [ "$status" -eq 3 ]; then touch "$0"; exit 0; fi
exit "$status"'
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$task" "$stopped" "$python" train.py \
    --train.devices "$devices" --train.num_nodes "$nodes" --resume auto "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do # USR1 ends a wait, not the training
    wait "$step" || true
done
status=0
wait "$step" || status=$?

if [ "$status" -eq 0 ] && [ -e "$stopped" ]; then status=3; fi
rm -f "$stopped"
if [ -n "$time_is_up" ] && [ "$status" -eq 3 ]; then
    scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$status"
