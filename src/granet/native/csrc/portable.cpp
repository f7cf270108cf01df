// Two small things that the library of a wheel brings itself, because they are newer than the oldest systems that
// torch's own wheels run on (glibc 2.28, GCC 8). They are hidden: other libraries keep those of the system.
#include <new>

#if defined(GRANET_PORTABLE) && defined(__GLIBCXX__)

// GLIBC_2.32: std::shared_ptr counts without atomic operations while this is not 0. 0 is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GLIBCXX_3.4.29: what `new T[n]` and std::vector call for impossible sizes.
namespace std {
__attribute__((visibility("hidden"), noreturn)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

#endif
