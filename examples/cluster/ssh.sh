#!/usr/bin/env bash
# One training on several machines that are reached by ssh without a password:
#
#   NODES="one two" ssh.sh CONFIG RUN [--ranks N] [--set A.B=VALUE ...]
#
# RUN, and the folder that this is called in, are on a file system that all machines see. The first machine is where the
# others find it, at PORT. Ctrl-C or SIGTERM saves and stops all; the same command goes on with RUN where there is one.
# PYTHON is the interpreter, at the same path on each machine.

set -euo pipefail
if (($# < 2)) || [[ -z ${NODES:-} ]]; then
  echo 'usage: NODES="one two" ssh.sh CONFIG RUN [--ranks N] [--set A.B=VALUE ...]' >&2
  exit 2
fi
config=$1 run=$2
shift 2
read -ra nodes <<<"$NODES"

if [[ -f $run/config.yaml ]]; then
  words=(--resume "$run" "$@")
else
  words=("$config" --out "$run" "$@")
fi

python=${PYTHON:-python}
head=${nodes[0]##*@}:${PORT:-29500}
together=(-m morex train --nodes "${#nodes[@]}" --head "$head")
started=()
for number in "${!nodes[@]}"; do
  command=$(printf '%q ' "$python" "${together[@]}" --node "$number" "${words[@]}")
  ssh -n "${nodes[number]}" "cd $(printf '%q' "$PWD") && exec $command" &
  started+=($!)
done

# A signal to the first machine stops all at the same step. The search is for what is started above, not for its ranks.
stop() {
  trap '' INT TERM
  ssh -n "${nodes[0]}" "pkill -TERM -f '^[^ ]+ ${together[*]} --node 0 ' -o" || true
}
trap stop INT TERM

# A signal ends `wait`, not the machines, which save first.
code=0
for process in "${started[@]}"; do
  own=0
  wait "$process" || own=$?
  while kill -0 "$process" 2>/dev/null; do
    own=0
    wait "$process" || own=$?
  done
  ((code)) || code=$own
done
exit "$code"
