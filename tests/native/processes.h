// Child processes of native tests; a child fails where one of its checks does.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>

#include "check.h"

inline pid_t start(const std::function<void()>& work) {
  std::fflush(stdout);
  const pid_t child = ::fork();
  if (child != 0) return child;
  work();
  std::fflush(stdout);
  ::_exit(failures == 0 ? 0 : 1);
}

inline void expect_success(pid_t child) {
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
