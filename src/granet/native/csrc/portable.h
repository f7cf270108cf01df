// Included before everything else in the library of a wheel (-include). String streams are compiled into the library,
// because their constructors and str() in GCC's library are newer (GLIBCXX_3.4.26 and 3.4.29) than the oldest systems
// that torch's own wheels run on. All else that streams need, locales above all, stays that of the system.
#pragma once
#include <ios>
#include <istream>
#include <locale>
#include <ostream>
#include <string>

#ifdef __GLIBCXX__
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1
#endif
