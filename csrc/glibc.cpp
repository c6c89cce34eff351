// Symbols that would tie the module to the glibc that it was built on.
#include <features.h>

// libstdc++'s shared_ptr asks glibc 2.32 and later whether the process has one thread. Its own copy says
// no, so that counts are always atomic and the module loads on glibc 2.28 too.
#ifdef __GLIBC__
// NOLINTBEGIN(bugprone-reserved-identifier): the name is glibc's
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
// NOLINTEND(bugprone-reserved-identifier)
#endif
