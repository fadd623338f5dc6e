# Defines the target flexchat_cuda: libflexchat_cuda.so, everything in src/backend/cuda. And cuda_run_path, where
# programs find what they open at run time.
#
# The toolkit is CUDAToolkit_ROOT if set, else the wheels that scripts/setup.sh puts under FLEXCHAT_PYTHON_DEPS,
# else /usr/local/cuda. The wheels have no lib64 and only versioned names of libraries, with which CMake's own
# CUDA language cannot link its test program; so nvcc is called by custom commands, with dependency files, and
# libraries are linked by full path. The driver (libcuda) is asked for its entry points at run time; NVRTC,
# CUPTI, NCCL and cuDNN are opened where they are used, through the run path given here.

# ---- the toolkit ----------------------------------------------------------------------------------------
set(cuda_wheels "${FLEXCHAT_PYTHON_DEPS}/nvidia")
set(cuda_candidates ${CUDAToolkit_ROOT})
if(NOT cuda_candidates AND DEFINED ENV{CUDAToolkit_ROOT})
  set(cuda_candidates "$ENV{CUDAToolkit_ROOT}")
endif()
if(NOT cuda_candidates)
  set(cuda_candidates "${cuda_wheels}/cu13" /usr/local/cuda)
endif()
set(cuda_root "")
set(cuda_reasons "")
foreach(root ${cuda_candidates})
  file(GLOB cudart "${root}/lib64/libcudart_static.a" "${root}/lib/libcudart_static.a")
  file(GLOB cublaslt "${root}/lib64/libcublasLt.so.[0-9]*" "${root}/lib/libcublasLt.so.[0-9]*")
  set(version 0)
  if(EXISTS "${root}/include/cuda.h")
    file(STRINGS "${root}/include/cuda.h" version REGEX "^#define CUDA_VERSION [0-9]+")
    string(REGEX MATCH "[0-9]+$" version "${version}")
  endif()
  if(NOT EXISTS "${root}/bin/nvcc" OR NOT EXISTS "${root}/include/cuda_runtime.h")
    string(APPEND cuda_reasons "\n  ${root}: no bin/nvcc or no include/cuda_runtime.h")
  elseif(version LESS 13000)
    string(APPEND cuda_reasons "\n  ${root}: CUDA_VERSION is ${version}; needed: 13000 (CUDA 13.0) or newer")
  elseif(NOT cudart OR NOT cublaslt OR NOT EXISTS "${root}/include/cublasLt.h")
    string(APPEND cuda_reasons "\n  ${root}: libcudart_static.a, libcublasLt.so or include/cublasLt.h is missing")
  else()
    set(cuda_root "${root}")
    list(GET cudart 0 cuda_runtime_library)
    list(GET cublaslt 0 cuda_blas_library)
    math(EXPR cuda_major "${version} / 1000")
    math(EXPR cuda_minor "${version} % 1000 / 10")
    break()
  endif()
endforeach()
if(NOT cuda_root)
  message(FATAL_ERROR "FLEXCHAT_CUDA is ON, but there is no usable CUDA toolkit:${cuda_reasons}\n"
    "Run scripts/setup.sh --cuda, which installs one from PyPI, or set CUDAToolkit_ROOT.")
endif()
message(STATUS "CUDA: ${cuda_major}.${cuda_minor} in ${cuda_root}, architectures ${FLEXCHAT_CUDA_ARCHS}")

set(cuda_includes "${cuda_root}/include" "${cuda_root}/include/cccl" "${cuda_root}/extras/CUPTI/include")
set(cuda_gencode "")
foreach(arch ${FLEXCHAT_CUDA_ARCHS})
  if(NOT arch MATCHES "^([0-9]+)[af]?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "FLEXCHAT_CUDA_ARCHS has '${arch}'; allowed: a list of 80 or higher, as in \"80;90a;100\"")
  elseif(arch STREQUAL "90")  # kernels take Hopper's own instructions for granted on a Hopper
    message(FATAL_ERROR "FLEXCHAT_CUDA_ARCHS has '90'; write 90a")
  endif()
  list(APPEND cuda_gencode -gencode arch=compute_${arch},code=sm_${arch})
endforeach()
if(NOT cuda_gencode)
  message(FATAL_ERROR "FLEXCHAT_CUDA_ARCHS is empty; allowed: a list of 80 or higher, as in \"80;90a;100\"")
endif()

# Where cuBLASLt and what is opened at run time lie. The relative entries let a tree be moved.
cmake_path(GET cuda_blas_library PARENT_PATH cuda_lib_folder)
set(cuda_run_path "${cuda_lib_folder}" "${cuda_root}/extras/CUPTI/lib64")
foreach(folder cu13/lib cudnn/lib cudnn_jit/lib nccl/lib)
  list(APPEND cuda_run_path "$ORIGIN/../../.deps/python/nvidia/${folder}" "${cuda_wheels}/${folder}")
endforeach()
list(APPEND cuda_run_path /usr/local/cuda/lib64)
list(REMOVE_DUPLICATES cuda_run_path)

# ---- sources --------------------------------------------------------------------------------------------
file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS src/backend/cuda/*.cc)
list(FILTER cuda_sources EXCLUDE REGEX "/aot_emit\\.cc$")
file(GLOB_RECURSE cuda_kernels CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR}/src src/backend/cuda/*.cu)
set(cuda_flags -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -Werror=all-warnings
  -ccbin ${CMAKE_CXX_COMPILER} "-Xcompiler=-fPIC,-Wall,-Wextra" -I ${CMAKE_SOURCE_DIR}/src)
if(CMAKE_CXX_FLAGS_${build_type_upper} MATCHES "-DNDEBUG")
  list(APPEND cuda_flags -DNDEBUG)
endif()
set(cuda_objects "")
foreach(source ${cuda_kernels})
  set(object "${CMAKE_BINARY_DIR}/cuda/${source}.o")
  cmake_path(GET object PARENT_PATH folder)
  file(MAKE_DIRECTORY "${folder}")
  add_custom_command(OUTPUT ${object}
    COMMAND ${cuda_root}/bin/nvcc ${cuda_flags} ${cuda_gencode} -MD -MF ${object}.d -MT ${object}
      -c ${CMAKE_SOURCE_DIR}/src/${source} -o ${object}
    DEPENDS ${CMAKE_SOURCE_DIR}/src/${source} ${cuda_root}/bin/nvcc
    DEPFILE ${object}.d
    COMMENT "Compiling ${source}" VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()
# A target of their own, and so below: within flexchat_cuda they would wait for flexchat_emit_aot and flexchat_lib.
add_custom_target(flexchat_cuda_kernels DEPENDS ${cuda_objects})

# The text of the kernels that are compiled at run time (backend/cuda/kernel_source.h).
file(GLOB cuda_embedded CONFIGURE_DEPENDS src/backend/cuda/kernels/*.cuh)
set(cuda_embedded_cc "${CMAKE_BINARY_DIR}/cuda/kernel_sources.cc")
string(REPLACE ";" "|" cuda_embedded_argument "${cuda_embedded}")
add_custom_command(OUTPUT ${cuda_embedded_cc}
  COMMAND ${CMAKE_COMMAND} "-DFILES=${cuda_embedded_argument}" -DOUT=${cuda_embedded_cc}
    -P ${CMAKE_SOURCE_DIR}/cmake/embed_kernels.cmake
  DEPENDS ${cuda_embedded} ${CMAKE_SOURCE_DIR}/cmake/embed_kernels.cmake
  COMMENT "Embedding kernel sources" VERBATIM)
add_custom_target(flexchat_kernel_sources DEPENDS ${cuda_embedded_cc})

# The kernels of common masks are compiled here with the run-time compiler and embedded (backend/cuda/aot.h).
set(cuda_aot src/backend/cuda/aot_list.cc src/backend/cuda/aot_source.cc src/backend/cuda/kernel_source.cc)
add_executable(flexchat_emit_aot src/backend/cuda/aot_emit.cc ${cuda_aot} ${cuda_embedded_cc})
target_link_libraries(flexchat_emit_aot PRIVATE flexchat_lib)
add_dependencies(flexchat_emit_aot flexchat_kernel_sources)
set_target_properties(flexchat_emit_aot PROPERTIES BUILD_RPATH "${cuda_run_path}")
set(cuda_cubins "${CMAKE_BINARY_DIR}/cuda/aot_cubins")
string(REPLACE ";" "," cuda_arch_list "${FLEXCHAT_CUDA_ARCHS}")
add_custom_command(OUTPUT ${cuda_cubins}.cc ${cuda_cubins}.bin
  COMMAND flexchat_emit_aot ${cuda_arch_list} ${CMAKE_BINARY_DIR}/cuda
  DEPENDS flexchat_emit_aot
  COMMENT "Compiling the common masks for ${cuda_arch_list}" VERBATIM)
set_source_files_properties(${cuda_cubins}.cc PROPERTIES OBJECT_DEPENDS ${cuda_cubins}.bin)

# ---- the library ----------------------------------------------------------------------------------------
add_library(flexchat_cuda MODULE ${cuda_sources} ${cuda_embedded_cc} ${cuda_cubins}.cc ${cuda_objects})
add_dependencies(flexchat_cuda flexchat_cuda_kernels flexchat_kernel_sources)
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
target_include_directories(flexchat_cuda SYSTEM PRIVATE ${cuda_includes})
string(REPLACE ";" " " cuda_arch_words "${FLEXCHAT_CUDA_ARCHS}")
set_source_files_properties(src/backend/cuda/entry.cc PROPERTIES
  COMPILE_DEFINITIONS "FLEXCHAT_CUDA_ARCHS=\"${cuda_arch_words}\"")

# The attention of cuDNN, a baseline, needs headers of cuDNN and of its frontend; without them it is left out.
find_path(CUDNN_FRONTEND_INCLUDE cudnn_frontend.h HINTS "${FLEXCHAT_PYTHON_DEPS}/include" "${cuda_root}/include")
find_path(CUDNN_INCLUDE cudnn_graph.h HINTS "${cuda_wheels}/cudnn_jit/include" "${cuda_wheels}/cudnn/include"
  "${cuda_root}/include")
if(CUDNN_FRONTEND_INCLUDE AND CUDNN_INCLUDE)
  file(READ "${CUDNN_INCLUDE}/cudnn_version.h" cudnn_text)
  set(cudnn_version 0)
  foreach(part MAJOR MINOR PATCHLEVEL)
    string(REGEX MATCH "define CUDNN_${part} +([0-9]+)" cudnn_text_found "${cudnn_text}")
    math(EXPR cudnn_version "${cudnn_version} * 100 + ${CMAKE_MATCH_1}") # 91900 is 9.19.0
  endforeach()
  message(STATUS "cuDNN: headers of ${cudnn_version} in ${CUDNN_INCLUDE}, of its frontend in ${CUDNN_FRONTEND_INCLUDE}")
  # Before the toolkit's folder, which may have another cudnn.h.
  target_include_directories(flexchat_cuda SYSTEM BEFORE PRIVATE ${CUDNN_INCLUDE} ${CUDNN_FRONTEND_INCLUDE})
  set_property(SOURCE src/backend/cudnn_library.cc src/backend/cuda/cudnn_attention.cc src/backend/cuda/cudnn_entry.cc
    APPEND PROPERTY COMPILE_DEFINITIONS FLEXCHAT_CUDNN=${cudnn_version} CUDNN_FRONTEND_SKIP_JSON_LIB)
  # Headers alone, of which little runs: optimized further they take twice as long to compile.
  set_property(SOURCE src/backend/cuda/cudnn_attention.cc APPEND PROPERTY COMPILE_OPTIONS -O1)
else()
  message(STATUS "cuDNN: its headers or its frontend's were not found; built without its attention (scripts/setup.sh "
    "--cuda installs both)")
endif()

# flexchat_lib is not linked: the program that loads the library has it (see flexchat_link).
target_link_libraries(flexchat_cuda PRIVATE flexchat_flags fmt::fmt nlohmann_json::nlohmann_json
  OpenMP::OpenMP_CXX ${cuda_runtime_library} ${cuda_blas_library} rt dl)
target_link_options(flexchat_cuda PRIVATE LINKER:--exclude-libs,libcudart_static.a)
set_target_properties(flexchat_cuda PROPERTIES BUILD_RPATH "${cuda_run_path}")
