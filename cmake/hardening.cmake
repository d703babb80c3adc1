# Against what a mistake in our code could be made to do: memory is laid out at random, tables that the linker fills are read-only
# afterwards, overruns of buffers end the program. tests/security/hardening_test.py looks at what was built.
#
# Not with sanitizers, which bring their own checks, and not in a build that is not optimized: _FORTIFY_SOURCE needs that.
include(CheckCXXCompilerFlag)
set(hardened_by_default OFF)
if(CMAKE_BUILD_TYPE MATCHES "^(Release|RelWithDebInfo|MinSizeRel)$" AND NOT CLUSTERIP_SANITIZE)
  set(hardened_by_default ON)
endif()
option(CLUSTERIP_HARDEN "Harden programs and plugin" ${hardened_by_default})

# Hardens these targets. What only tests link is left as it is: it need not be optimized.
function(clusterip_harden)
  if(NOT CLUSTERIP_HARDEN)
    return()
  endif()
  # Debian's compilers are configured for some of this; others are not.
  set(compile -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -fstack-protector-strong -fstack-clash-protection)
  check_cxx_compiler_flag(-fcf-protection=full clusterip_has_cf_protection)  # x86
  if(clusterip_has_cf_protection)
    list(APPEND compile -fcf-protection=full)
  endif()
  check_cxx_compiler_flag(-mbranch-protection=standard clusterip_has_branch_protection)  # arm64
  if(clusterip_has_branch_protection)
    list(APPEND compile -mbranch-protection=standard)
  endif()
  foreach(target IN LISTS ARGN)
    target_compile_options(${target} PRIVATE ${compile})
    target_link_options(${target} PRIVATE -Wl,-z,relro -Wl,-z,now -Wl,-z,noexecstack)
    get_target_property(type ${target} TYPE)
    if(type STREQUAL EXECUTABLE)
      target_link_options(${target} PRIVATE -pie)
    endif()
  endforeach()
endfunction()
