# Defines the INTERFACE target flexchat_arrow: Arrow and Parquet C++, headers as system headers.
# A system package is taken when there is one; else the headers and libraries inside the pyarrow wheel under
# FLEXCHAT_PYTHON_DEPS. The wheel has only versioned names (libarrow.so.2600) and no plain .so links, so the
# libraries are linked by full path; CMake puts their folder into the build rpath.

add_library(flexchat_arrow INTERFACE)

find_package(Arrow CONFIG QUIET)
find_package(Parquet CONFIG QUIET)
if(Arrow_FOUND AND Parquet_FOUND AND TARGET Parquet::parquet_shared AND TARGET Arrow::arrow_shared)
  message(STATUS "Arrow: system package ${Arrow_VERSION}")
  target_link_libraries(flexchat_arrow INTERFACE Parquet::parquet_shared Arrow::arrow_shared)
else()
  set(flexchat_pyarrow "${FLEXCHAT_PYTHON_DEPS}/pyarrow")
  file(GLOB flexchat_arrow_so "${flexchat_pyarrow}/libarrow.so.[0-9]*")
  file(GLOB flexchat_parquet_so "${flexchat_pyarrow}/libparquet.so.[0-9]*")
  list(LENGTH flexchat_arrow_so flexchat_arrow_count)
  list(LENGTH flexchat_parquet_so flexchat_parquet_count)
  if(NOT flexchat_arrow_count EQUAL 1 OR NOT flexchat_parquet_count EQUAL 1
     OR NOT EXISTS "${flexchat_pyarrow}/include/parquet/file_reader.h")
    message(FATAL_ERROR "Arrow C++ not found: neither a system package (Arrow and Parquet) nor the headers and one "
      "version of libarrow and libparquet in '${flexchat_pyarrow}'. Run scripts/setup.sh, which installs the "
      "pyarrow wheel there, or set FLEXCHAT_PYTHON_DEPS to the folder that holds pyarrow.")
  endif()
  message(STATUS "Arrow: ${flexchat_arrow_so}")
  foreach(name arrow parquet)
    add_library(flexchat_pyarrow_${name} SHARED IMPORTED)
    set_target_properties(flexchat_pyarrow_${name} PROPERTIES
      IMPORTED_LOCATION "${flexchat_${name}_so}"
      INTERFACE_INCLUDE_DIRECTORIES "${flexchat_pyarrow}/include")
  endforeach()
  target_link_libraries(flexchat_arrow INTERFACE flexchat_pyarrow_parquet flexchat_pyarrow_arrow)
endif()
