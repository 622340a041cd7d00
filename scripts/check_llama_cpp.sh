#!/bin/sh
# Holds our GGUF files against the real llama.cpp and writes what it finds to docs/llama-cpp.md.
#
#   scripts/check_llama_cpp.sh [FLAGS of scripts/check_llama_cpp.py]
#
# llama-cpp-python is built from its source into $LLAMA_CPP_ENV (default: .llama-cpp) when it is not there: about ten
# minutes on two cores. PYTHON (default: python) runs jaxft with its test extra; $JAXFT_TOKENIZERS (default:
# ../shared/tokenizers) has the vocabularies.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
environment=${LLAMA_CPP_ENV:-.llama-cpp}
if ! "$environment/bin/python" -c 'import llama_cpp' 2>/dev/null; then
    "$python" -m venv "$environment"
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2} \
        "$environment/bin/pip" install --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
fi
PYTHONPATH=. JAX_PLATFORMS=cpu exec "$python" scripts/check_llama_cpp.py --llama_python "$environment/bin/python" "$@"
