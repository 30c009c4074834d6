#!/usr/bin/env bash
# Builds the wheel for one torch in a new environment, and installs and tries it there, where no compiler can be found:
# tests/wheel.sh PYTHON TORCH FOLDER, in the root. A wheel that fails does not come into the folder.
set -euo pipefail
env=$(mktemp --directory)
trap 'rm -rf "$env"' EXIT
"$1" -m venv "$env"
"$env/bin/pip" install --quiet "torch==$2" ninja 'setuptools>=77'
rm -rf build/lib.* # else modules that are no more would be in it
"$env/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$env/wheel" .
"$env/bin/pip" install --quiet "$env"/wheel/*.whl
mkdir "$env/nothing"
(cd "$env/nothing" && env -i PATH="$env/nothing" HOME="$env/nothing" CXX=/bin/false "$env/bin/palu" doctor) |
  tee "$env/told"
grep --quiet '^native ops: prebuilt' "$env/told"
mkdir -p "$3"
mv "$env"/wheel/*.whl "$3"
