#!/usr/bin/env bash
# install.sh [PEER...]: puts what Rotunda is measured against into virtual environments of their own, below
# .cache/benchmarks/peers: transformers, llama_cpp, litellm, guidellm (all of them when none is named).
# torch is pinned to the version that Rotunda itself uses, so that no peer brings another build of it along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
HOME_OF_PEERS=.cache/benchmarks/peers
version_of() { sed -n "s/^$1==//p" constraints.txt | head -1; }
TORCH="torch==$(version_of torch)"

environment() {  # environment PEER PACKAGE...: a virtual environment that has these packages, and torch pinned
  local peer=$1; shift
  local folder=$HOME_OF_PEERS/$peer
  [ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder"
  printf '%s\n' "$TORCH" > "$folder/constraints.txt"
  "$folder/bin/pip" install --quiet --disable-pip-version-check --constraint "$folder/constraints.txt" "$@"
  touch "$folder/installed"
}

install_transformers() { environment transformers "$TORCH" "transformers[serving]==$(version_of transformers)" accelerate; }
install_llama_cpp() { environment llama_cpp "xllamacpp==$(version_of xllamacpp)" gguf safetensors numpy; }
install_litellm() { environment litellm "litellm[proxy]"; }
install_guidellm() { environment guidellm guidellm; }

for peer in "${@:-transformers llama_cpp litellm guidellm}"; do
  for one in $peer; do
    echo "installing $one ..."
    "install_$one" || { echo "$one could not be installed" >&2; failed=1; }
  done
done
exit "${failed:-0}"
