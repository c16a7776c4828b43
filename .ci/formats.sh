#!/usr/bin/env bash
# Formats whose packages CI does not install, each in an environment of its own: LiteRT, which needs another torch, and
# transformers.js in node. Says what it skipped; run it by hand before a release.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 skipped=()

try() {  # name, extra, tests
    python3 -m venv "$work/$1"
    if ! "$work/$1/bin/pip" install --quiet -e ".[$2]" pytest; then
        skipped+=("$1: its packages cannot be installed here")
        return
    fi
    # without conftest.py, which needs timm and all that the ordinary suite needs
    "$work/$1/bin/python" -m pytest --noconftest -q -p no:cacheprovider "$3" || failed=1
    rm -rf "${work:?}/$1"
}

try litert litert tests/vit/exporting/test_litert.py
skipped+=("Core ML: CI converts and reads its packages; to run them needs a Mac")
python3 -m venv "$work/js"
if command -v npm > /dev/null && npm install --silent --ignore-scripts --prefix "$work/node" @huggingface/transformers \
    && "$work/js/bin/pip" install --quiet -e ".[onnx]"; then
    "$work/js/bin/python" tests/reports/transformersjs.py --node-modules "$work/node/node_modules" || failed=1
else
    skipped+=("transformers.js: it cannot be installed here")
fi
printf 'skipped: %s\n' "${skipped[@]}"
exit "$failed"
