#!/usr/bin/env bash
# Builds the worker for a GPU, on a machine that needs none: cuda.sh FLAVOUR OUT
#   FLAVOUR  ampere, ada, hopper or blackwell
#   OUT      the program goes to OUT/neuron-FLAVOUR, and stubs of the driver's libraries to OUT/stubs, with which it can
#            be asked for its version where there is no driver: LD_LIBRARY_PATH=OUT/stubs
# FEATURES (cuda cudnn flash-attn), PROFILE (release), JOBS (all cores) and TARGET_DIR (OUT/target-FLAVOUR) may be set.
# flash-attn fetches CUTLASS.
# A toolkit that is there is taken: CUDA_HOME, with nvcc in its bin. Else the compiler comes from NVIDIA's wheels on PyPI,
# and stubs stand for the libraries of a GPU's machine: what is linked against is found when the program starts.
# No compiler cache may stand between: it does not know for which GPU nvcc compiles.
set -euo pipefail
cd "$(dirname "$0")/.."
flavour=${1:?flavour} out=$(mkdir -p "${2:?folder}" && realpath "$2")
case $flavour in
    ampere) capability=86 ;;
    ada) capability=89 ;;
    hopper) capability=90 ;;
    blackwell) capability=120 ;;
    *)
        echo "cuda.sh: there is no GPU flavour '$flavour'; there are ampere, ada, hopper and blackwell" >&2
        exit 1
        ;;
esac
features=${FEATURES:-cuda cudnn flash-attn}
profile=${PROFILE:-release}
toolkit=13.0
unset RUSTC_WRAPPER CARGO_BUILD_RUSTC_WRAPPER NVCC_CCBIN_WRAPPER

# Makes a library with functions that do nothing: stub NAME.so.VERSION [FUNCTION...]
stub() {
    local file=lib$1
    shift
    for function in "$@"; do echo "int $function(void) { return 999; }"; done |
        cc -shared -fPIC -w -x c - -o "$out/stubs/$file" -Wl,-soname,"$file"
    ln -sf "$file" "$out/stubs/${file%.so.*}.so"
}

if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null; then
    wheels=$out/toolkit
    if [ ! -d "$wheels/nvidia" ]; then
        python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$wheels" \
            "nvidia-cuda-nvcc==$toolkit.*" "nvidia-nvvm==$toolkit.*" "nvidia-cuda-crt==$toolkit.*" \
            "nvidia-cuda-cccl==$toolkit.*" "nvidia-cuda-runtime==$toolkit.*"
    fi
    CUDA_HOME=$(dirname "$(dirname "$(find "$wheels/nvidia" -path '*/bin/nvcc' | head -n 1)")")
    chmod +x "$CUDA_HOME"/bin/* "$CUDA_HOME"/nvvm/bin/* 2>/dev/null || true
fi
if [ -n "${CUDA_HOME:-}" ]; then
    export CUDA_HOME CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
fi
CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(command -v nvcc)")")}
nvcc --version | tail -n 2

# Stubs with every function that cudarc may ask of a library, by the functions' own prefixes.
sources=$(cargo metadata --locked --all-features --format-version 1 | jq -r '.packages[] | select(.name == "cudarc") | .manifest_path')
functions=$(grep -rhoE 'fn (cu[A-Z]|cublas|curand|cudnn|nvrtc)[A-Za-z0-9_]*' "$(dirname "$sources")"/src/*/sys |
    awk '{ print $2 }' | sort -u)
of() { echo "$functions" | grep -E "$1" | grep -vE "${2:-^$}"; }
mkdir -p "$out/stubs"
# shellcheck disable=SC2046
{
    stub cuda.so.1 $(of '^cu[A-Z]')
    stub cublas.so.13 $(of '^cublas' '^cublasLt')
    stub cublasLt.so.13 $(of '^cublasLt')
    stub curand.so.10 $(of '^curand')
    stub nvrtc.so.13 $(of '^nvrtc')
    stub cudnn.so.9 $(of '^cudnn')
}
# The runtime is the compiler's own.
runtime=$(find "$CUDA_HOME"/ -name 'libcudart.so.*' | sort | head -n 1)
ln -sf "$runtime" "$out/stubs/$(basename "$runtime")"
ln -sf "$runtime" "$out/stubs/libcudart.so"
# Last in the linker's search: a toolkit's own libraries come first.
export LIBRARY_PATH=$out/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}

export CUDA_COMPUTE_CAP=$capability
# Its own folder: the capability is in no key of a build's, so that two flavours must not share one.
export CARGO_TARGET_DIR=${TARGET_DIR:-$out/target-$flavour}
cargo build --locked --profile "$profile" -p neuron --features "$features" ${JOBS:+-j "$JOBS"}
install -m755 "$CARGO_TARGET_DIR/$([ "$profile" = dev ] && echo debug || echo "$profile")/neuron" "$out/neuron-$flavour"

LD_LIBRARY_PATH=$out/stubs "$out/neuron-$flavour" --version
readelf -d "$out/neuron-$flavour" | grep NEEDED
