#!/usr/bin/env bash
# Set-up (virtual environment and everything in it), then the gate: style, types, imports, shell scripts, all tests.
# Nothing is installed outside this repository; a second run is quick. Arguments go to pytest; its summary comes last.
#
#   bash launch/test.sh
#   bash launch/test.sh -m slow          the long forms
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

set_up
# lmms-eval, for the test that really runs it; without its dependencies, which would change what was tested together
lmms="$VLMDIST_HOME/tests/bridges/requirements.txt"
if ! cmp -s "$lmms" "$vlmdist_venv/.lmms-eval"; then
    pip_install "$vlmdist_venv/set-up.log" --no-deps -r "$lmms"
    cp "$lmms" "$vlmdist_venv/.lmms-eval"
fi
# wandb and MLflow, in a folder that only their own tests look into
trackers="$VLMDIST_HOME/tests/train/trackers.txt"
if ! cmp -s "$trackers" "$vlmdist_venv/.trackers"; then
    rm -rf "$vlmdist_venv/trackers"
    pip_install "$vlmdist_venv/set-up.log" --no-deps --target "$vlmdist_venv/trackers" -r "$trackers"
    cp "$trackers" "$vlmdist_venv/.trackers"
fi
# Gradio, the same way
gradio="$VLMDIST_HOME/tests/predict/requirements.txt"
if ! cmp -s "$gradio" "$vlmdist_venv/.gradio"; then
    rm -rf "$vlmdist_venv/gradio"
    pip_install "$vlmdist_venv/set-up.log" --no-deps --target "$vlmdist_venv/gradio" -r "$gradio"
    cp "$gradio" "$vlmdist_venv/.gradio"
fi
exec bash "$VLMDIST_HOME/launch/check.sh" "$@"
