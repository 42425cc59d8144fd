#!/bin/sh
# Starts cecompile in the image. NVIDIA's bases have an entrypoint of their own, which makes CUDA's compatibility
# libraries known; it runs first. Its banner goes to standard error, since results are written to standard output.
base=/opt/nvidia/nvidia_entrypoint.sh
if [ -x "$base" ]; then
    exec 3>&1
    # shellcheck disable=SC2016
    exec "$base" /bin/sh -c 'exec cecompile "$@" >&3 3>&-' cecompile "$@" >&2
fi
exec cecompile "$@"
