#!/bin/sh
# What a machine without a network needs beside the repository, in .carry/ (ignored by git): wheels of the requirements
# that its Python lacks, of the versions that are installed here, and the images as cifar10-jpeg.tar.gz, from DATA_DIR
# (default: data), where they lie as that archive or as the folder cifar10-jpeg.
#
#   DATA_DIR=DIR studies/carry.sh [PYTHON_VERSION_THERE]
#
# There: python3 -m pip install --no-index --no-deps .carry/*.whl
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
there=${1:-3.12}
data=${DATA_DIR:-data}

# What images of PyTorch with Lightning, scikit-learn, matplotlib and rich do not hold. Weights & Biases and pooch are
# imported only where they are used: logger=csv, and data that are at hand.
packages='hydra-core omegaconf antlr4-python3-runtime pydantic pydantic-core annotated-types typing-extensions
    typing-inspection python-dotenv'

if [ ! -f "$data/cifar10-jpeg.tar.gz" ] && [ ! -d "$data/cifar10-jpeg" ]; then
    echo "there is no $data/cifar10-jpeg.tar.gz and no folder $data/cifar10-jpeg: set DATA_DIR to the folder of one" >&2
    exit 1
fi
rm -rf .carry
mkdir .carry
# shellcheck disable=SC2086
"$PYTHON" -c 'import sys
from importlib.metadata import version
for name in sys.argv[1:]:
    print(f"{name}=={version(name)}")' $packages >.carry/versions.txt
while read -r pinned; do
    case $pinned in
        # Published without a wheel.
        antlr4-*) "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir .carry "$pinned" ;;
        *) "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$there" --dest .carry "$pinned" ;;
    esac
done <.carry/versions.txt
if [ -f "$data/cifar10-jpeg.tar.gz" ]; then
    cp "$data/cifar10-jpeg.tar.gz" .carry/
else
    tar czf .carry/cifar10-jpeg.tar.gz -C "$data/cifar10-jpeg" train test
fi
chmod u+w .carry/*
du -sk .carry/* .carry
