/* Lets reads or writes below a folder fail on one host: preloaded into a process, for it and its forks.

   What is to fail lies in a file, which `storage_errors.py` writes and every process maps. Only while something is to
   fail is anything looked at. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <unistd.h>

struct failure { int active, error, writes; char host[64], folder[1024]; };
static volatile struct failure *failure;

__attribute__((constructor)) static void map_failure(void) {
  const char *path = getenv("RECGPT_FAILING_IO");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof(struct failure), PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) failure = mapped;
  close(file);
}

static int is_below(const char *path) {
  struct utsname host;
  size_t length = strlen((const char *)failure->folder);
  if (uname(&host) || strcmp(host.nodename, (const char *)failure->host)) return 0;
  return !strncmp(path, (const char *)failure->folder, length) && (path[length] == '/' || !path[length]);
}

static int fails(int file, int writes) {
  char link[32], path[4096];
  ssize_t length;
  if (!failure || !failure->active || failure->writes != writes) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  if (!is_below(path)) return 0;
  errno = failure->error;
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, writes, parameters, ...)                          \
  type name parameters {                                                   \
    static __typeof__(&name) next;                                         \
    if (!next) next = NEXT(name);                                          \
    return fails(file, writes) ? (type)-1 : next(__VA_ARGS__);             \
  }

WRAP(ssize_t, read, 0, (int file, void *to, size_t size), file, to, size)
WRAP(ssize_t, pread, 0, (int file, void *to, size_t size, off_t at), file, to, size, at)
WRAP(ssize_t, pread64, 0, (int file, void *to, size_t size, off64_t at), file, to, size, at)
WRAP(ssize_t, readv, 0, (int file, const struct iovec *to, int count), file, to, count)
WRAP(ssize_t, write, 1, (int file, const void *from, size_t size), file, from, size)
WRAP(ssize_t, pwrite, 1, (int file, const void *from, size_t size, off_t at), file, from, size, at)
WRAP(ssize_t, pwrite64, 1, (int file, const void *from, size_t size, off64_t at), file, from, size, at)
WRAP(ssize_t, writev, 1, (int file, const struct iovec *from, int count), file, from, count)
WRAP(int, fsync, 1, (int file), file)
WRAP(int, fdatasync, 1, (int file), file)
