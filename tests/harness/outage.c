/* A file system that does not answer: calls on names below a directory fail for as long as a file is there.
 *
 * OUTAGE_BELOW is the directory, OUTAGE_WHILE the file; the file holds the number of the error and, where what is open
 * already shall fail too, the word "writes".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int number_now(int writes) {
    const char *file = getenv("OUTAGE_WHILE");
    char text[64] = {0};
    if (!file) return 0;
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    long length = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    if (length <= 0 || (writes && !strstr(text, "writes"))) return 0;
    return atoi(text);
}

static int is_below(const char *path) {
    const char *below = getenv("OUTAGE_BELOW");
    size_t length = below ? strlen(below) : 0;
    return length && !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

static int fails(int directory, const char *path) {
    char whole[2 * PATH_MAX], place[64];
    int kept = errno, number = 0;
    if (path && *path != '/') {
        snprintf(place, sizeof place, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        long length = syscall(SYS_readlinkat, AT_FDCWD, place, whole, PATH_MAX);
        if (length < 0) length = 0;
        whole[length] = 0;
        if (*path) snprintf(whole + length, PATH_MAX, "/%s", path);
        path = whole;
    }
    if (path && is_below(path)) number = number_now(0);
    errno = number ? number : kept;
    return number != 0;
}

static int written_fails(int fd) {
    char place[64], path[PATH_MAX];
    int kept = errno, number = 0;
    if (!getenv("OUTAGE_BELOW")) return 0;
    snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, place, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        if (is_below(path)) number = number_now(1);
    }
    errno = number ? number : kept;
    return number != 0;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, int); va_end(more); \
        REAL(name); return fails(AT_FDCWD, path) ? -1 : real(path, flags, mode); }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, int); va_end(more); \
        REAL(name); return fails(at, path) ? -1 : real(at, path, flags, mode); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

DIR *opendir(const char *path) { REAL(opendir); return fails(AT_FDCWD, path) ? NULL : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(AT_FDCWD, path) ? -1 : real(path, mode); }
int chdir(const char *path) { REAL(chdir); return fails(AT_FDCWD, path) ? -1 : real(path); }
int unlink(const char *path) { REAL(unlink); return fails(AT_FDCWD, path) ? -1 : real(path); }
int rename(const char *from, const char *to) { REAL(rename); return fails(AT_FDCWD, from) ? -1 : real(from, to); }
int link(const char *from, const char *to) { REAL(link); return fails(AT_FDCWD, from) ? -1 : real(from, to); }
int linkat(int at, const char *from, int there, const char *to, int flags) {
    REAL(linkat); return fails(at, from) ? -1 : real(at, from, there, to, flags); }
int stat(const char *path, struct stat *told) { REAL(stat); return fails(AT_FDCWD, path) ? -1 : real(path, told); }
int lstat(const char *path, struct stat *told) { REAL(lstat); return fails(AT_FDCWD, path) ? -1 : real(path, told); }
int stat64(const char *path, struct stat64 *told) { REAL(stat64); return fails(AT_FDCWD, path) ? -1 : real(path, told); }
int lstat64(const char *path, struct stat64 *told) { REAL(lstat64); return fails(AT_FDCWD, path) ? -1 : real(path, told); }
int fstatat(int at, const char *path, struct stat *told, int flags) {
    REAL(fstatat); return fails(at, path) ? -1 : real(at, path, told, flags); }
int fstatat64(int at, const char *path, struct stat64 *told, int flags) {
    REAL(fstatat64); return fails(at, path) ? -1 : real(at, path, told, flags); }
ssize_t write(int fd, const void *content, size_t length) {
    REAL(write); return written_fails(fd) ? -1 : real(fd, content, length); }
