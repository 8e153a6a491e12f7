#!/usr/bin/env bash
# Wheels for accept.py on a machine that has torch, transformers and pyarrow but no network: wheels.sh FOLDER [PYTHON's version there].
set -euo pipefail
folder=$1 version=${2:-3.12} project=$(dirname "$0")/../../pyproject.toml
mkdir -p "$folder"

fetch() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --dest "$folder" "$@"; }

# What the wheels in FOLDER require of the packages that are named.
required() {
    python3 - "$folder" "$@" <<'PYTHON'
import re, sys
from pathlib import Path
from zipfile import ZipFile

folder, *names = sys.argv[1:]
for file in sorted(Path(folder).glob("*.whl")):
    with ZipFile(file) as wheel:
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    for name, range_ in re.findall(r"^Requires-Dist: ([\w-]+)([^;\n]*)$", metadata, re.M):
        if name in names:
            print(f"{name}{range_}".replace(" ", ""))
PYTHON
}

mapfile -t ours < <(grep -oE '"(datasets|hydra-core)[^"]*"' "$project" | tr -d '"')
fetch "${ours[@]}"
mapfile -t theirs < <(required omegaconf dill multiprocess)
fetch "${theirs[@]}"
mapfile -t built < <(required antlr4-python3-runtime | sort -u)
python3 -m pip wheel -q --no-deps --wheel-dir "$folder" "${built[@]}" # there is no wheel of it to fetch

du -ch "$folder"/*.whl
echo "python3 -m pip install --no-index --no-deps $folder/*.whl"
