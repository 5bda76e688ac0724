# shellcheck shell=bash
# Sourced by the scripts of this folder: `--dry-run` first, or DRY_RUN=1, prints what would be run.
set -euo pipefail

dry_run() { [[ -n ${DRY_RUN:-} ]]; }

# Runs a command, or prints it so that a shell could read it.
run() {
  if dry_run; then
    printf '%s\n' "${*@Q}"
  else
    "$@"
  fi
}
