// What native tests check with: a failure is printed and counted, and the test goes on.
#pragma once

#include <atomic>
#include <cstdio>

inline std::atomic<int> failures{0};

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                               \
    }                                                                           \
  } while (0)
