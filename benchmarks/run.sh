#!/bin/sh
# Runs the benchmarks; their rows are written to results/. Missing packages are installed next to
# this file, not into the machine.
#   PYTHON  Python of the machine
#   SITE    folder in which the wheels are installed, such as by an earlier run; default site/
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
SITE=${SITE:-$PWD/site}
if [ ! -d "$SITE" ] && ls wheels/*.whl >/dev/null 2>&1; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" wheels/*.whl
fi
export PYTHONPATH="$PWD/code:$SITE${PYTHONPATH:+:$PYTHONPATH}"

# AOTInductor compiles against CUDA. torch derives CUDA_HOME from the path of nvcc, which is wrong if
# nvcc is a wrapper.
if [ -z "${CUDA_HOME:-}" ] && [ -f /usr/local/cuda/include/cuda.h ]; then
  export CUDA_HOME=/usr/local/cuda
fi
# A driver installs libcuda.so.1, but torch links libcuda.so (pytorch/pytorch#150442).
LIBCUDA=$({ PATH="$PATH:/usr/sbin:/sbin" ldconfig -p | sed -n 's/.*libcuda\.so\.1 (libc6,.*=> //p'
            ls /usr/local/nvidia/lib*/libcuda.so.1; } 2>/dev/null | head -n 1)
if [ -n "$LIBCUDA" ]; then
  mkdir -p link
  ln -sf "$LIBCUDA" link/libcuda.so
  export LIBRARY_PATH="$PWD/link${LIBRARY_PATH:+:$LIBRARY_PATH}"
fi

echo "nvcc: $(command -v nvcc || echo none), CUDA_HOME: ${CUDA_HOME:-not set}," \
  "libcuda: ${LIBCUDA:-none}"
echo "cuda.h: $(ls "${CUDA_HOME:-/usr/local/cuda}/include/cuda.h" 2>/dev/null || echo none)," \
  "g++: $(command -v "${CXX:-g++}" || echo none)"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda)' \
  || true
"$PYTHON" -c 'from infer.doctor import DoctorSettings, doctor; doctor(DoctorSettings())' || true
exec "$PYTHON" -m benchmarks gpu --data data --results results "$@"
