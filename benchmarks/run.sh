#!/bin/sh
# Runs the benchmarks within 8.5 minutes; more flags are those of `python -m benchmarks gpu`.
# Missing packages are unpacked next to this file, not into the machine.
#   PYTHON  Python of the machine
#   OUT     folder of the results: a few CSVs and run.log; default results/
#   SITE    folder of the unpacked packages, such as of an earlier run; default site/
set -eu
case ${OUT:-} in
  "") OUT=results ;;
  /*) ;;
  *) OUT=$PWD/$OUT ;;
esac
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
SITE=${SITE:-$PWD/site}

# All output is also written to run.log. Python replaces this shell at the end, so that it receives
# the signals: hence a named pipe.
mkdir -p "$OUT"
rm -f run.pipe
mkfifo run.pipe
tee "$OUT/run.log" <run.pipe &
exec >run.pipe 2>&1
rm run.pipe

if [ ! -d "$SITE" ] && [ -f site.tar.xz ]; then
  rm -rf "$SITE.part" # of a run that was stopped
  "$PYTHON" -W ignore -m tarfile -e site.tar.xz "$SITE.part"
  mv "$SITE.part" "$SITE"
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
exec "$PYTHON" -m benchmarks gpu --data data --results "$OUT" --artifacts artifacts --minutes 8.5 "$@"
