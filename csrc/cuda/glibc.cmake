# glibc 2.34 moved pthreads, dlopen and shm_open into libc under new versions, and CUDA's static runtime,
# linked there, would want that glibc at run time. Linked against these stand-ins for the old libraries it
# wants the old versions, which every glibc has: the module loads on glibc 2.28 (manylinux_2_28).
enable_language(C)
set(glibc_pthread
  pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create pthread_key_delete
  pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
  pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_condattr_setpshared pthread_once
  pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
  pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
  pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
  pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock
  pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
set(glibc_dl dlclose dlerror dlopen dlsym dlvsym)
set(glibc_rt shm_open shm_unlink)
set(glibc_suffix_pthread .so.0)
set(glibc_suffix_dl .so.2)
set(glibc_suffix_rt .so.1)
set(glibc_version GLIBC_2.2.5)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64")
  set(glibc_version GLIBC_2.17)
endif()

function(link_old_glibc target)
  foreach(part pthread dl rt)
    set(folder ${CMAKE_BINARY_DIR}/glibc/${part})
    list(TRANSFORM glibc_${part} REPLACE "(.+)" "void \\1(void) {}\n" OUTPUT_VARIABLE source)
    list(JOIN source "" source)
    list(JOIN glibc_${part} "; " names)
    set(map "${glibc_version} { global: ${names}; local: *; };\n")
    if(part STREQUAL dl AND NOT glibc_version STREQUAL GLIBC_2.17)
      string(APPEND source "void dlmopen(void) {}\n")
      string(APPEND map "GLIBC_2.3.4 { global: dlmopen; } ${glibc_version};\n")
    endif()
    file(CONFIGURE OUTPUT ${folder}/stand_in.c CONTENT "${source}" @ONLY)
    file(CONFIGURE OUTPUT ${folder}/versions.map CONTENT "${map}" @ONLY)
    add_library(glibc_${part} SHARED ${folder}/stand_in.c)
    target_compile_options(glibc_${part} PRIVATE -fno-builtin -fvisibility=default)
    target_link_options(glibc_${part} PRIVATE -nostdlib LINKER:--version-script,${folder}/versions.map)
    set_target_properties(glibc_${part} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${folder}
      OUTPUT_NAME ${part} SUFFIX ${glibc_suffix_${part}} LINK_DEPENDS ${folder}/versions.map)
    add_dependencies(${target} glibc_${part})
    list(APPEND files $<TARGET_FILE:glibc_${part}>)
  endforeach()
  target_link_options(${target} PRIVATE LINKER:--push-state,--no-as-needed ${files} LINKER:--pop-state)
endfunction()
