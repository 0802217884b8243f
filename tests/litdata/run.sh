#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of the litdata back end: tests/litdata/run.sh [PYTHON] [pytest arguments]
# They have an environment of their own, which lies over PYTHON's and is thrown away: litdata names torchvision among its
# requirements, which has no CPU build on PyPI and breaks parts of transformers and torchmetrics beside one of torch.
# Token shards need nothing of it, so litdata is installed without its requirements, and what it does import is named here.
# PIP_CONSTRAINT chooses the releases; without it they are those that are locked for PYTHON.
set -euo pipefail
base="$(realpath -s "${1:-python3}")"
shift || true
cd "$(dirname "$0")/../.."

layer="$(mktemp -d)"
trap 'rm -rf "$layer"' EXIT
"$base" -m venv "$layer"
python="$layer/bin/python"
packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
{ "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; pwd; } >"$packages/base.pth"
env $(.ci/locked "$python") ${PIP_CONSTRAINT:+"PIP_CONSTRAINT=$PIP_CONSTRAINT"} \
  "$python" -m pip install --quiet --no-deps litdata boto3 botocore s3transfer jmespath obstore

if "$python" -c 'import torchvision' 2>/dev/null; then
  echo "torchvision is installed: the tests are to show that token shards do without" >&2
  exit 1
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
"$python" -m pytest -p no:cacheprovider -o "norecursedirs=.*" "$@" tests/litdata
