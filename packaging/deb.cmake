# The Debian packages: cpack -G DEB, best with the preset `deb` (prefix /usr).
#   cpack --preset deb -D CPACK_DEBIAN_PACKAGE_RELEASE=2     a package that upgrades an earlier one of the same version
find_program(GZIP gzip REQUIRED)
set(deb_dir ${CMAKE_CURRENT_BINARY_DIR}/deb)

# Policy asks for changelogs and a copyright file in each package.
function(add_deb_documents package component)
  install(FILES ${CMAKE_CURRENT_SOURCE_DIR}/deb/copyright ${deb_dir}/changelog.gz ${deb_dir}/changelog.Debian.gz
          DESTINATION ${doc_dir}/${package} COMPONENT ${component})
endfunction()
file(MAKE_DIRECTORY ${deb_dir})
add_custom_command(
  OUTPUT ${deb_dir}/changelog.gz ${deb_dir}/changelog.Debian.gz
  COMMAND ${GZIP} -9 -n -c ${PROJECT_SOURCE_DIR}/CHANGELOG.md > ${deb_dir}/changelog.gz
  COMMAND ${GZIP} -9 -n -c ${CMAKE_CURRENT_SOURCE_DIR}/deb/changelog > ${deb_dir}/changelog.Debian.gz
  DEPENDS ${PROJECT_SOURCE_DIR}/CHANGELOG.md deb/changelog
  VERBATIM)
add_custom_target(deb_documents ALL DEPENDS ${deb_dir}/changelog.gz)
add_deb_documents(clusterip programs)
add_deb_documents(libclusterip1 library)
add_deb_documents(libclusterip-dev development)
install(FILES deb/libclusterip1.lintian-overrides RENAME libclusterip1
        DESTINATION ${CMAKE_INSTALL_DATAROOTDIR}/lintian/overrides COMPONENT library)

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME clusterip)
set(CPACK_PACKAGE_VENDOR "clusterip")
set(CPACK_PACKAGE_CONTACT "the clusterip authors <clusterip@lists.example.org>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "service addresses for Linux hosts, without a sidecar")
set(CPACK_PACKAGING_INSTALL_PREFIX ${CMAKE_INSTALL_PREFIX})
set(CPACK_STRIP_FILES ON)
set(CPACK_COMPONENTS_ALL programs library development)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
# The same version of each other. The command finds the library by dlopen, which shlibdeps does not see.
set(CPACK_DEBIAN_ENABLE_COMPONENT_DEPENDS ON)
set(CPACK_COMPONENT_PROGRAMS_DEPENDS library)
set(CPACK_COMPONENT_DEVELOPMENT_DEPENDS library)

set(CPACK_DEBIAN_PROGRAMS_PACKAGE_NAME clusterip)
set(CPACK_DEBIAN_PROGRAMS_PACKAGE_SECTION net)
set(CPACK_COMPONENT_PROGRAMS_DESCRIPTION "An application connects to a virtual address (VIP); the kernel makes the
connection reach a backend of that service, by BPF programs inside
connect(). Nothing of clusterip sees the packets.

This package has the command clusterip, its systemd service, and
fallback_proxy, which serves the same configuration where BPF cannot.")
set(CPACK_DEBIAN_PROGRAMS_PACKAGE_CONTROL_EXTRA
    "${CMAKE_CURRENT_SOURCE_DIR}/deb/postinst;${CMAKE_CURRENT_SOURCE_DIR}/deb/prerm;${CMAKE_CURRENT_SOURCE_DIR}/deb/postrm;${CMAKE_CURRENT_SOURCE_DIR}/deb/conffiles")

set(CPACK_DEBIAN_LIBRARY_PACKAGE_NAME libclusterip1)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SECTION libs)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_CONTROL_EXTRA
    "${CMAKE_CURRENT_SOURCE_DIR}/deb/shlibs;${CMAKE_CURRENT_SOURCE_DIR}/deb/triggers")
set(CPACK_COMPONENT_LIBRARY_DESCRIPTION "libclusterip loads services into the kernel, for the command clusterip and
for proxies and mesh agents that want to skip the hop through themselves.

This package has the shared library.")

set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libclusterip-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SHLIBDEPS OFF)
set(CPACK_COMPONENT_DEVELOPMENT_DESCRIPTION "libclusterip loads services into the kernel, for the command clusterip and
for proxies and mesh agents that want to skip the hop through themselves.

This package has the C header, its manual page, and files for pkg-config
and CMake.")
include(CPack)
